"""What llama.cpp's own converter writes, and what ours writes of the same checkpoint: key by key, tensor by tensor.

    python -P benchmarks/llama_cpp_converter.py [--keep FOLDER]

A small checkpoint with the release's vocabulary, once with MXFP4 experts and once with bfloat16 ones, is converted by both
with every --outtype. Each key's type and value and each tensor's type, shape and bytes are compared by a reader of this
file's own. Printed as Markdown: one line per conversion, then every difference.
"""

from __future__ import annotations

import argparse
import mmap
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from peer import PACKAGE, our_command, peer_command, write_checkpoint
from support.checkpoints import SMALL, Model

SPEC = replace(SMALL, layers=4, hidden=64, vocab=201088, spare_rows=1069)
NAME = "gpt-oss-20b"  # a folder so named is what their converter reads the model's name from
CODECS = ("auto", "f32", "f16", "bf16", "q8_0")
STRING, ARRAY = 8, 9
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass
class Contents:
    """A GGUF: key → (type, bytes of the value); tensor → (type, shape, bytes); both in the file's order."""

    keys: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return int(value)

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def skip(self, kind: int) -> str:
        """Pass over a value; returns its type in words."""
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == STRING:
                for _ in range(count):
                    self.at = self.number("Q") + self.at
            else:
                self.at += count * SCALARS[inner]
            return f"array of {GGUFValueType(inner).name.lower()}"
        else:
            self.at += SCALARS[kind]
        return GGUFValueType(kind).name.lower()


def read(path: Path) -> Contents:
    """A whole file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader, result = _Reader(data), Contents()
        reader.at = 8
        tensors, keys = reader.number("Q"), reader.number("Q")
        for _ in range(keys):
            key, kind = reader.text(), reader.number("I")
            start = reader.at
            result.keys[key] = (reader.skip(kind), data[start : reader.at])
        infos = []
        for _ in range(tensors):
            name = reader.text()
            shape = tuple(reader.number("Q") for _ in range(reader.number("I")))
            infos.append((name, shape, GGMLQuantizationType(reader.number("I")), reader.number("Q")))
        begin = reader.at + -reader.at % 32
        for name, shape, kind, offset in infos:
            block, size = GGML_QUANT_SIZES[kind]
            values = 1
            for width in shape:
                values *= width
            there = begin + offset
            result.tensors[name] = (kind.name, shape, data[there : there + values // block * size])
        return result


def shown(value: tuple[str, bytes] | None) -> str:
    """A key's type and value in few characters."""
    if value is None:
        return "absent"
    kind, data = value
    if kind == "string":
        return f"string `{data[8:][:60].decode(errors='replace')}`"
    if kind == "uint32":
        return f"uint32 {int.from_bytes(data, 'little')}"
    return f"{kind}, {len(data)} bytes"


def differences(ours: Contents, theirs: Contents) -> list[str]:
    """One line for each key or tensor that is not the same in both."""
    lines = []
    for key in dict.fromkeys([*theirs.keys, *ours.keys]):
        a, b = ours.keys.get(key), theirs.keys.get(key)
        if a != b:
            lines.append(f"key `{key}`: ours {shown(a)}, theirs {shown(b)}")
    for name in dict.fromkeys([*theirs.tensors, *ours.tensors]):
        mine, other = ours.tensors.get(name), theirs.tensors.get(name)
        if mine is None or other is None:
            lines.append(f"tensor `{name}`: only in {'theirs' if mine is None else 'ours'}")
        elif mine[:2] != other[:2]:
            lines.append(f"tensor `{name}`: ours {mine[0]} {mine[1]}, theirs {other[0]} {other[1]}")
        elif mine[2] != other[2]:
            count = sum(x != y for x, y in zip(mine[2], other[2], strict=True))
            lines.append(f"tensor `{name}` ({mine[0]}): {count} of {len(mine[2])} bytes differ")
    return lines


def options(layout: str, outtype: str) -> list[str]:
    """What our command needs to write what theirs writes with `--outtype`."""
    if outtype == "auto":
        return []
    dense = ["--dense", outtype]
    return dense if layout == "hf" else ["--experts", outtype, *dense]


def compare(layout: str, outtype: str, folder: Path) -> tuple[str, list[str]]:
    """Both conversions of one source; returns a row of the table and the differences."""
    source = folder / layout / NAME
    if not source.exists():
        write_checkpoint(Model(SPEC), source, layout)
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    command, environment = peer_command(source, theirs, outtype)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    chosen = options(layout, outtype)
    subprocess.run([*our_command(source, ours, *chosen), "--overwrite"], check=True, capture_output=True)
    a, b = read(ours), read(theirs)
    found = differences(a, b)
    same_keys = sum(b.keys.get(key) == value for key, value in a.keys.items())
    same_tensors = sum(b.tensors.get(name) == value for name, value in a.tensors.items())
    what = "MXFP4" if layout == "hf" else "bfloat16"
    row = (
        f"| {what} | `{outtype}` | `{' '.join(chosen) or '(none)'}` "
        f"| {same_tensors} of {len(b.tensors)} | {same_keys} of {len(b.keys)} |"
    )
    return row, [f"{what}, `{outtype}`: {line}" for line in found]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="leave the files in this folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llama-cpp-converter-") as name:
        folder = chosen.keep or Path(name)
        results = [compare(layout, outtype, folder) for layout in ("hf", "bf16") for outtype in CODECS]
    print(f"{PACKAGE}; {SPEC.layers} layers, {SPEC.experts} experts, hidden {SPEC.hidden}, vocabulary {SPEC.vocab}\n")
    print("| source's experts | their `--outtype` | our options | same tensors | same keys |")
    print("| --- | --- | --- | ---: | ---: |")
    print("\n".join(row for row, _ in results), end="\n\n")
    print("\n".join(f"- {line}" for _, lines in results for line in lines) or "No differences.")


if __name__ == "__main__":
    main()

"""What llama.cpp's own converter writes, and what ours writes of the same checkpoint: key by key, tensor by tensor.

    python -P benchmarks/llama_cpp_converter.py [--keep FOLDER]

A small checkpoint with the release's vocabulary, once with MXFP4 experts and once with bfloat16 ones, is converted by both
with every --outtype. Each key's type and value and each tensor's type, shape and bytes are compared by a reader of this
file's own. Printed as Markdown: one line per conversion, then every difference.
"""

from __future__ import annotations

import argparse
import mmap
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from peer import PACKAGE, our_command, peer_command, write_checkpoint
from support.checkpoints import SMALL, Model

SPEC = replace(SMALL, layers=4, hidden=64, vocab=201088, spare_rows=1069)
NAME = "gpt-oss-20b"  # a folder so named is what their converter reads the model's name from
CODECS = ("auto", "f32", "f16", "bf16", "q8_0")
STRING, ARRAY = 8, 9
Tensor = tuple[str, tuple[int, ...], bytes]
"""Type, shape, bytes."""
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass
class Contents:
    """A GGUF: key → (type, bytes of the value); tensor → (type, shape, bytes); both in the file's order."""

    keys: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


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


def key_differences(ours: Contents, theirs: Contents) -> list[str]:
    """One line for each key that is not the same in both."""
    keys = dict.fromkeys([*theirs.keys, *ours.keys])
    pairs = {key: (ours.keys.get(key), theirs.keys.get(key)) for key in keys}
    return [f"key `{key}`: ours {shown(a)}, theirs {shown(b)}" for key, (a, b) in pairs.items() if a != b]


def tensor_differences(ours: Contents, theirs: Contents, exact: Contents) -> list[str]:
    """One line for each kind of tensor, over the layers, that is not the same; errors are relative to the F32 file's."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*theirs.tensors, *ours.tensors]):
        a, b = ours.tensors.get(name), theirs.tensors.get(name)
        if a is None or b is None:
            what = f"only in {'theirs' if a is None else 'ours'}"
        elif a[:2] != b[:2]:
            what = f"ours {a[0]} {a[1]}, theirs {b[0]} {b[1]}"
        elif a[2] != b[2]:
            errors = [error(tensor, exact.tensors[name]) for tensor in (a, b)]
            what = f"{a[0]} of other bytes; relative error of ours {errors[0]:.1e}, of theirs {errors[1]:.1e}"
        else:
            continue
        groups.setdefault(re.sub(r"blk\.\d+", "blk.*", name), []).append(what)
    return [f"tensor `{name}` ({len(found)} times): {found[0]}" for name, found in groups.items()]


def error(tensor: Tensor, exact: Tensor) -> float:
    """Root of the mean square of a tensor's errors over that of its values."""
    values, wanted = (
        dequantize(np.frombuffer(data, np.uint8 if kind != "F32" else np.float32), GGMLQuantizationType[kind])
        for kind, _, data in (tensor, exact)
    )
    return float(np.linalg.norm(values - wanted) / np.linalg.norm(wanted))


def options(layout: str, outtype: str) -> list[str]:
    """What our command needs to write what theirs writes with `--outtype`."""
    if outtype == "auto":
        return []
    dense = ["--dense", outtype]
    return dense if layout == "hf" else ["--experts", outtype, *dense]


class Comparison:
    """Conversions of one source by both, one row of the table and some differences each."""

    def __init__(self, layout: str, folder: Path) -> None:
        self.layout, self.folder, self.what = layout, folder, "MXFP4" if layout == "hf" else "bfloat16"
        self.source = folder / layout / NAME
        if not self.source.exists():
            write_checkpoint(Model(SPEC), self.source, layout)
        self.exact = self.theirs("f32")

    def theirs(self, outtype: str) -> Contents:
        """What their converter writes."""
        target = self.folder / "theirs.gguf"
        command, environment = peer_command(self.source, target, outtype)
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return read(target)

    def ours(self, chosen: list[str]) -> Contents:
        """What our converter writes."""
        target = self.folder / "ours.gguf"
        subprocess.run([*our_command(self.source, target, *chosen), "--overwrite"], check=True, capture_output=True)
        return read(target)

    def compare(self, outtype: str, *more: str) -> tuple[str, list[str]]:
        """A row and the differences."""
        chosen = [*options(self.layout, outtype), *more]
        a, b = self.ours(chosen), self.exact if outtype == "f32" else self.theirs(outtype)
        same_tensors = sum(b.tensors.get(name) == value for name, value in a.tensors.items())
        same_keys = sum(b.keys.get(key) == value for key, value in a.keys.items())
        row = (
            f"| {self.what} | `{outtype}` | `{' '.join(chosen) or '(none)'}` "
            f"| {same_tensors} of {len(b.tensors)} | {same_keys} of {len(b.keys)} |"
        )
        found = [*key_differences(a, b), *tensor_differences(a, b, self.exact)]
        return row, [f"{self.what}, `{outtype}`, `{' '.join(chosen)}`: {line}" for line in found]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="leave the files in this folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llama-cpp-converter-") as name:
        results = []
        for layout in ("hf", "bf16"):
            comparison = Comparison(layout, chosen.keep or Path(name))
            results += [comparison.compare(outtype, "--name", NAME) for outtype in CODECS]
            results.append(comparison.compare("auto"))
    print(f"{PACKAGE}; {SPEC.layers} layers, {SPEC.experts} experts, hidden {SPEC.hidden}, vocabulary {SPEC.vocab}\n")
    print("| source's experts | their `--outtype` | our options | same tensors | same keys |")
    print("| --- | --- | --- | ---: | ---: |")
    print("\n".join(row for row, _ in results), end="\n\n")
    print("\n".join(f"- {line}" for _, lines in results for line in lines) or "No differences.")


if __name__ == "__main__":
    main()

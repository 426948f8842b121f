"""The header of a safetensors file: reading it strictly, and building it. Tensor data is never touched here.

Layout of a file, integers little-endian:

    offset  bytes  content
    0       8      N, the length of the header in bytes, u64
    8       N      one JSON object in UTF-8, padded at the end with spaces
    8 + N   rest   tensor data: one range per tensor, row-major, without holes and without overlap

The JSON maps each tensor's name to {"dtype": str, "shape": [int, ...], "data_offsets": [begin, end]}, offsets in bytes
from 8 + N; the optional key `__metadata__` maps text to text. The safetensors library is not used: it maps the file
into memory, so that a file that shrinks kills the process, and it does not tell where a tensor lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile, parse_json
from gptoss_convert.formats.sniff import EXECUTABLE, HEAD_BYTES, MAX_SAFETENSORS_HEADER, Kind, identify

# Bytes per element of every dtype with whole-byte elements.
DTYPES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
# Known to the format, but no layout of this model family uses them and their sizes are not whole bytes.
SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})

MAX_RANK = 8
MAX_NAME = 512
# The 120b model stored expert by expert, each with five quantization tensors beside it, has about 140,000 tensors.
MAX_TENSORS = 200_000
MAX_INT = 2**63 - 1
# A tensor needs two brackets or braces and at most a dozen commas. Parsing costs up to 64 bytes per separator, so that
# without this bound a header of 100 MB could ask for several GB.
MAX_SEPARATORS = 20 * MAX_TENSORS

METADATA_KEY = "__metadata__"
FIELDS = frozenset({"dtype", "shape", "data_offsets"})
REMEDY = "the file is truncated, damaged or made by a faulty tool; download it again and run verify"

TensorSpec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Entry:
    """One tensor: `offset` in bytes from the start of the file, `nbytes` its length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A whole header: entries in the order of their data; the digest is over JSON and padding; sizes in bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    header_bytes: int
    header_sha256: str
    size: int


def read_header(file: SourceFile) -> Header:
    """The header of a safetensors file, every rule of the format checked; BadInput names the file and the tensor."""
    length = _header_length(file)
    text = bytes(file.read(8, length))
    if sum(text.count(mark) for mark in b"[{,") > MAX_SEPARATORS:
        raise _bad("the header has too many parts", file.path, "millions", f"at most {MAX_TENSORS} tensors")
    if not text.rstrip(b" ").endswith(b"}"):
        raise _bad("the header does not end as it must", file.path, text[-20:], "a closing brace, then spaces")
    table = parse_json(text, file.path)
    metadata = _metadata(table.pop(METADATA_KEY, {}), file.path)
    if len(table) > MAX_TENSORS:
        raise _bad("too many tensors", file.path, len(table), f"at most {MAX_TENSORS}")
    start = 8 + length
    entries = sorted(
        (_entry(name, fields, start, file.path) for name, fields in table.items()),
        key=lambda entry: (entry.offset, entry.nbytes),
    )
    _check_packed(entries, start, file)
    return Header(
        entries={entry.name: entry for entry in entries},
        metadata=metadata,
        header_bytes=length,
        header_sha256=hashlib.sha256(text).hexdigest(),
        size=file.size,
    )


def build_header(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The first 8 + N bytes of a file with these tensors in this order, and where each one goes in that file.

    Compact JSON padded with spaces to a multiple of 8 bytes; metadata keys sorted, no `__metadata__` when it is None.
    ValueError for a dtype, shape or name that the format does not have.
    """
    table: dict[str, Any] = {}
    if metadata is not None:
        table[METADATA_KEY] = dict(sorted(metadata.items()))
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name!r}: no whole-byte safetensors dtype is called {dtype!r}")
        if name == METADATA_KEY or name in table or _name_problem(name) or min(shape, default=0) < 0:
            raise ValueError(f"tensor {name!r}, shape {shape}: repeated or unfit name, or a negative size")
        begin, end = end, end + prod(shape) * DTYPES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {}
    for name, dtype, shape in tensors:
        begin, end = table[name]["data_offsets"]
        entries[name] = Entry(name, dtype, tuple(shape), start + begin, end - begin)
    return len(text).to_bytes(8, "little") + text, entries


def release_order(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of the official files: larger elements first, then by name as text (layer 10 before layer 2)."""
    return sorted(tensors, key=lambda tensor: (-DTYPES[tensor[1]], tensor[0]))


def _bad(what: str, path: Path, found: object, expected: object, tensor: str | None = None) -> BadInput:
    return BadInput(what, file=path, tensor=tensor, found=found, expected=expected, remedy=REMEDY)


def _header_length(file: SourceFile) -> int:
    """N, once it is certain that N bytes of JSON follow; a file of another kind is named for what it is."""
    head = bytes(file.read(0, min(file.size, HEAD_BYTES)))
    length = int.from_bytes(head[:8], "little")
    kind = identify(head)
    if kind is not Kind.SAFETENSORS:
        remedy = "fetch the real file: git lfs pull" if kind is Kind.LFS_POINTER else "download the file again"
        if kind in EXECUTABLE:
            remedy = "pickles run code when they are opened and are never read; get the model as safetensors"
        raise BadInput(
            "not a safetensors file",
            file=file.path,
            found=kind.value if kind else f"a header length of {length} bytes, then {head[8:9]!r}",
            expected=f"a header length of at most {MAX_SAFETENSORS_HEADER} bytes, then a JSON object",
            remedy=remedy,
        )
    if length > file.size - 8:
        what = "the file is truncated: it ends inside its header"
        raise _bad(what, file.path, f"{file.size} bytes", f"at least {8 + length} bytes")
    return length


def _metadata(value: object, path: Path) -> dict[str, str]:
    """The `__metadata__` object: text to text and nothing else."""
    if not isinstance(value, dict):
        raise _bad(f"{METADATA_KEY} is not an object", path, type(value).__name__, "an object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _bad(f"a value in {METADATA_KEY} is not text", path, f"{key}: {type(text).__name__}", "text")
    return value


def _name_problem(name: str) -> str | None:
    """Why a text cannot be a tensor's name: control and direction-override characters would deceive who reads it."""
    if not name or len(name) > MAX_NAME:
        return f"{len(name)} characters"
    if not name.isprintable():
        return "unprintable characters"
    return "surrounding spaces" if name != name.strip() else None


def _entry(name: str, fields: Any, start: int, path: Path) -> Entry:
    """One tensor's entry; `start` is where the data begins in the file."""

    def bad(what: str, found: object, expected: str) -> BadInput:
        return _bad(what, path, found, expected, name)

    if problem := _name_problem(name):
        raise bad("a tensor's name is not acceptable", problem, f"1 to {MAX_NAME} printable characters")
    if not isinstance(fields, dict) or fields.keys() != FIELDS:
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise bad("a tensor's entry has the wrong fields", found, ", ".join(sorted(FIELDS)))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        packed = isinstance(dtype, str) and dtype in SUB_BYTE_DTYPES
        what = "a dtype smaller than a byte is not read" if packed else "the tensor's dtype is not known"
        raise bad(what, dtype, ", ".join(DTYPES))
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise bad("the tensor's shape is not acceptable", shape, f"at most {MAX_RANK} whole numbers below 2^63")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("the tensor's data_offsets are not acceptable", offsets, "[begin, end], whole numbers, begin <= end")
    # A zero elsewhere in the shape must not hide sizes that no address space holds.
    if prod(max(size, 1) for size in shape) * DTYPES[dtype] > MAX_INT:
        raise bad("the tensor's shape is impossibly large", shape, "a product below 2^63 bytes")
    nbytes = prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise bad("the tensor's data is not as long as its shape says", f"{offsets[1] - offsets[0]} bytes", f"{nbytes}")
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _whole_numbers(value: object) -> bool:
    """Whether a JSON value is a list of integers from 0 to 2^63 - 1; true, 1.0 and the like are no integers."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_INT for item in value)


def _check_packed(entries: Sequence[Entry], start: int, file: SourceFile) -> None:
    """The ranges, in order, follow each other from the header's end to the file's end."""
    end, before = start, "the header"
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps" if entry.offset < end else "leaves a hole after"
            what = f"the tensor's data {problem} what comes before it ({before})"
            raise _bad(what, file.path, f"byte {entry.offset}", f"byte {end}", entry.name)
        end, before = entry.offset + entry.nbytes, entry.name
        if end > file.size:
            what = "the file is truncated: it ends before this tensor's data does"
            raise _bad(what, file.path, f"{file.size} bytes", f"at least {end} bytes", entry.name)
    if end != file.size:
        raise _bad("bytes follow the last tensor", file.path, f"{file.size - end} bytes", "none")

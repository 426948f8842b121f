"""The header of a GGUF file, versions 2 and 3 little-endian: reading it safely, and building it. No tensor data here.

Layout of a file (`string` = u64 length in bytes, then the bytes; no terminator):

    magic "GGUF", u32 version, u64 number of tensors, u64 number of metadata keys
    per key:     string key, u32 value type, value
                 a scalar is stored as it is, a bool as one byte 0 or 1,
                 an array as u32 element type, u64 count, elements
    per tensor:  string name, u32 rank, u64 sizes (ne0, the contiguous one, first), u32 ggml type,
                 u64 offset in bytes from the start of the data
    zeros up to a multiple of the alignment (`general.alignment`, else 32): the start of the data
    per tensor:  its data, then zeros up to a multiple of the alignment (after the last tensor they may be missing)

Text is held as `str` decoded with `surrogateescape`: bytes that are not UTF-8 become lone surrogates, and encoding with
the same handler gives back the very bytes, so that a chat template or a token passes through unchanged.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES

from gptoss_convert.errors import BadInput, printable
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.sniff import HEAD_BYTES, sniff

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20

# A gpt-oss tokenizer takes 13 MB and 850,000 elements; the bounds leave room for a vocabulary four times as large and
# keep what a hostile header can ask for below a gigabyte of memory.
MAX_HEADER_BYTES = 128 << 20
MAX_ELEMENTS = 4 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 200_000
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml keeps 64 with the terminator
MAX_RANK = 4
MAX_INT = 2**63 - 1

REMEDY = "the file is truncated, damaged or made by a faulty tool; download it again and run verify"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# ggml type id -> its name, elements per block, bytes per block
_TYPES: dict[int, tuple[str, int, int]] = {int(t): (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}


class ValueType(IntEnum):
    """The types of metadata values, numbered as in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct codes of the scalars; a bool is read as a number so that bytes other than 0 and 1 can be refused.
_CODES: dict[ValueType, str] = dict(
    zip([t for t in ValueType if t not in (ValueType.STRING, ValueType.ARRAY)], "BbHhIifBQqd", strict=True)
)


@dataclass(frozen=True)
class Value:
    """A metadata value: int, float, bool or str, or for arrays a list of these, all of type `element_type`."""

    type: ValueType
    value: Any
    element_type: ValueType | None = None


def u16(value: int) -> Value:
    """A 16-bit unsigned value."""
    return Value(ValueType.UINT16, value)


def u32(value: int) -> Value:
    """A 32-bit unsigned value."""
    return Value(ValueType.UINT32, value)


def i32(value: int) -> Value:
    """A 32-bit signed value."""
    return Value(ValueType.INT32, value)


def u64(value: int) -> Value:
    """A 64-bit unsigned value."""
    return Value(ValueType.UINT64, value)


def f32(value: float) -> Value:
    """A 32-bit float, rounded at once so that it equals what is read back."""
    return Value(ValueType.FLOAT32, struct.unpack("<f", struct.pack("<f", value))[0])


def boolean(value: bool) -> Value:
    """A truth value."""
    return Value(ValueType.BOOL, value)


def string(value: str) -> Value:
    """Text; see the module's docstring for bytes that are not UTF-8."""
    return Value(ValueType.STRING, value)


def array(element_type: ValueType, values: Sequence[Any]) -> Value:
    """A list of values of one type; arrays of arrays are not supported."""
    return Value(ValueType.ARRAY, list(values), element_type)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ggml type id and name, shape with ne0 first, `offset` in bytes from the start of the file."""

    name: str
    type: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A whole header; tensors in file order; sizes in bytes. Without tensors `data_offset` may be beyond `size`."""

    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_offset: int
    size: int


def align(offset: int, alignment: int) -> int:
    """The next multiple of the alignment, in bytes."""
    return -(-offset // alignment) * alignment


def tensor_nbytes(type_id: int, shape: Sequence[int], *, file: object = None, tensor: str | None = None) -> int:
    """Bytes of a tensor of this ggml type and shape (ne0 first); BadInput if there can be no such tensor."""
    if type_id not in _TYPES:
        raise _bad("the tensor's ggml type is not known", file, f"type {type_id}", f"one of {list(_TYPES)}", tensor)
    _, block, block_bytes = _TYPES[type_id]
    if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1:
        raise _bad("the tensor's shape is not acceptable", file, shape, f"1 to {MAX_RANK} sizes, none zero", tensor)
    if shape[0] % block:
        what = "the tensor's rows are not whole blocks of its type"
        raise _bad(what, file, f"ne0 = {shape[0]}", f"a multiple of {block}", tensor)
    nbytes = prod(shape) // block * block_bytes
    if max(nbytes, prod(shape)) > MAX_INT:
        raise _bad("the tensor's shape is impossibly large", file, shape, "a product below 2^63", tensor)
    return nbytes


def read_header(file: SourceFile) -> GgufHeader:
    """The header of a GGUF file, every count and range checked; BadInput names the file and the tensor or key."""
    cursor = _Cursor(file)
    version, tensor_count, key_count = _preamble(cursor)
    metadata: dict[str, Value] = {}
    # The least that one takes: the length of its name, a type, one byte; for a tensor the rank, a size and an offset.
    cursor.check_count(key_count, 8 + 4 + 1, MAX_KEYS, "metadata keys")
    for _ in range(key_count):
        key = cursor.name(MAX_KEY_BYTES, "a metadata key")
        if key in metadata:
            raise _bad("a metadata key appears twice", file.path, key, "each key once")
        metadata[key] = _value(cursor, f"the metadata key {printable(key, 80)!r}")
    alignment = _alignment(metadata.get(ALIGNMENT_KEY), file.path)
    cursor.check_count(tensor_count, 8 + 4 + 8 + 4 + 8, MAX_TENSORS, "tensors")
    relative = [_tensor(cursor) for _ in range(tensor_count)]
    start = align(cursor.at, alignment)
    tensors = _place(relative, start, alignment, file)
    last = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=cursor.at)
    if file.size > align(last, alignment):
        most = f"at most {align(last, alignment)} bytes"
        raise _bad("bytes follow the last tensor", file.path, f"{file.size} bytes", most)
    return GgufHeader(version, metadata, tensors, alignment, start, file.size)


def build_header(
    metadata: Sequence[tuple[str, Value]],
    tensors: Sequence[tuple[str, int, tuple[int, ...]]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> tuple[bytes, list[TensorInfo]]:
    """The bytes of a version 3 file up to the start of its data, and where each tensor (name, type, shape) goes.

    Keys and tensors stay in the given order. An alignment other than 32 must also stand in the metadata. ValueError for
    what the format cannot hold, BadInput for an impossible type or shape.
    """
    keys, names = [key for key, _ in metadata], [name for name, _, _ in tensors]
    if len(set(keys)) < len(keys) or len(set(names)) < len(names):
        raise ValueError("a metadata key or a tensor name is given twice")
    if _alignment(dict(metadata).get(ALIGNMENT_KEY), None) != alignment:
        raise ValueError(f"alignment {alignment} does not agree with {ALIGNMENT_KEY} in the metadata")
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(len(tensors)), _U64.pack(len(metadata))]
    for key, value in metadata:
        _pack_string(parts, key, MAX_KEY_BYTES)
        _pack_value(parts, key, value)
    offset = 0
    placed: list[tuple[str, int, tuple[int, ...], int, int]] = []
    for name, type_id, shape in tensors:
        nbytes = tensor_nbytes(type_id, shape, tensor=name)
        _pack_string(parts, name, MAX_NAME_BYTES)
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset))
        placed.append((name, type_id, tuple(shape), offset, nbytes))
        offset = align(offset + nbytes, alignment)
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    return header, [_info(name, kind, shape, len(header) + at, nbytes) for name, kind, shape, at, nbytes in placed]


def _bad(what: str, file: object, found: object, expected: object, tensor: str | None = None) -> BadInput:
    return BadInput(what, file=file, tensor=tensor, found=found, expected=expected, remedy=REMEDY)


class _Cursor:
    """Reads a file from its start in growing steps; every length is checked before anything is allocated for it."""

    def __init__(self, file: SourceFile) -> None:
        self.path = file.path
        self.at = 0
        self.limit = min(file.size, MAX_HEADER_BYTES)
        self.elements_left = MAX_ELEMENTS
        self.buffer = bytearray()
        self._file = file

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` bytes, which are in the buffer afterwards; the position where they begin."""
        start, end = self.at, self.at + nbytes
        if end > self.limit:
            whole = self.limit == self._file.size
            problem = f"the file ends inside {what}" if whole else f"the header is too large: it does not end in {what}"
            raise _bad(problem, self.path, f"{nbytes} bytes from byte {start}", f"at most {self.limit} bytes in all")
        if end > len(self.buffer):
            target = min(self.limit, max(end, 2 * len(self.buffer), 1 << 16))
            self.buffer += self._file.read(len(self.buffer), target - len(self.buffer))
        self.at = end
        return start

    def u32(self, what: str) -> int:
        start = self.take(4, what)
        return int.from_bytes(self.buffer[start : self.at], "little")

    def u64(self, what: str) -> int:
        start = self.take(8, what)
        return int.from_bytes(self.buffer[start : self.at], "little")

    def check_count(self, count: int, least: int, limit: int, what: str) -> None:
        """A count of things of at least `least` bytes each, which must fit into what is left and into the limit."""
        most = min(limit, (self.limit - self.at) // least)
        if count > most:
            raise _bad(f"more {what} than the file can hold", self.path, count, f"at most {most}")

    def name(self, limit: int, what: str) -> str:
        """A key or a tensor's name: printable UTF-8 of 1 to `limit` bytes."""
        length = self.u64(what)
        if not 1 <= length <= limit:
            raise _bad(f"{what} has a bad length", self.path, length, f"1 to {limit} bytes")
        start = self.take(length, what)
        name = self.buffer[start : self.at].decode("utf-8", "surrogateescape")
        if not name.isprintable() or name != name.strip():
            raise _bad(f"{what} is not printable text", self.path, name, "printable UTF-8 without surrounding spaces")
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. Written for speed: a tokenizer has 650,000 of them."""
        buffer, at, unpack = self.buffer, self.at, _U64.unpack_from
        result = []
        for _ in range(count):
            if at + 8 > len(buffer):
                self.at = at
                self.take(8, what)
            end = at + 8 + unpack(buffer, at)[0]
            if end > len(buffer):
                self.at = at
                self.take(end - at, what)
            result.append(buffer[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        self.at = at
        return result


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys; other kinds of file and other byte orders are named."""
    start = cursor.take(min(HEAD_BYTES, cursor.limit), "the first bytes")
    head = bytes(cursor.buffer[start : cursor.at])
    if not head.startswith(MAGIC):
        raise _bad("not a GGUF file", cursor.path, sniff(head) or head[:4], f"{MAGIC!r} at the start")
    cursor.at = len(MAGIC)
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        remedy = "get the little-endian file: this one is for machines such as s390x"
        raise BadInput("a big-endian GGUF file is not read", file=cursor.path, expected="little-endian", remedy=remedy)
    if version not in (2, VERSION):
        raise _bad("this version of GGUF is not read", cursor.path, version, "2 or 3")
    return version, cursor.u64("the number of tensors"), cursor.u64("the number of metadata keys")


def _value(cursor: _Cursor, what: str) -> Value:
    """The value of a key; `what` names the key in errors."""
    kind = _value_type(cursor, what)
    if kind is ValueType.STRING:
        return Value(kind, cursor.strings(1, what)[0])
    if kind is not ValueType.ARRAY:
        return Value(kind, _scalars(cursor, kind, 1, what)[0])
    element = _value_type(cursor, what)
    if element is ValueType.ARRAY:
        raise _bad(f"{what} is an array of arrays", cursor.path, element.name, "an array of scalars or of strings")
    count = cursor.u64(what)
    width = 8 if element is ValueType.STRING else struct.calcsize("<" + _CODES[element])
    cursor.check_count(count, width, cursor.elements_left, f"elements in {what}")
    cursor.elements_left -= count
    many = cursor.strings(count, what) if element is ValueType.STRING else _scalars(cursor, element, count, what)
    return Value(kind, many, element)


def _value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.u32(what)
    if number >= len(ValueType):
        raise _bad(f"{what} has a type that is not known", cursor.path, number, "0 to 12")
    return ValueType(number)


def _scalars(cursor: _Cursor, kind: ValueType, count: int, what: str) -> list[Any]:
    """`count` scalars of one type."""
    code = f"<{count}{_CODES[kind]}"
    values = list(struct.unpack_from(code, cursor.buffer, cursor.take(struct.calcsize(code), what)))
    if kind is not ValueType.BOOL:
        return values
    if max(values, default=0) > 1:
        raise _bad(f"{what} is neither true nor false", cursor.path, max(values), "0 or 1")
    return [value == 1 for value in values]


def _alignment(value: Value | None, path: Path | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.value
    if value.type is not ValueType.UINT32 or number & (number - 1) or not 8 <= number <= MAX_ALIGNMENT:
        found, expected = f"{number} ({value.type.name})", f"a power of two from 8 to {MAX_ALIGNMENT} (UINT32)"
        raise _bad(f"{ALIGNMENT_KEY} is not acceptable", path, found, expected)
    return int(number)


def _info(name: str, type_id: int, shape: tuple[int, ...], offset: int, nbytes: int) -> TensorInfo:
    return TensorInfo(name, type_id, _TYPES[type_id][0], shape, offset, nbytes)


def _tensor(cursor: _Cursor) -> TensorInfo:
    """One tensor's description, its offset still relative to the start of the data."""
    name = cursor.name(MAX_NAME_BYTES, "a tensor's name")
    what = f"the description of the tensor {name!r}"
    rank = cursor.u32(what)
    if not 1 <= rank <= MAX_RANK:
        raise _bad("the tensor's rank is bad", cursor.path, rank, f"1 to {MAX_RANK}", name)
    code = f"<{rank}QIQ"
    *shape, type_id, offset = struct.unpack_from(code, cursor.buffer, cursor.take(struct.calcsize(code), what))
    nbytes = tensor_nbytes(type_id, shape, file=cursor.path, tensor=name)
    return _info(name, type_id, tuple(shape), offset, nbytes)


def _place(relative: Sequence[TensorInfo], start: int, alignment: int, file: SourceFile) -> dict[str, TensorInfo]:
    """The tensors with absolute offsets, each where the padded end of the one before it is, and inside the file."""
    tensors: dict[str, TensorInfo] = {}
    end = expected = 0
    for tensor in relative:
        problem = None
        if tensor.name in tensors:
            problem = "the tensor's name appears twice"
        elif tensor.offset % alignment:
            problem = f"the tensor's data is not aligned to {alignment} bytes"
        elif tensor.offset < end:
            problem = "the tensor's data overlaps or precedes the tensor before it"
        elif tensor.offset != expected:
            problem = "the tensor's data leaves a hole after the tensor before it"
        if problem:
            wanted = f"data byte {expected}, its name once"
            raise _bad(problem, file.path, f"data byte {tensor.offset}", wanted, tensor.name)
        end = tensor.offset + tensor.nbytes
        expected = align(end, alignment)
        if start + end > file.size:
            what = "the file is truncated: it ends before this tensor's data does"
            raise _bad(what, file.path, f"{file.size} bytes", f"at least {start + end} bytes", tensor.name)
        absolute = start + tensor.offset
        tensors[tensor.name] = _info(tensor.name, tensor.type, tensor.shape, absolute, tensor.nbytes)
    return tensors


def _pack_string(parts: list[bytes], text: str, limit: int) -> None:
    """Append a key or name."""
    data = text.encode()
    if not 1 <= len(data) <= limit or not text.isprintable() or text != text.strip():
        raise ValueError(f"{printable(text, 80)!r} cannot be a name of at most {limit} bytes in GGUF")
    parts += (_U64.pack(len(data)), data)


def _pack_value(parts: list[bytes], key: str, value: Value) -> None:
    """Append a value with its type."""
    element, many = value.type, [value.value]
    parts.append(_U32.pack(value.type))
    if value.type is ValueType.ARRAY:
        if value.element_type is None or value.element_type is ValueType.ARRAY:
            raise ValueError(f"{key}: an array needs a scalar or string element type")
        element, many = value.element_type, value.value
        parts += (_U32.pack(element), _U64.pack(len(many)))
    if element is ValueType.STRING:
        pack, append = _U64.pack, parts.append
        for text in many:
            data = text.encode("utf-8", "surrogateescape")
            append(pack(len(data)))
            append(data)
        return
    try:
        parts.append(struct.pack(f"<{len(many)}{'?' if element is ValueType.BOOL else _CODES[element]}", *many))
    except struct.error as error:
        raise ValueError(f"{key}: {error} for {element.name}") from error

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
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from gptoss_convert.errors import BadInput, printable
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf_cursor import Cursor
from gptoss_convert.formats.gguf_types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    MAX_RANK,
    SCALAR_CODES,
    VERSION,
    GgufHeader,
    TensorInfo,
    Value,
    ValueType,
    align,
    array,
    boolean,
    f32,
    i32,
    refusal,
    string,
    tensor_info,
    tensor_nbytes,
    u16,
    u32,
    u64,
)
from gptoss_convert.formats.sniff import HEAD_BYTES, sniff

__all__ = [
    "GgufHeader",
    "TensorInfo",
    "Value",
    "ValueType",
    "align",
    "array",
    "boolean",
    "build_header",
    "f32",
    "i32",
    "read_header",
    "string",
    "tensor_nbytes",
    "u16",
    "u32",
    "u64",
]

MAX_KEYS = 1 << 16
MAX_TENSORS = 200_000
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def read_header(file: SourceFile) -> GgufHeader:
    """The header of a GGUF file, every count and range checked; BadInput names the file and the tensor or key."""
    cursor = Cursor(file)
    version, tensor_count, key_count = _preamble(cursor)
    metadata: dict[str, Value] = {}
    # The least that one takes: the length of its name, a type, one byte; for a tensor the rank, a size and an offset.
    cursor.check_count(key_count, 8 + 4 + 1, MAX_KEYS, "metadata keys")
    for _ in range(key_count):
        key = cursor.name(MAX_KEY_BYTES, "a metadata key")
        if key in metadata:
            raise refusal("a metadata key appears twice", file.path, key, "each key once")
        metadata[key] = cursor.value(f"the metadata key {printable(key, 80)!r}")
    alignment = _alignment(metadata.get(ALIGNMENT_KEY), file.path)
    cursor.check_count(tensor_count, 8 + 4 + 8 + 4 + 8, MAX_TENSORS, "tensors")
    relative = [_tensor(cursor) for _ in range(tensor_count)]
    start = align(cursor.at, alignment)
    tensors = _place(relative, start, alignment, file)
    last = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=cursor.at)
    if file.size > align(last, alignment):
        most = f"at most {align(last, alignment)} bytes"
        raise refusal("bytes follow the last tensor", file.path, f"{file.size} bytes", most)
    return GgufHeader(version, metadata, tensors, alignment, start, file.size)


def header_bytes(metadata: Sequence[tuple[str, Value]], tensors: Sequence[tuple[str, int]]) -> int:
    """Bytes of a header before its padding, for tensors given as (name, dimensions): what `build_header` will need."""
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(0), _U64.pack(0)]
    for key, value in metadata:
        _pack_string(parts, key, MAX_KEY_BYTES)
        _pack_value(parts, key, value)
    return sum(map(len, parts)) + sum(8 + len(name.encode()) + 4 + 8 * rank + 4 + 8 for name, rank in tensors)


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
    return header, [
        tensor_info(name, kind, shape, len(header) + at, nbytes) for name, kind, shape, at, nbytes in placed
    ]


def _preamble(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys; other kinds of file and other byte orders are named."""
    start = cursor.take(min(HEAD_BYTES, cursor.limit), "the first bytes")
    head = bytes(cursor.buffer[start : cursor.at])
    if not head.startswith(MAGIC):
        raise refusal("not a GGUF file", cursor.path, sniff(head) or head[:4], f"{MAGIC!r} at the start")
    cursor.at = len(MAGIC)
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        remedy = "get the little-endian file: this one is for machines such as s390x"
        raise BadInput("a big-endian GGUF file is not read", file=cursor.path, expected="little-endian", remedy=remedy)
    if version not in (2, VERSION):
        raise refusal("this version of GGUF is not read", cursor.path, version, "2 or 3")
    return version, cursor.u64("the number of tensors"), cursor.u64("the number of metadata keys")


def _alignment(value: Value | None, path: Path | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.value
    if value.type is not ValueType.UINT32 or number & (number - 1) or not 8 <= number <= MAX_ALIGNMENT:
        found, expected = f"{number} ({value.type.name})", f"a power of two from 8 to {MAX_ALIGNMENT} (UINT32)"
        raise refusal(f"{ALIGNMENT_KEY} is not acceptable", path, found, expected)
    return int(number)


def _tensor(cursor: Cursor) -> TensorInfo:
    """One tensor's description, its offset still relative to the start of the data."""
    name = cursor.name(MAX_NAME_BYTES, "a tensor's name")
    what = f"the description of the tensor {name!r}"
    rank = cursor.u32(what)
    if not 1 <= rank <= MAX_RANK:
        raise refusal("the tensor's rank is bad", cursor.path, rank, f"1 to {MAX_RANK}", name)
    code = f"<{rank}QIQ"
    *shape, type_id, offset = struct.unpack_from(code, cursor.buffer, cursor.take(struct.calcsize(code), what))
    nbytes = tensor_nbytes(type_id, shape, file=cursor.path, tensor=name)
    return tensor_info(name, type_id, tuple(shape), offset, nbytes)


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
            raise refusal(problem, file.path, f"data byte {tensor.offset}", wanted, tensor.name)
        end = tensor.offset + tensor.nbytes
        expected = align(end, alignment)
        if start + end > file.size:
            what = "the file is truncated: it ends before this tensor's data does"
            raise refusal(what, file.path, f"{file.size} bytes", f"at least {start + end} bytes", tensor.name)
        absolute = start + tensor.offset
        tensors[tensor.name] = tensor_info(tensor.name, tensor.type, tensor.shape, absolute, tensor.nbytes)
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
        parts.append(struct.pack(f"<{len(many)}{'?' if element is ValueType.BOOL else SCALAR_CODES[element]}", *many))
    except struct.error as error:
        raise ValueError(f"{key}: {error} for {element.name}") from error

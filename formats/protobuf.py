"""Protocol buffers' wire format, as little of it as ONNX files need: messages as bytes, and bytes as bounded fields.

field    varint (number << 3 | wire), then
wire 0   varint: integers, negative ones as 64-bit two's complement
wire 1   8 bytes          wire 5   4 bytes: float32
wire 2   varint length, then so many bytes: text, bytes, messages
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gptoss_convert.errors import BadInput

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WORD_BITS = 64

Value = int | float | str | bytes


def varint(number: int) -> bytes:
    """An integer of 64 bits, seven bits a byte, lowest first."""
    number &= (1 << WORD_BITS) - 1
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: Value) -> bytes:
    """One field: int → varint, float → 4 bytes, text and bytes → length and bytes."""
    if isinstance(value, float):
        return varint(number << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | BYTES) + varint(len(data)) + data


def message(*fields: tuple[int, Value]) -> bytes:
    """A message of these fields, in this order."""
    return b"".join(field(number, value) for number, value in fields)


def fields(data: memoryview, where: object) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of an untrusted message: integers of varints, else the bytes, not copied."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at, where)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _read_varint(data, at, where)
            yield number, value
            continue
        if wire == BYTES:
            size, at = _read_varint(data, at, where)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise _broken(where, f"wire type {wire}")
        if size > len(data) - at:
            raise _broken(where, f"a field of {size} bytes where {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int, where: object) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _broken(where, "an integer that does not end")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & ((1 << WORD_BITS) - 1), at
    raise _broken(where, "an integer of more than ten bytes")


def _broken(where: object, found: str) -> BadInput:
    return BadInput("not a protocol buffer", file=where, found=found, remedy="the file is corrupt; fetch it again")

"""The parts of a GGUF header: metadata values, tensors and their sizes, and the numbers of the format.

Text is held as `str` decoded with `surrogateescape`: bytes that are not UTF-8 become lone surrogates, and encoding with
the same handler gives back the very bytes, so that a chat template or a token passes through unchanged.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Any

from gguf.constants import GGML_QUANT_SIZES

from gptoss_convert.errors import BadInput

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml keeps 64 with the terminator
MAX_RANK = 4
MAX_INT = 2**63 - 1

REMEDY = "the file is truncated, damaged or made by a faulty tool; download it again and run verify"

# ggml type id -> its name, elements per block, bytes per block
_TYPES: dict[int, tuple[str, int, int]] = {int(t): (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
# Newer than the gguf package's latest release, and run by llama.cpp since October 2026.
_TYPES.setdefault(42, ("Q2_0", 64, 2 + 16))


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
SCALAR_CODES: dict[ValueType, str] = dict(
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
        raise refusal("the tensor's ggml type is not known", file, f"type {type_id}", f"one of {list(_TYPES)}", tensor)
    _, block, block_bytes = _TYPES[type_id]
    if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1:
        raise refusal("the tensor's shape is not acceptable", file, shape, f"1 to {MAX_RANK} sizes, none zero", tensor)
    if shape[0] % block:
        what = "the tensor's rows are not whole blocks of its type"
        raise refusal(what, file, f"ne0 = {shape[0]}", f"a multiple of {block}", tensor)
    nbytes = prod(shape) // block * block_bytes
    if max(nbytes, prod(shape)) > MAX_INT:
        raise refusal("the tensor's shape is impossibly large", file, shape, "a product below 2^63", tensor)
    return nbytes


def tensor_info(name: str, type_id: int, shape: tuple[int, ...], offset: int, nbytes: int) -> TensorInfo:
    """A tensor of a known ggml type."""
    return TensorInfo(name, type_id, _TYPES[type_id][0], shape, offset, nbytes)


def refusal(what: str, file: object, found: object, expected: object, tensor: str | None = None) -> BadInput:
    """What is wrong with a GGUF file, with the usual remedy."""
    return BadInput(what, file=file, tensor=tensor, found=found, expected=expected, remedy=REMEDY)

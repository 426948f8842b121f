"""Rows of plain integers and their scales, as compressed-tensors' formats hold them; each row by itself.

    int4_g32      18 bytes for 32 values: scale (bf16), 16 bytes codes; byte j holds code 2j in its low and 2j+1 in its high
                  nibble; code = q + 8
    int8_g32      34 bytes for 32 values: scale (bf16), 32 bytes codes; code = q + 128
    int8_channel  4 + C bytes a row: scale (f32), C × int8, the q themselves

    value = scale · q,  −2^(b−1) ≤ q < 2^(b−1)

Files keep scales and codes in two tensors (`split`, `join`). The bytes of the codes are those of the int32 words there: the
first element in the lowest bits, words little-endian. A channel's scale is a bfloat16 value as well, so that a runtime that
casts it to the model's type computes with the same number. An MXFP4 value is q · 2^(scale − 128) with |q| ≤ 12: int8_g32
holds every one of them exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32, U8, bf16_to_f32, f32_to_bf16
from gptoss_convert.kernels.int_groups import int_encode
from gptoss_convert.kernels.mxfp4 import TWICE_E2M1

GROUP = 32
INT4_G32, INT8_G32 = (2, GROUP // 2), (2, GROUP)  # bytes of a group's scale and codes
CHANNEL_SCALE = 4  # bytes of a row's scale
# The same for the codecs of `signed_blocks`: a scale of 4 bytes.
_SCALE_BYTES = {
    "int4_g32": INT4_G32[0], "int8_g32": INT8_G32[0], "int8_channel": CHANNEL_SCALE,
    "int4_mm": 4, "int8_mm": 4, "int4_moe": 4, "int8_moe": 4,
}  # fmt: skip
_GROUP_BYTES = {
    "int4_g32": sum(INT4_G32), "int8_g32": sum(INT8_G32), "int4_mm": 20, "int4_moe": 20, "int8_mm": 36, "int8_moe": 36,
}  # of a channel: the row  # fmt: skip
_LEAST_BF16 = np.float32(2.0**-133)


def split(codec: str, rows: U8) -> tuple[U8, U8]:
    """Rows of a codec → the bytes of their scales [R, …] and of their codes [R, …], each contiguous."""
    groups = rows.reshape(len(rows), -1, _GROUP_BYTES.get(codec) or rows.shape[1])
    cut = _SCALE_BYTES[codec]
    scales, codes = (np.ascontiguousarray(part) for part in (groups[..., :cut], groups[..., cut:]))
    return scales.reshape(len(rows), -1), codes.reshape(len(rows), -1)


def join(codec: str, scales: U8, codes: U8) -> U8:
    """What `split` took apart."""
    count = scales.shape[1] // _SCALE_BYTES[codec]
    parts = [part.reshape(len(part), count, -1) for part in (scales, codes)]
    return np.concatenate(parts, axis=2).reshape(len(scales), -1)


def _pairs() -> NDArray[np.uint64]:
    """The two values of each byte of int4 codes, as one word."""
    codes = np.arange(256)
    values = np.stack([codes & 15, codes >> 4], axis=1) - 8
    return np.ascontiguousarray(values.astype(np.float32)).view(np.uint64)[:, 0]


_INT4 = _pairs()
_INT8 = np.arange(-128, 128).astype(np.float32)


def int4_g32_decode(rows: U8) -> F32:
    """uint8 [R, G·18] → f32 [R, G·32]."""
    scales, codes = split("int4_g32", rows)
    return _scaled(np.take(_INT4, codes).view(np.float32), bf16_to_f32(scales.view("<u2")))


def int8_g32_decode(rows: U8) -> F32:
    """uint8 [R, G·34] → f32 [R, G·32]."""
    scales, codes = split("int8_g32", rows)
    return _scaled(np.take(_INT8, codes), bf16_to_f32(scales.view("<u2")))


def int8_channel_decode(rows: U8) -> F32:
    """uint8 [R, 4 + C] → f32 [R, C]."""
    scales, codes = split("int8_channel", rows)
    return _scaled(codes.view(np.int8).astype(np.float32), scales.view("<f4"))


def int8_decode(rows: U8) -> F32:
    """Bare codes, uint8 [R, C] → f32 [R, C]: what a channel's scale multiplies."""
    return np.ascontiguousarray(rows).view(np.int8).astype(np.float32)


def _scaled(q: F32, scales: F32) -> F32:
    """q f32 [R, C] times scales [R, groups], in place; what overflows is found by who asks for finite values."""
    groups = q.reshape(*scales.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        groups *= scales[..., None]
    return q


def int4_g32_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·18], the search of `int_groups`."""
    q, scales = _search(values, 4, GROUP, importance)
    codes = (q + 8).astype(np.uint8)
    return join("int4_g32", f32_to_bf16(scales).view(np.uint8), codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4)))


def int8_g32_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·34]; what MXFP4 can hold comes back exactly."""
    q, scales = _search(values, 8, GROUP, importance)
    return join("int8_g32", f32_to_bf16(scales).view(np.uint8), q.view(np.uint8) ^ np.uint8(128))


def int8_channel_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, C] → uint8 [R, 4 + C]."""
    q, scales = _search(values, 8, values.shape[1], importance)
    return join("int8_channel", scales.view(np.uint8), q.view(np.uint8))


def _search(values: F32, bits: int, group: int, importance: F32 | None) -> tuple[NDArray[np.int8], F32]:
    """Codes int8 [R, C] and scales f32 [R, C/group] that bfloat16 holds."""
    found = int_encode(values, bits, group, "symmetric", "bf16", importance)
    codes, scales = found.codes, found.scales
    held = bf16_to_f32(f32_to_bf16(scales))
    tiny = held != scales  # below bfloat16's normal range, where it keeps fewer bits than the search reckons with
    if tiny.any():
        held = np.where(tiny, np.maximum(held, _LEAST_BF16), held).astype(np.float32)
        parts = np.ascontiguousarray(values).reshape(*scales.shape, group)[tiny]
        top = 2 ** (bits - 1)
        codes.reshape(*scales.shape, group)[tiny] = np.clip(np.rint(parts / held[tiny][:, None]), -top, top - 1)
        scales = held
    return codes, scales


# --- from MXFP4, exactly -----------------------------------------------------------------------------------------------


def _mxfp4_codes() -> NDArray[np.uint16]:
    """The two int8_g32 codes of each byte of a block: low nibble first."""
    byte = np.arange(256)
    q = TWICE_E2M1.astype(np.int64)
    both = np.stack([q[byte & 15], q[byte >> 4]], axis=1) + 128
    return np.ascontiguousarray(both.astype(np.uint8)).view(np.uint16)[:, 0]


def _mxfp4_scales() -> NDArray[Any]:
    """2^(byte − 128) in bfloat16, subnormal for 0 and 1; NaN for 255, which no finite block has."""
    power = np.ldexp(np.float32(1), np.arange(255) - 128).astype(np.float32)
    return np.append(power, np.float32(np.nan)).view(np.uint32) >> np.uint32(16)


_FROM_MXFP4 = _mxfp4_codes()
_SCALE_FROM_MXFP4 = _mxfp4_scales().astype("<u2")


def int8_g32_from_mxfp4(blocks: U8, scales: U8) -> U8:
    """Release order blocks [R, G, 16], scales [R, G] → uint8 [R, G·34], every value the same; a negative zero becomes zero."""
    held = np.take(_SCALE_FROM_MXFP4, scales)
    return join("int8_g32", held.view(np.uint8), mxfp4_to_codes(blocks))


def mxfp4_to_codes(blocks: U8) -> U8:
    """Blocks [R, G, 16] → uint8 [R, G·32]: twice the value of each code, plus 128."""
    return np.take(_FROM_MXFP4, blocks).view(np.uint8).reshape(len(blocks), -1)

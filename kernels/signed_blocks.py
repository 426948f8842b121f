"""Blocks of 32 unsigned integers with a float32 scale that may be negative: what ONNX Runtime's MatMulNBits and QMoE read.

    value = scale · (code − 2^(b−1))          code: 0 … 2^b − 1; scale: f32, then 16 or 32 bytes of codes, even element low

    codec      rule for the scale                                   codes
    int4_mm    the value of largest magnitude / −2^(b−1), sign and   value · (1/scale), halves away from zero: the
    int8_mm    all (of equals the negative one)                      quantizer of ONNX Runtime, bit for bit
    int4_moe   the same, the first of equals; then float16           value / scale before that rounding, halves to even: what
                                                                     onnxruntime-genai's builder writes, bit for bit
    int8_moe   of what MXFP4 can hold 2^(byte − 128), exactly        2 · E2M1 + 128
               of the rest a search (`int_groups`)                   the nearest

The extreme value of a block is held exactly by a signed scale. FIXED: the rules that leave the importance of columns out; it is
only checked. None of these codecs is for calibrated rounding (no grid, no gain), which the ONNX target refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import Unfit, prepare
from gptoss_convert.kernels.int_groups import int_encode
from gptoss_convert.kernels.int_rows import GROUP, join, mxfp4_to_codes, split
from gptoss_convert.kernels.mxfp4 import HALF_SCALE

INT4, INT8 = (4, GROUP // 2), (4, GROUP)  # bytes of a block's scale and codes
FIXED = ("int4_mm", "int8_mm", "int4_moe")
STEP_SLACK = 1e-3  # of a step, for the order of float32 operations
LEAST = np.float32(2.0**-23)  # the builder's scale of a block that has none worth the name
_F16_MAX = np.float32(65504)


def int4_decode(rows: U8) -> F32:
    """uint8 [R, G·20] → f32 [R, G·32]."""
    scales, codes = split("int4_mm", rows)
    return _scaled(scales, np.stack([codes & 15, codes >> 4], axis=-1), 8)


def int8_decode(rows: U8) -> F32:
    """uint8 [R, G·36] → f32 [R, G·32]."""
    scales, codes = split("int8_mm", rows)
    return _scaled(scales, codes, 128)


def _scaled(scales: U8, codes: U8, zero: int) -> F32:
    factors = scales.view("<f4")
    q = codes.reshape(*factors.shape, GROUP).astype(np.float32) - np.float32(zero)
    with np.errstate(over="ignore", invalid="ignore"):
        q *= factors[..., None]
    return q.reshape(len(scales), -1)


def first_astray(values: F32, codec: str, rows: U8) -> tuple[int, int] | None:
    """(row, column) of the first of values f32 [R, C] that a codec of FIXED cannot have put where `rows` hold it, or None.

    Rounding leaves a value within half a step; the top code alone also takes the extreme of the other sign, a step beyond it.
    """
    scales, codes = split(codec, rows)
    if codes.shape[1] < values.shape[1]:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(values.shape)
    half, float16 = (128 if codec == "int8_mm" else 8), codec == "int4_moe"
    found = int(_first_astray(np.ascontiguousarray(values, np.float32), scales.view("<f4"), codes, half, float16))
    return None if found < 0 else (found // values.shape[1], found % values.shape[1])


@njit(cache=True, nogil=True)
def _first_astray(values: Any, scales: Any, codes: Any, half: Any, float16: Any) -> Any:
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            scale, code = np.float64(scales[row, column // 32]), np.int64(codes[row, column])
            size = abs(scale)
            off = np.float64(values[row, column]) - scale * (code - half)
            if scale < 0:
                off = -off
            room = (0.5 + STEP_SLACK) * size
            if float16:
                room += half * max(size * 2.0**-11, 2.0**-25)  # codes were found with the scale before its rounding
            elif size <= 2.0**-126:
                room = half * ((1 + STEP_SLACK) * size + 2.0**-149)  # such a block becomes zeros
            above = room + 0.5 * size if code == 2 * half - 1 else room
            if not -room <= off <= above:
                return row * values.shape[1] + column
    return -1


def int4_mm_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·20]."""
    scales, codes = _runtime(values, importance, 4)
    return join("int4_mm", scales.view(np.uint8), _pairs(codes))


def int8_mm_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·36]."""
    scales, codes = _runtime(values, importance, 8)
    return join("int8_mm", scales.view(np.uint8), codes)


def int4_moe_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·20]; Unfit where float16 cannot hold a scale."""
    values = prepare(values, importance, GROUP)[0]
    blocks = values.reshape(len(values), -1, GROUP)
    at = np.abs(blocks).argmax(axis=2)[..., None]
    scales = np.take_along_axis(blocks, at, axis=2)[..., 0] / np.float32(-8)
    scales = np.where(np.abs(scales) < LEAST, LEAST, scales).astype(np.float32)
    if (np.abs(scales) > _F16_MAX).any():
        row, group = (int(i) for i in np.argwhere(np.abs(scales) > _F16_MAX)[0])
        column = group * GROUP + int(at[row, group, 0])
        raise Unfit(float(values[row, column]), row, column, "exceeds what a float16 scale can hold")
    codes = np.clip(np.rint(blocks / scales[..., None]), -8, 7) + np.float32(8)
    held = scales.astype(np.float16).astype("<f4")
    return join("int4_moe", held.view(np.uint8), _pairs(codes.astype(np.uint8).reshape(values.shape)))


def int8_moe_encode(values: F32, importance: F32 | None) -> U8:
    """f32 [R, G·32] → uint8 [R, G·36]; a block that MXFP4 can hold becomes what its MXFP4 form becomes."""
    values = prepare(values, importance, GROUP)[0]
    packed = mxfp4.encode(values)
    held = (mxfp4.decode(*packed) == values).reshape(len(values), -1, GROUP).all(axis=2)
    rows = int8_moe_from_mxfp4(*packed)
    if not held.all():
        found = int_encode(values, 8, GROUP, "symmetric", "f32", importance)
        codes = found.codes.view(np.uint8) ^ np.uint8(128)
        searched = join("int8_moe", found.scales.astype("<f4").view(np.uint8), codes)
        groups = (rows.reshape(*held.shape, -1), searched.reshape(*held.shape, -1))
        rows = np.where(held[..., None], *groups).reshape(rows.shape)
    return rows


def int8_moe_from_mxfp4(blocks: U8, scales: U8) -> U8:
    """Release order blocks [R, G, 16], scales [R, G] → uint8 [R, G·36], every value the same."""
    return join("int8_moe", HALF_SCALE[scales].astype("<f4").view(np.uint8), mxfp4_to_codes(blocks))


def _pairs(codes: U8) -> U8:
    return np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4)))


def _runtime(values: F32, importance: F32 | None, bits: int) -> tuple[F32, U8]:
    values = prepare(values, importance, GROUP)[0]
    blocks = values.reshape(-1, GROUP)
    scales, codes = np.empty(len(blocks), np.float32), np.empty(blocks.shape, np.uint8)
    _runtime_rule(blocks, np.float32(2 ** (bits - 1)), scales, codes)
    return scales.reshape(len(values), -1), codes.reshape(values.shape)


@njit(cache=True, nogil=True)
def _runtime_rule(blocks: Any, half: Any, scales: Any, codes: Any) -> None:
    most = half + half - np.float32(1)
    for b in range(blocks.shape[0]):
        low, high = blocks[b, 0], blocks[b, 0]
        for j in range(32):
            low, high = min(low, blocks[b, j]), max(high, blocks[b, j])
        scale = (high if abs(high) > abs(low) else low) / -half
        scales[b] = scale
        inverse = np.float32(1) / scale if abs(scale) > np.float32(2.0**-126) else np.float32(0)  # else it overflows
        for j in range(32):
            place = blocks[b, j] * inverse + half
            codes[b, j] = np.uint8(min(max(np.floor(place + np.float32(0.5)), np.float32(0)), most))

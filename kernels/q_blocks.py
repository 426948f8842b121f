"""ggml's Q8_0 and Q5_0: blocks of 32 integers that share one float16 scale.

    Q8_0, 34 bytes: d (f16), 32 × int8;                      value = d · q,        −128 ≤ q ≤ 127
    Q5_0, 22 bytes: d (f16), 4 bytes fifth bits, 16 bytes;   value = d · (q − 16),    0 ≤ q ≤ 31
          low nibbles: byte j holds element j in its low and j+16 in its high nibble; fifth bit of element j: bit j

An MXFP4 value is m · 2^(scale − 128) with an integer |m| ≤ 12, so an MXFP4 block *is* a Q8_0 or Q5_0 block whenever a
power of two can be found that float16 holds and that keeps the integers integers (`from_mxfp4`). ggml's own quantizers do
not look for it: they divide by amax/127 or amax/16 and lose 0.6 % (Q8_0) or 3.3 % (Q5_0), see benchmarks/codecs.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.mxfp4 import BLOCK, TWICE_E2M1

Q8_0_BYTES = 2 + BLOCK  # d, q
Q5_0_BYTES = 2 + BLOCK // 8 + BLOCK // 2  # d, fifth bits, nibbles

# Every power of two that float16 holds, subnormals included: 2^-24 … 2^15, by exponent + 24.
_F16_POWER = np.ldexp(np.float16(1), np.arange(-24, 16)).astype(np.float16).view(np.uint16)
_INTEGERS = TWICE_E2M1.astype(np.int32)


def q8_0_from_mxfp4(blocks: U8, scales: U8) -> tuple[U8, int]:
    """Release order blocks [R, G, 16], scales [R, G] → (uint8 [R, G·34], −1), or the flat index of the first block that
    Q8_0 cannot hold exactly in place of −1. A negative zero becomes zero.
    """
    return _from_mxfp4(blocks, scales, Q8_0_BYTES, 127)


def q5_0_from_mxfp4(blocks: U8, scales: U8) -> tuple[U8, int]:
    """The same for Q5_0: uint8 [R, G·22] and −1, or the flat index of the first block it cannot hold."""
    return _from_mxfp4(blocks, scales, Q5_0_BYTES, 15)


def _from_mxfp4(blocks: U8, scales: U8, block_bytes: int, largest: int) -> tuple[U8, int]:
    out = np.zeros((blocks.shape[0], blocks.shape[1] * block_bytes), np.uint8)
    return out, int(_transcode(blocks, scales, _INTEGERS, _F16_POWER, block_bytes, largest, out))


@njit(cache=True, nogil=True)
def _transcode(blocks: Any, scales: Any, integers: Any, power: Any, size: Any, largest: Any, out: Any) -> Any:
    q = np.empty(32, np.int32)
    for r in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            any_bits = np.int32(0)
            amax = np.int32(0)
            for j in range(16):
                byte = blocks[r, g, j]
                q[2 * j], q[2 * j + 1] = integers[byte & 15], integers[byte >> 4]
            for j in range(32):
                any_bits |= abs(q[j])
                amax = max(amax, abs(q[j]))
            exponent: Any = np.int64(scales[r, g]) - 128
            if amax == 0:
                exponent = 0  # a block of zeros; d is left at +0, which every reader takes for zero
            # Below float16's least power the integers must halve, above its largest they must double.
            while exponent < -24 and any_bits & 1 == 0:
                q >>= 1
                any_bits, amax, exponent = any_bits >> 1, amax >> 1, exponent + 1
            while exponent > 15 and 2 * amax <= largest:
                q <<= 1
                amax, exponent = 2 * amax, exponent - 1
            if exponent < -24 or exponent > 15 or amax > largest:
                return r * blocks.shape[1] + g
            at = g * size
            if amax:
                bits = power[exponent + 24]
                out[r, at], out[r, at + 1] = bits & np.uint16(255), bits >> np.uint16(8)
            if size == 34:
                for j in range(32):
                    out[r, at + 2 + j] = np.uint8(q[j] & 255)
            else:
                for j in range(32):
                    out[r, at + 2 + (j >> 3)] |= np.uint8((((q[j] + 16) >> 4) & 1) << (j & 7))
                for j in range(16):
                    out[r, at + 6 + j] = np.uint8(((q[j] + 16) & 15) | (((q[j + 16] + 16) & 15) << 4))
    return -1


def q8_0_decode(rows: U8) -> F32:
    """uint8 [R, G·34] → f32 [R, G·32]; bit-equal to ggml's dequantize_row_q8_0."""
    out = np.empty((rows.shape[0], rows.shape[1] // Q8_0_BYTES * BLOCK), np.float32)
    _q8_0_decode(rows, _scales(rows, Q8_0_BYTES), out)
    return out


def q5_0_decode(rows: U8) -> F32:
    """uint8 [R, G·22] → f32 [R, G·32]; bit-equal to ggml's dequantize_row_q5_0."""
    out = np.empty((rows.shape[0], rows.shape[1] // Q5_0_BYTES * BLOCK), np.float32)
    _q5_0_decode(rows, _scales(rows, Q5_0_BYTES), out)
    return out


def _scales(rows: U8, block_bytes: int) -> F32:
    heads = rows.reshape(rows.shape[0], -1, block_bytes)[:, :, :2]
    return np.ascontiguousarray(heads).view("<f2")[:, :, 0].astype(np.float32)


@njit(cache=True, nogil=True)
def _q8_0_decode(rows: Any, d: Any, out: Any) -> None:
    for r in range(d.shape[0]):
        for g in range(d.shape[1]):
            for j in range(32):
                out[r, g * 32 + j] = np.float32(np.int8(rows[r, g * 34 + 2 + j])) * d[r, g]


@njit(cache=True, nogil=True)
def _q5_0_decode(rows: Any, d: Any, out: Any) -> None:
    for r in range(d.shape[0]):
        for g in range(d.shape[1]):
            at = g * 22
            for j in range(32):
                fifth = (rows[r, at + 2 + (j >> 3)] >> (j & 7)) & 1
                low = (rows[r, at + 6 + (j & 15)] >> (4 if j >= 16 else 0)) & 15
                out[r, g * 32 + j] = np.float32(np.int32(low | (fifth << 4)) - 16) * d[r, g]


def q8_0_encode(values: F32) -> U8:
    """f32 [R, C], C a multiple of 32 → uint8 [R, C/32·34], by ggml's rule: d = amax/127 in f32, q = round(x / d) with
    halves away from zero, d stored as f16: infinite above 8.3 million, which callers check. Used for dense tensors;
    experts go through `q8_0_from_mxfp4`.
    """
    values = np.ascontiguousarray(values)
    rows, groups = values.shape[0], values.shape[1] // BLOCK
    d = np.abs(values).reshape(rows, groups, BLOCK).max(axis=2) / np.float32(127)
    out = np.empty((rows, groups, Q8_0_BYTES), np.uint8)
    with np.errstate(over="ignore"):
        out[:, :, :2] = d.astype("<f2").view(np.uint8).reshape(rows, groups, 2)
    _q8_0_round(values, d, out)
    return out.reshape(rows, -1)


@njit(cache=True, nogil=True)
def _q8_0_round(values: Any, d: Any, out: Any) -> None:
    for r in range(d.shape[0]):
        for g in range(d.shape[1]):
            inverse = np.float32(1) / d[r, g] if d[r, g] else np.float32(0)
            for j in range(32):
                scaled = values[r, g * 32 + j] * inverse
                rounded = np.int32(np.float64(abs(scaled)) + 0.5)  # in f32 the sum could round up
                out[r, g, 2 + j] = np.uint8((rounded if scaled >= 0 else -rounded) & 255)

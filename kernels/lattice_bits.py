"""The bits that ggml's IQ2 and IQ3 formats share: super-blocks of numbered lattice points, signs and scales ↔ values.

    value = ± (d · step) · (2·scale + 1) · point

What differs is where a format puts the bits (`iq2`, `iq3`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from gptoss_convert.kernels.floats import F32, U8, U16
from gptoss_convert.kernels.lattice import SUPER

# The formats that store 7 bits for 8 signs mean the eighth bit to make the number of negative ones even.
EVEN_SIGNS: U8 = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)


class Packed(NamedTuple):
    """R rows of B super-blocks: value = ± (d · step) · (2·scale + 1) · point. A format arranges the bits of these."""

    d: F32  # [R, B], float16's values
    scales: U8  # [R, B, parts], 0 … 15
    ids: U16  # [R, B, groups]: numbers of points
    signs: U8  # [R, B, 32]: bit i is set where value i of the eight is negative


class Rule(NamedTuple):
    """What of a format is not its lattice."""

    part: int  # so many values share a scale
    even: bool  # whether of eight values an even number is negative
    step: float
    pack: Callable[[Packed], U8]  # super-blocks → uint8 [R, B · bytes]


def expand(packed: Packed, found: F32, step: float) -> F32:
    """Super-blocks and the points f32 [N, axes] → values f32 [R, B·256]. Every product is exact in float32."""
    rows, blocks = packed.d.shape
    out = np.empty((rows, blocks * SUPER), np.float32)
    _expand(packed, found, np.float32(step), out)
    return out


@njit(cache=True, nogil=True)
def _expand(packed: Any, found: Any, step: Any, out: Any) -> None:
    axes = found.shape[1]
    share = packed.ids.shape[2] // packed.scales.shape[2]
    for r in range(packed.d.shape[0]):
        for b in range(packed.d.shape[1]):
            for p in range(packed.scales.shape[2]):
                scale = packed.d[r, b] * step * np.float32(2 * packed.scales[r, b, p] + 1)
                for g in range(p * share, (p + 1) * share):
                    at, point = b * 256 + g * axes, np.uint64(packed.ids[r, b, g])
                    bits = np.int32(packed.signs[r, b, g * axes >> 3]) >> np.int32(g * axes & 7)
                    for i in range(axes):
                        sign = np.float32(1 - 2 * ((bits >> i) & 1))
                        out[r, at + i] = scale * found[point, np.uint64(i)] * sign


def nibbles(scales: U8) -> U8:
    """4-bit numbers [R, B, N] → bytes [R, B, N/2], the even ones low."""
    return (scales[:, :, 0::2] | scales[:, :, 1::2] << 4).astype(np.uint8)


def from_nibbles(data: U8) -> U8:
    """Inverse of `nibbles`."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)


def sign_words(scales: U8, signs: U8) -> U8:
    """Scales [R, B, 8] and signs [R, B, 32], even in number → bytes [R, B, 8, 4]: 4 × 7 bits of signs, 4 bits of scale."""
    seven = (signs.reshape(*scales.shape, 4) & 127).astype("<u4")
    words = (seven << np.array([0, 7, 14, 21], "<u4")).sum(axis=-1, dtype="<u4") | scales.astype("<u4") << 28
    return np.ascontiguousarray(words[..., None], "<u4").view(np.uint8)


def from_sign_words(data: U8) -> tuple[U8, U8]:
    """Inverse of `sign_words`, from [R, B, 8, 4]."""
    words = np.ascontiguousarray(data).view("<u4")
    seven = words >> np.array([0, 7, 14, 21], "<u4") & 127
    return (words[..., 0] >> 28).astype(np.uint8), EVEN_SIGNS[seven].reshape(*data.shape[:2], 32)


def heads(rows: U8, block_bytes: int) -> tuple[F32, U8]:
    """Rows of super-blocks uint8 [R, B·bytes] → d f32 [R, B] and the blocks uint8 [R, B, bytes]."""
    blocks = rows.reshape(rows.shape[0], -1, block_bytes)
    return np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32), blocks


def join(d: F32, *fields: U8) -> U8:
    """d f32 [R, B] and fields uint8 [R, B, bytes] → uint8 [R, B·bytes], d first as float16."""
    head = np.ascontiguousarray(d[..., None], "<f2").view(np.uint8)
    return np.concatenate([head, *fields], axis=2).reshape(d.shape[0], -1)

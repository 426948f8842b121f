"""Sixty-four blocks side by side: the layout in which every block encoder searches.

A tile is f32 [N, 64]: row j holds element j of 64 consecutive blocks of N values. A sum over a block is then a sum over
the tile's rows, of each lane by itself and in one order; loops over the lanes vectorise without leave to reassociate, so
what a block encodes to depends neither on its neighbours nor on threads nor on the machine's vector width.

Every function here is compiled and works on the caller's arrays. `w` is a tile of importances, or None for all ones.
Loops over lanes write one array each: more, and the compiler's checks that they do not overlap keep it from vectorising.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LANES = 64
F0 = np.float32(0)
TINY = np.float32(1e-30)  # what is smaller divides to infinity; no float16 scale comes near it
F16_MAX = 65504.0
F16_LEAST = 2.0**-24  # the least positive float16; its subnormals are the multiples of it below 2^-14
_HALF_RANGE = np.float32(2.0**-14)
_SUBNORMAL = np.float32(0.75)  # adding it leaves float32 no bit below 2^-24
_KEEP_11 = np.float32(8193)  # 2^13 + 1
_LARGEST = np.float32(F16_MAX)
_LEAST = np.float32(F16_LEAST)
_KEEP_2 = np.float32(2**22 + 1)
_MAGIC = np.float32(12582912)  # 1.5 · 2^23: adding and subtracting it rounds to the nearest integer, ties to even

KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**KERNEL)
def nearest(value: Any) -> Any:
    """The nearest integer as f32, ties to even; |value| below 2^22."""
    return (value + _MAGIC) - _MAGIC


@njit(**KERNEL)
def f16(value: Any) -> Any:
    """A scale: the nearest float16, but never zero where the value is not, and the least one instead."""
    kept = f16_nearest(value)
    if kept == F0 and value != F0:
        return -_LEAST if value < F0 else _LEAST
    return kept


@njit(**KERNEL)
def f16_nearest(value: Any) -> Any:
    """The nearest float16, as f32 (ties either way); what exceeds the largest becomes the largest.

    Veltkamp's splitting (Dekker 1971) keeps 11 of float32's 24 bits; subnormals are rounded by an addition.
    """
    size = min(abs(value), _LARGEST)
    spread = size * _KEEP_11
    kept = spread - (spread - size)
    small = (size + _SUBNORMAL) - _SUBNORMAL
    size = small if size < _HALF_RANGE else kept
    return -size if value < F0 else size


@njit(**KERNEL)
def f16_bits(value: Any, bits: Any) -> Any:
    """Bits of a float16 that is given as f32 and by that f32's bits."""
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = abs(value)
    if size < _HALF_RANGE:
        return np.uint16(sign | np.uint32(size * np.float32(2.0**24)))
    return np.uint16(sign | (((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(13)) - np.uint32(112 << 10)))


@njit(**KERNEL)
def invert(d: Any, inverse: Any) -> None:
    """1/d of each lane, 0 for 0."""
    for k in range(LANES):
        inverse[k] = F0 if d[k] == F0 else np.float32(1) / d[k]


@njit(**KERNEL)
def take(error: Any, least: Any, source: Any, target: Any) -> None:
    """source → target in the lanes where error is below least."""
    for k in range(LANES):
        target[k] = source[k] if error[k] < least[k] else target[k]


@njit(**KERNEL)
def lower(error: Any, least: Any) -> None:
    """The smaller of the two, into least."""
    for k in range(LANES):
        least[k] = error[k] if error[k] < least[k] else least[k]


@njit(**KERNEL)
def gather(blocks: Any, first: Any, x: Any) -> None:
    """blocks f32 [B, N] → the tile of blocks `first` to `first` + 63; lanes past the last block are zero."""
    count = min(LANES, blocks.shape[0] - first)
    for k in range(count):
        for j in range(blocks.shape[1]):
            x[j, k] = blocks[first + k, j]
    if count < LANES:
        x[:, count:] = 0


@njit(**KERNEL)
def gather_cyclic(blocks: Any, first: Any, w: Any) -> None:
    """The same of importances f32 [G, N], one row's, which repeat every G blocks."""
    at = first % blocks.shape[0]
    for k in range(LANES):
        for j in range(blocks.shape[1]):
            w[j, k] = blocks[at, j]
        at = at + 1 if at + 1 < blocks.shape[0] else 0


@njit(**KERNEL)
def sizes(x: Any, size: Any) -> None:
    """The largest magnitude of each lane."""
    for k in range(LANES):
        size[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            size[k] = max(size[k], abs(x[j, k]))


@njit(**KERNEL)
def peaks(x: Any, size: Any, peak: Any) -> None:
    """The largest magnitude of each lane, and the first value that has it, with its sign."""
    for k in range(LANES):
        size[k] = F0
        peak[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            larger = abs(x[j, k]) > size[k]
            peak[k] = x[j, k] if larger else peak[k]
            size[k] = abs(x[j, k]) if larger else size[k]


@njit(**KERNEL)
def first_above(x: Any, limit: Any) -> Any:
    """The first lane that holds a magnitude above the limit, or −1."""
    found = False
    for j in range(x.shape[0]):
        for k in range(LANES):
            found |= abs(x[j, k]) > limit
    if found:
        for k in range(LANES):
            for j in range(x.shape[0]):
                if abs(x[j, k]) > limit:
                    return k
    return -1


@njit(**KERNEL)
def coarse(x: Any, flag: Any) -> Any:
    """Whether the first eight values of each lane have two significant bits at most, as MXFP4's have; any lane's answer.

    A cheap sieve for candidates that pay on such blocks alone; Veltkamp's splitting again, at two bits.
    """
    some = False
    for k in range(LANES):
        flag[k] = True
    for j in range(8):
        for k in range(LANES):
            spread = x[j, k] * _KEEP_2
            flag[k] &= spread - (spread - x[j, k]) == x[j, k]
    for k in range(LANES):
        some |= flag[k]
    return some


@njit(**KERNEL)
def bounds(x: Any, low: Any, high: Any) -> None:
    """The least and the largest value of each lane."""
    for k in range(LANES):
        low[k] = x[0, k]
        high[k] = x[0, k]
    for j in range(1, x.shape[0]):
        for k in range(LANES):
            low[k] = min(low[k], x[j, k])
            high[k] = max(high[k], x[j, k])

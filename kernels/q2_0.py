"""ggml's Q2_0: blocks of 64 values of 2 bits that share one float16 scale.

    18 bytes: d (float16), 16 bytes: element e in byte e // 4, bits 2·(e % 4) …;    value = d · (q − 1), q 0 … 3

The levels −d, 0, d, 2d are lopsided, so d may be negative. The encoder minimises Σ w (x − decoded)² of each block: the value
of largest magnitude is put at f for a list of f of both signs (beyond −1 … 2 it is clipped), each with the least-squares
scale of the integers that come of it; the best is refitted with importance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.block_search import by_gain, refit
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.lanes import (
    F16_MAX,
    KERNEL,
    LANES,
    f16_bits,
    gather,
    gather_cyclic,
    invert,
    nearest,
    peaks,
)

BLOCK = 64
BLOCK_BYTES = 18  # d, codes
LOW, HIGH = np.float32(-1), np.float32(2)
_FACTORS = np.array([-2, -2.5, -3.2, 2, 2.5, 1.6, 1], np.float32)  # minus where the largest value lands


def q2_0_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 64, importance f32 [C] or None → uint8 [R, C/64·18]; ValueError above 65504."""
    values, w, tile = prepare(values, importance, BLOCK)
    blocks = values.reshape(-1, BLOCK)
    out = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    rounds = 0 if importance is None else 1
    x, s, q = np.empty((BLOCK, LANES), np.float32), np.empty((7, LANES), np.float32), np.empty((BLOCK, LANES), np.uint8)
    bad = _encode(blocks, w, _FACTORS, rounds, np.float32(F16_MAX), x, tile, s, s.view(np.uint32), q, out)
    refuse_size(bad, values, BLOCK)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _encode(
    blocks: Any, importance: Any, factors: Any, rounds: Any, limit: Any,
    x: Any, w: Any, s: Any, words: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    best, inverse = s[2], s[3]
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        peaks(x, s[0], s[1])
        for k in range(LANES):
            if not s[0, k] <= limit:
                return first + k
        by_gain(x, w, factors, LOW, HIGH, s[1], best, inverse, s[4], s[5], s[6])
        refit(x, w, rounds, LOW, HIGH, best, inverse, s[4], s[5], s[6])
        invert(best, inverse)
        for j in range(64):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max(x[j, k] * inverse[k], LOW), HIGH)) - LOW)
        for j in range(16):
            for k in range(LANES):
                low, high = (
                    q[4 * j, k] | (q[4 * j + 1, k] << np.uint8(2)),
                    q[4 * j + 2, k] | (q[4 * j + 3, k] << np.uint8(2)),
                )
                q[j, k] = low | (high << np.uint8(4))
        for k in range(min(LANES, blocks.shape[0] - first)):
            word = f16_bits(best[k], words[2, k])
            out[first + k, 0], out[first + k, 1] = word & np.uint16(255), word >> np.uint16(8)
            for j in range(16):
                out[first + k, 2 + j] = q[j, k]
    return -1


def q2_0_decode(rows: U8) -> F32:
    """uint8 [R, G·18] → f32 [R, G·64]; bit-equal to ggml's dequantize_row_q2_0."""
    blocks = np.ascontiguousarray(rows).reshape(-1, BLOCK_BYTES)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0].astype(np.float32)
    out = np.empty((len(blocks), BLOCK), np.float32)
    _decode(blocks, d, out)
    return out.reshape(rows.shape[0], -1)


@njit(**KERNEL)
def _decode(blocks: Any, d: Any, out: Any) -> None:
    for b in range(blocks.shape[0]):
        for e in range(64):
            q = (blocks[b, 2 + (e >> 2)] >> (2 * (e & 3))) & 3
            out[b, e] = np.float32(np.int32(q) - 1) * d[b]

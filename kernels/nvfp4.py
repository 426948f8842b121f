"""NVFP4 as ggml stores it: blocks of 64 values of 4 bits (E2M1), a scale in E4M3 for each 16.

    36 bytes: 4 scales, then 8 bytes of nibbles a part: byte j holds element j low and j+8 high
    value = E2M1[code] · E4M3[scale]                       (times the tensor's own float32 scale, which is stored apart)

Scales are positive: codes 1 to 7 are multiples of 2^-9, 8 to 126 are (1 + mantissa/8) · 2^(exponent − 7) up to 448; 0 and
127 (NaN by OCP) decode to zero as in ggml, which ignores bit 7. A tensor's values divided by `tensor_scale` use the whole
range of scales; without one the weights of a language model fall among the coarse small scales, and blocks below 2^-12 become
zeros. Where llama.cpp's graph of an architecture multiplies no tensor scale in, as gpt-oss's does not, there is no way out:
`quant.encode` refuses what cannot be held.

The encoder tries, for each part, the E4M3 scales from just under amax/6 to past amax/4 and keeps the one that loses least
(Σ w (x − decoded)²). MXFP4-valued parts come back exactly where their power of two is an E4M3 scale: amax is then 4·2^k or
6·2^k of some power of two that is tried. What was decoded from NVFP4 encodes to the same values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels import e2m1
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.lanes import (
    F0,
    KERNEL,
    LANES,
    gather,
    gather_cyclic,
    sizes,
)
from gptoss_convert.kernels.mxfp4 import TWICE_E2M1

BLOCK = 64
PART = 16
BLOCK_BYTES = 36  # scales, nibbles
LARGEST = 6 * 448.0  # the largest magnitude that a part can hold


def _scales() -> NDArray[np.float32]:
    code = np.arange(256) & 127
    exponent, mantissa = code >> 3, code & 7
    scale = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    scale[code == 0] = scale[np.arange(256) == 127] = 0
    return scale.astype(np.float32)


SCALES = _scales()
# From amax/6 rounded down to a code: one below, itself, and past amax/4, which is less than six codes further. Below code 8
# scales stop halving, and all up to code 15 are tried.
_MOVES = np.array([0, 1, -1, 2, 3, 4, 5, 6, 7])
_MORE_MOVES = 7


def tensor_scale(amax: float) -> np.float32:
    """The power of two by which a tensor of largest magnitude `amax` is divided so that its blocks' scales stay below 448."""
    if not amax > 0:
        return np.float32(1)
    return np.float32(2.0 ** np.clip(np.ceil(np.log2(amax / LARGEST)), -126, 127))


def nvfp4_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 64, importance f32 [C] or None → uint8 [R, C/64·36].

    ValueError for magnitudes above 2688; the caller divides by `tensor_scale` first. Parts below 2^-12 become zero.
    """
    values, w, tile = prepare(values, importance, PART)
    parts = values.reshape(-1, PART)
    out = np.empty((len(parts) // 4, BLOCK_BYTES), np.uint8)
    x, s, q = np.empty((PART, LANES), np.float32), np.empty((4, LANES), np.float32), np.empty((PART, LANES), np.uint8)
    with np.errstate(divide="ignore"):
        inverses = np.where(SCALES > 0, 1 / SCALES, 0).astype(np.float32)
    bad = _encode(
        parts, w, _MOVES, SCALES, inverses, x, tile, s, s.view(np.uint32), np.empty((2, LANES), np.int64), q, out
    )
    refuse_size(bad, values, PART, "an E4M3 scale")
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _encode(
    parts: Any, importance: Any, moves: Any, scales: Any, inverses: Any,
    x: Any, w: Any, s: Any, words: Any, code: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    for first in range(0, parts.shape[0], LANES):
        gather(parts, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        sizes(x, s[0])
        for k in range(LANES):
            if not s[0, k] <= np.float32(LARGEST):
                return first + k
        _first_codes(s[0], words[0], code[0])
        few = code[0].min() < 8
        for i in range(moves.size + (_MORE_MOVES if few else 0)):
            move = moves[i] if i < moves.size else moves[-1] + i - moves.size + 1
            for k in range(LANES):
                trial = min(max(code[0, k] + move, 1), 126)
                s[1, k], s[3, k] = inverses[trial], scales[trial]
            e2m1.loss(x, w, s[1], s[2])
            for k in range(LANES):
                error = s[2, k] * s[3, k] * s[3, k]
                better = i == 0 or (error < s[0, k] and (i < moves.size or code[0, k] < 8))
                s[0, k] = error if better else s[0, k]
                code[1, k] = min(max(code[0, k] + move, 1), 126) if better else code[1, k]
        for k in range(LANES):
            s[1, k] = inverses[code[1, k]]
        e2m1.codes(x, s[1], q)
        _pack(q, code[1], first, min(LANES, parts.shape[0] - first), out)
    return -1


@njit(**KERNEL)
def _first_codes(size: Any, words: Any, code: Any) -> None:
    """The E4M3 code of size/6, rounded towards zero; in place of `size`."""
    for k in range(LANES):
        size[k] /= np.float32(6)
    for k in range(LANES):
        if size[k] < np.float32(2.0**-6):
            code[k] = np.int64(size[k] * np.float32(512))
        else:
            code[k] = np.int64(words[k] >> np.uint32(20)) - ((127 - 7) << 3)


@njit(**KERNEL)
def _pack(q: Any, code: Any, first: Any, count: Any, out: Any) -> None:
    for j in range(8):
        for k in range(LANES):
            q[j, k] |= q[j + 8, k] << np.uint8(4)
    for k in range(count):
        block, part = (first + k) // 4, (first + k) % 4
        empty = True
        for j in range(8):
            out[block, 4 + 8 * part + j] = q[j, k]
            empty &= q[j, k] == 0
        out[block, part] = 0 if empty else code[k]


def nvfp4_decode(rows: U8) -> F32:
    """uint8 [R, G·36] → f32 [R, G·64]; bit-equal to ggml's dequantize_row_nvfp4."""
    blocks = np.ascontiguousarray(rows).reshape(-1, BLOCK_BYTES)
    out = np.empty((len(blocks), BLOCK), np.float32)
    # Halved first: below the least normal float32 there is nothing, so the product with the doubled E2M1 is the same.
    _decode(blocks, SCALES * np.float32(0.5), TWICE_E2M1 + F0, out)
    return out.reshape(rows.shape[0], -1)


@njit(**KERNEL)
def _decode(blocks: Any, half_scale: Any, table: Any, out: Any) -> None:
    for b in range(blocks.shape[0]):
        for part in range(4):
            scale = half_scale[blocks[b, part]]
            for j in range(8):
                byte = blocks[b, 4 + 8 * part + j]
                out[b, 16 * part + j] = table[byte & 15] * scale
                out[b, 16 * part + j + 8] = table[byte >> 4] * scale

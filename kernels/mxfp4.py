"""MXFP4: blocks of 32 values of 4 bits (E2M1) that share one power-of-two scale (E8M0).

    value = E2M1[code] · 2^(scale − 127) = TWICE_E2M1[code] · 2^(scale − 128)

Two orders of the same nibbles exist. **Release** (OpenAI's and Hugging Face's): `blocks: uint8 [R, G, 16]`, byte j holds
element 2j in its low and 2j+1 in its high nibble; `scales: uint8 [R, G]` apart. **ggml**: 17 bytes a block, the scale
first, then byte j with element j low and element j+16 high. Between the two only bits move.

The plain numpy bodies (`decode_reference`, `to_ggml_reference`) are the specification; the compiled ones equal them, which
the tests check for all 16 codes × 256 scales. Scale byte 0 is 2^-127; 255 is NaN by OCP and corruption here: consumers
disagree about it and no release holds it (`first_bad_scale`).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels import e2m1
from gptoss_convert.kernels.floats import F32, U8, U16
from gptoss_convert.kernels.inputs import prepare
from gptoss_convert.kernels.lanes import KERNEL, LANES, gather, gather_cyclic, sizes

BLOCK = 32
CODE_BYTES = BLOCK // 2
GGML_BLOCK_BYTES = 1 + CODE_BYTES  # scale, codes

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
TWICE_E2M1 = 2 * E2M1  # integers: 0 1 2 3 4 6 8 12 and their negatives
HALF_SCALE = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)  # 2^(scale − 128); subnormal below 2
_INVERSE = np.ldexp(np.float32(1), 127 - np.arange(256)).astype(np.float32)  # 1 / 2^(scale − 127)
# Both nibbles of a byte at once: the compiled decoder reads one row of this a byte.
_PAIR = np.stack([TWICE_E2M1[np.arange(256) & 15], TWICE_E2M1[np.arange(256) >> 4]], axis=1).copy()

_LOW32 = np.uint64(0xFFFFFFFF)
_EVERY_4TH = np.uint64(0x0F0F0F0F0F0F0F0F)
_EVERY_8TH = np.uint64(0x00FF00FF00FF00FF)
_EVERY_16TH = np.uint64(0x0000FFFF0000FFFF)


def decode_reference(blocks: U8, scales: U8) -> F32:
    """Release order → values, as the formula above reads: blocks [..., G, 16], scales [..., G] → f32 [..., G·32]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    values = E2M1[codes] * np.ldexp(np.float64(1), scales.astype(int) - 127)[..., None]
    return cast(F32, values.astype(np.float32).reshape(*scales.shape[:-1], -1))


def to_ggml_reference(blocks: U8, scales: U8) -> U8:
    """Release order → ggml blocks: blocks [R, G, 16], scales [R, G] → uint8 [R, G·17]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], axis=-1).reshape(len(scales), -1)


def decode(blocks: U8, scales: U8) -> F32:
    """Release order → values: blocks [R, G, 16], scales [R, G] → f32 [R, G·32]. Exact; equals `decode_reference`."""
    out = np.empty((blocks.shape[0], blocks.shape[1] * BLOCK), np.float32)
    _decode(blocks, scales, HALF_SCALE, _PAIR, out)
    return out


@njit(cache=True, nogil=True)
def _decode(blocks: Any, scales: Any, half_scale: Any, pair: Any, out: Any) -> None:
    for r in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            scale = half_scale[scales[r, g]]
            for j in range(16):
                byte = blocks[r, g, j]
                out[r, g * 32 + 2 * j] = pair[byte, 0] * scale
                out[r, g * 32 + 2 * j + 1] = pair[byte, 1] * scale


def decode_bf16(blocks: U8, scales: U8) -> U16:
    """Release order → bits of bfloat16 [R, G·32], every zero positive; exact for scales up to 252."""
    out = np.empty((blocks.shape[0], blocks.shape[1] * BLOCK), np.uint16)
    row = np.empty(out.shape[1], np.float32)
    _decode_bf16(blocks, scales, HALF_SCALE, _PAIR + np.float32(0), row, row.view(np.uint32), out)
    return out


@njit(cache=True, nogil=True)
def _decode_bf16(blocks: Any, scales: Any, half_scale: Any, pair: Any, row: Any, bits: Any, out: Any) -> None:
    for r in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            scale = half_scale[scales[r, g]]
            for j in range(16):
                byte = blocks[r, g, j]
                row[g * 32 + 2 * j] = pair[byte, 0] * scale
                row[g * 32 + 2 * j + 1] = pair[byte, 1] * scale
        for i in range(out.shape[1]):
            out[r, i] = bits[i] >> np.uint32(16)


def to_ggml(blocks: U8, scales: U8) -> U8:
    """Release order → ggml blocks: blocks [R, G, 16], scales [R, G] → uint8 [R, G·17]. Bits move, values stay."""
    out = np.empty((blocks.shape[0], blocks.shape[1] * GGML_BLOCK_BYTES), np.uint8)
    _to_ggml(np.ascontiguousarray(blocks).view("<u8"), np.ascontiguousarray(scales), out)
    return out


@njit(inline="always")
def _spread(word: Any) -> Any:
    """Eight nibbles in the low half of a word → one nibble in each of its bytes."""
    word = (word | (word << np.uint64(16))) & _EVERY_16TH
    word = (word | (word << np.uint64(8))) & _EVERY_8TH
    return (word | (word << np.uint64(4))) & _EVERY_4TH


@njit(cache=True, nogil=True)
def _to_ggml(words: Any, scales: Any, out: Any) -> None:
    for r in range(words.shape[0]):
        for g in range(words.shape[1]):
            at = g * 17
            first, second = words[r, g, 0], words[r, g, 1]
            low = _spread(first & _LOW32) | (_spread(second & _LOW32) << np.uint64(4))
            high = _spread(first >> np.uint64(32)) | (_spread(second >> np.uint64(32)) << np.uint64(4))
            out[r, at] = scales[r, g]
            for j in range(8):
                out[r, at + 1 + j] = np.uint8(low >> np.uint64(8 * j))
            for j in range(8):
                out[r, at + 9 + j] = np.uint8(high >> np.uint64(8 * j))


def from_ggml(rows: U8) -> tuple[U8, U8]:
    """ggml blocks → release order: uint8 [R, G·17] → blocks [R, G, 16], scales [R, G]. Inverse of `to_ggml`."""
    groups = rows.shape[1] // GGML_BLOCK_BYTES
    blocks = np.empty((rows.shape[0], groups, CODE_BYTES), np.uint8)
    scales = np.empty((rows.shape[0], groups), np.uint8)
    _from_ggml(rows, blocks, scales)
    return blocks, scales


@njit(cache=True, nogil=True)
def _from_ggml(rows: Any, blocks: Any, scales: Any) -> None:
    for r in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            at = g * 17
            scales[r, g] = rows[r, at]
            for j in range(8):
                even, odd = rows[r, at + 1 + 2 * j], rows[r, at + 2 + 2 * j]
                blocks[r, g, j] = (even & np.uint8(15)) | (odd << np.uint8(4))
                blocks[r, g, j + 8] = (even >> np.uint8(4)) | (odd & np.uint8(240))


def first_bad_scale(blocks: U8, scales: U8) -> tuple[int, int] | None:
    """(row, group) of the first block that is not finite in float32, or None.

    That is scale 255, and 253 or 254 with a code whose magnitude then exceeds float32's range (OCP MX §5.3).
    """
    if int(scales.max(initial=0)) < 253:
        return None
    for row, group in np.argwhere(scales >= 253):
        with np.errstate(over="ignore"):
            largest = float(np.abs(decode_reference(blocks[row, group][None], scales[row, group][None])).max())
        if scales[row, group] == 255 or not np.isfinite(largest):
            return int(row), int(group)
    return None


def encode(values: F32, importance: F32 | None = None) -> tuple[U8, U8]:
    """Values f32 [R, C], C a multiple of 32, importance f32 [C] or None → blocks [R, C/32, 16], scales [R, C/32] in release
    order.

    A block's scale is the one of two that loses less (squared error): 2^⌊log2 amax⌋−2 (the largest value keeps its binade
    and may clip from 7 to 6) and the next above; ties take the smaller. With importance, which weighs the errors, the two
    next below are tried as well. Codes are the nearest, ties to the even code. Values that an MXFP4 block can hold come
    back exactly; a zero is +0, a block of zeros has scale 0. Finite values only, of any size.
    """
    values, w, tile = prepare(values, importance, BLOCK)
    rows, columns = values.shape
    blocks = np.empty((rows, columns // BLOCK, CODE_BYTES), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    moves = np.array((0, 1) if importance is None else (0, 1, -1, -2))
    x, s, q = np.empty((BLOCK, LANES), np.float32), np.empty((4, LANES), np.float32), np.empty((BLOCK, LANES), np.uint8)
    best = np.empty((2, LANES), np.int64)
    flat = values.reshape(-1, BLOCK)
    _encode(
        flat,
        w,
        moves,
        _INVERSE,
        x,
        tile,
        s,
        s.view(np.uint32),
        best,
        q,
        blocks.reshape(-1, CODE_BYTES),
        scales.reshape(-1),
    )
    return blocks, scales


@njit(**KERNEL)
def _encode(
    values: Any, importance: Any, moves: Any, inverses: Any, x: Any, w: Any, s: Any, words: Any, best: Any, q: Any,
    blocks: Any, scales: Any,
) -> None:  # fmt: skip
    for first in range(0, values.shape[0], LANES):
        gather(values, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        sizes(x, s[0])
        for k in range(LANES):
            # The exponent field is ⌊log2 amax⌋ + 127 (0 for subnormals, whose scale is 0 as well).
            best[0, k] = max(np.int64(words[0, k] >> np.uint32(23)) - 2, 0)
            best[1, k] = best[0, k]
        for move in moves:
            for k in range(LANES):
                s[1, k] = inverses[max(best[0, k] + move, 0)]
            e2m1.loss(x, w, s[1], s[2])
            for k in range(LANES):
                # Scale by scale the squared unit grows fourfold; at scale 0 a step down goes nowhere and gains nothing.
                error = s[2, k] * np.float32(4.0**move)
                better = move == 0 or (error < s[3, k] and best[0, k] + move >= 0)
                s[3, k] = error if better else s[3, k]
                best[1, k] = best[0, k] + move if better else best[1, k]
        for k in range(LANES):
            s[1, k] = inverses[best[1, k]]
        e2m1.codes(x, s[1], q)
        for j in range(16):
            for k in range(LANES):
                q[j, k] = q[2 * j, k] | (q[2 * j + 1, k] << np.uint8(4))
        for k in range(min(LANES, values.shape[0] - first)):
            scales[first + k] = best[1, k]
            for j in range(16):
                blocks[first + k, j] = q[j, k]


def nearest_reference(values: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    """Each value rounded to the nearest of E2M1 · 2^(scale − 127), by trying all sixteen; specifies `e2m1.magnitude`."""
    grid = E2M1.astype(np.float64) * 2.0 ** (scale - 127)
    # The stable sort order (mantissa 0 first) breaks ties towards even codes.
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7, 10, 12, 14, 9, 11, 13, 15])
    distance = np.abs(values[..., None] - grid[order])
    return cast(NDArray[np.float64], grid[order[np.argmin(distance, axis=-1)]])

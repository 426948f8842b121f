"""bfloat16, float16 and float32: bits ↔ values.

bfloat16 is the upper half of a float32 (1 sign, 8 exponent, 7 mantissa bits). Rounding to it is to nearest, ties to even
(the rule of torch and of ggml); NaN and infinity never reach these functions, see `first_nonfinite`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
_AT_ONCE = 1 << 16  # bit patterns looked at together: they fit a core's cache


def bf16_to_f32(bits: U16) -> F32:
    """Bits, any shape → values, same shape. Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@njit(cache=True, nogil=True)
def _round_bf16(bits: Any, out: Any) -> None:
    for i in range(bits.size):
        word = bits[i]
        out[i] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def f32_to_bf16(values: F32) -> U16:
    """Values, any shape → bits, same shape, rounded to nearest even. Finite values only."""
    flat = np.ascontiguousarray(values).reshape(-1)
    out = np.empty(flat.size, np.uint16)
    _round_bf16(flat.view(np.uint32), out)
    return out.reshape(values.shape)


def transpose(words: NDArray[Any]) -> NDArray[Any]:
    """[R, C] → contiguous [C, R], tile by tile so that neither side leaves the cache."""
    out = np.empty((words.shape[1], words.shape[0]), words.dtype)
    _transpose(words, out)
    return out


@njit(cache=True, nogil=True)
def _transpose(words: Any, out: Any) -> None:
    rows, columns = words.shape
    for top in range(0, rows, 64):
        for left in range(0, columns, 64):
            for r in range(top, min(top + 64, rows)):
                for c in range(left, min(left + 64, columns)):
                    out[c, r] = words[r, c]


def first_nonfinite(bits: NDArray[Any], kind: str) -> int:
    """Flat index of the first NaN or infinity among bit patterns of `kind` (bf16, f16, f32), or -1."""
    flat, mask = bits.reshape(-1), bits.dtype.type({"bf16": 0x7F80, "f16": 0x7C00, "f32": 0x7F800000}[kind])
    for start in range(0, flat.size, _AT_ONCE):
        exponents = flat[start : start + _AT_ONCE] & mask
        if exponents.max() == mask:  # vectorised, which finding the place is not
            return start + int(np.argmax(exponents == mask))
    return -1

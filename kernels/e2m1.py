"""Rounding to E2M1, the 4-bit float of MXFP4 and NVFP4, in the lanes of a tile (see `lanes`).

Magnitudes 0 ½ 1 1½ 2 3 4 6; below 2 they are ½ apart, below 4 1, above 2. Nearest, ties to the even code, clipped at 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lanes import F0, KERNEL, LANES

# 1.5 · 2^23 times the distance of neighbours: adding and subtracting it rounds to a multiple of that distance.
_HALVES, _ONES, _TWOS = np.float32(6291456), np.float32(12582912), np.float32(25165824)
_2, _4, _6 = np.float32(2), np.float32(4), np.float32(6)


@njit(**KERNEL)
def magnitude(size: Any) -> Any:
    """The nearest E2M1 magnitude to a finite size ≥ 0."""
    size = min(size, _6)
    magic = _HALVES if size < _2 else (_ONES if size < _4 else _TWOS)
    return (size + magic) - magic


@njit(**KERNEL)
def loss(x: Any, w: Any, inverse: Any, error: Any) -> None:
    """Σ w (|x|·inverse − its E2M1 magnitude)² of each lane, in squared units of the scale."""
    for k in range(LANES):
        error[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            size = abs(x[j, k]) * inverse[k]
            r = size - magnitude(size)
            error[k] += r * r if w is None else w[j, k] * r * r


@njit(**KERNEL)
def codes(x: Any, inverse: Any, q: Any) -> None:
    """The 4-bit codes uint8 [N, 64]: sign in bit 3, a zero without it."""
    for j in range(x.shape[0]):
        for k in range(LANES):
            m = magnitude(abs(x[j, k]) * inverse[k])
            code = np.int32(m + m if m < _2 else (m + _2 if m < _4 else np.float32(0.5) * m + _4))
            q[j, k] = code | (8 if x[j, k] < F0 and code > 0 else 0)

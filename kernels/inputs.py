"""What every encoder does first: refuse what no codec holds, and lay the importance of the columns out for tiles.

    values, w, tile = prepare(values, importance, part, block)     # ValueError where one is not finite, see `Unfit`
    refuse_size(bad, values, size)                                 # for the block that a search found to be too large

Importance counts within a block only, so each block's is scaled to a mean of 1. A block that has none at all is encoded as
if all its values mattered alike; so is a part of a block, at so little weight that the rest of the block pays nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.lanes import KERNEL, LANES

_LEAST_PART = 1e-9  # of the block's mean: the most important value of a part has this much at least
_EXPONENT = np.int32(0x7F800000)


class Unfit(ValueError):
    """A value that the codec cannot encode: `value` at `row` and `column` of what the encoder was given."""

    def __init__(self, value: float, row: int, column: int, why: str) -> None:
        super().__init__(f"{value:g} at row {row}, column {column} {why}")
        self.value, self.row, self.column = value, row, column

    @property
    def finite(self) -> bool:
        """Whether it is a number at all."""
        return bool(np.isfinite(self.value))


def prepare(
    values: F32, importance: F32 | None, part: int, block: int | None = None
) -> tuple[F32, F32 | None, F32 | None]:
    """Values f32 [R, C], importance f32 [C] or None → values, contiguous; importance [C/part, part]; a tile for it.

    `block`: the values that are encoded together, a multiple of `part` and by default just one. Unfit, or ValueError where
    an importance is negative or not finite.
    """
    values = np.ascontiguousarray(values, np.float32)
    require_finite(values)
    if importance is None:
        return values, None, None
    weights = importance.astype(np.float64)
    if not _scale(weights.reshape(-1, (block or part) // part, part)):
        raise ValueError("importance must be finite and not negative")
    return values, weights.astype(np.float32).reshape(-1, part), np.empty((part, LANES), np.float32)


def require_finite(values: F32) -> None:
    """Unfit for the first NaN or infinity of f32 [R, C], contiguous."""
    if not _all_finite(values.reshape(-1).view(np.int32)):
        row, column = divmod(int(np.argmin(np.isfinite(values))), values.shape[1])
        raise Unfit(float(values[row, column]), row, column, "is not a finite number")


@njit(**KERNEL)
def _all_finite(bits: NDArray[np.int32]) -> Any:
    bad = False
    for i in range(bits.size):
        bad |= bits[i] & _EXPONENT == _EXPONENT
    return not bad


@njit(**KERNEL)
def _scale(weights: Any) -> Any:
    """f64 [blocks, parts, N] to a mean of 1 each block, in place; False if one is negative or not finite."""
    for block in weights:
        mean = 0.0
        for part in block:
            for v in part:
                if not 0 <= v < np.inf:
                    return False
                mean += v
        mean /= block.size
        for part in block:
            most = 0.0
            for k in range(part.size):
                part[k] = part[k] / mean if mean > 0 else 1.0
                most = max(most, part[k])
            if most < _LEAST_PART:
                for k in range(part.size):
                    part[k] = part[k] / most * _LEAST_PART if most > 0 else _LEAST_PART
    return True


def refuse_size(block: int, values: F32, size: int, scale: str = "a float16 scale") -> None:
    """Raise Unfit for the block (by its flat index, or −1 for none) whose values exceed what its scale can hold."""
    if block < 0:
        return
    row, column = divmod(block * size, values.shape[1])
    column += int(np.argmax(np.abs(values[row, column : column + size])))
    raise Unfit(float(values[row, column]), row, column, f"exceeds what {scale} can hold")

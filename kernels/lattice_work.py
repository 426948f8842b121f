"""One super-block of 256 values on its way to a lattice: scratch, loading, evaluation at given scales, exact recovery.

The parts of `lattice_fit`, which says what they are for. All functions but `new_work` are compiled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.lanes import KERNEL, f16
from gptoss_convert.kernels.lattice import search

SCALES = 16
F1 = np.float32(1)


class Work(NamedTuple):
    """Scratch of one super-block; arrays of 256 are axis by axis, see `lattice`."""

    t: F32  # [256] magnitudes, negative where a sign had to turn
    w: F32  # [256]
    y: F32  # [256] t / scale, then the points
    ids: NDArray[np.int32]  # [64]
    kept: NDArray[np.int32]  # [64] the best so far
    round: NDArray[np.int32]  # [64] the best of a round
    signs: U8  # [32]
    flip: NDArray[np.int32]  # [32] which of the eight values turned, or −1
    cells: NDArray[np.int32]  # [64]
    table: F32  # [2048]
    group: F32  # [2, 64] Σ w t p and Σ w p² of a group
    part: F32  # [10, 16] what the steps keep of each part
    choice: F32  # [40]
    scales: NDArray[np.int32]  # [3, 16] now, the best so far, the best of a round


def new_work() -> Work:
    def i32(*shape: int) -> NDArray[np.int32]:
        return np.zeros(shape, np.int32)

    def f32(*shape: int) -> F32:
        return np.zeros(shape, np.float32)

    return Work(
        f32(256), f32(256), f32(256), i32(64), i32(64), i32(64), np.zeros(32, np.uint8), i32(32),
        i32(64), f32(2048), f32(2, 64), f32(10, 16), f32(40), i32(3, 16),
    )  # fmt: skip


@njit(inline="always")
def entry(i: Any, wide: Any) -> Any:
    """Where value i of the super-block stands axis by axis; `wide`: 8 axes."""
    return (i & 7) * 32 + (i >> 3) if wide else (i & 3) * 64 + (i >> 2)


@njit(**KERNEL)
def load(x: Any, w: Any, grid: Any, even: Any, exponent: Any, work: Any) -> None:
    """Magnitudes scaled by 2^-exponent, signs, and step 1. Leaves ones in work.w, as `recover` wants it."""
    wide = grid.points.shape[1] == 8
    scale = math.ldexp(1.0, -exponent)
    work.w[:] = 1
    for h in range(32):
        bits: Any = 0
        turned, least = -1, np.float32(np.inf)
        for i in range(8):
            at = entry(8 * h + i, wide)
            value = np.float32(np.float64(x[8 * h + i]) * scale)
            bits |= np.int64(value < 0) << i
            work.t[at] = abs(value)
            cost = w[at] * abs(value)
            turned = i if cost < least else turned
            least = min(cost, least)
        odd = (0x6996 >> ((bits ^ bits >> 4) & 15)) & 1  # 0x6996: the parity of each number of four bits
        work.flip[h] = turned if even and odd else -1
        if even and odd:
            work.t[entry(8 * h + turned, wide)] *= -F1
            bits ^= 1 << turned
        work.signs[h] = bits


@njit(**KERNEL)
def evaluate(grid: Any, part: Any, scale: Any, work: Any) -> None:
    """Nearest points of all groups at the scale of each part → work.ids, and the parts' sums Σ w t p, Σ w p² → part[0:2]."""
    axes = grid.points.shape[1]
    groups, share = 256 // axes, part // axes
    t, w, y, xp, pp = work.t, work.w, work.y, work.group[0], work.group[1]
    for p in range(256 // part):
        xp[p * share : (p + 1) * share] = F1 / scale[p]
    for i in range(axes):
        for g in range(groups):
            y[i * groups + g] = t[i * groups + g] * xp[g]
    search(y, w, grid, work.cells, work.table, work.ids)
    for g in range(groups):
        point = np.uint64(work.ids[g])
        for i in range(axes):
            y[i * groups + g] = grid.points[point, np.uint64(i)]
    xp[:] = 0
    pp[:] = 0
    for i in range(axes):
        for g in range(groups):
            v = w[i * groups + g] * y[i * groups + g]
            xp[g] += v * t[i * groups + g]
            pp[g] += v * y[i * groups + g]
    for p in range(256 // part):
        first, second = np.float32(0), np.float32(0)
        for g in range(p * share, (p + 1) * share):
            first += xp[g]
            second += pp[g]
        work.part[0, p], work.part[1, p] = first, second


@njit(**KERNEL)
def recover(peak: Any, grid: Any, part: Any, unit: Any, products: Any, work: Any) -> Any:
    """d if the super-block is exactly d · unit · odd · point throughout (step 0), its points and scales kept; else 0."""
    share = part // grid.points.shape[1]
    for product in products:
        exact = peak / product / unit
        d = np.float64(f16(np.float32(exact)))
        if d != exact:
            continue
        fits = True
        for i in range(256):
            multiple = work.t[i] / (d * unit)
            if multiple == 0 or multiple != np.rint(multiple):
                fits = False
                break
        if not fits:
            continue
        solved = 0
        work.scales[1, :] = -1
        for k in range(16):
            scale = work.part[2]
            scale[:] = np.float32(d * unit * (2 * k + 1))
            evaluate(grid, part, scale, work)
            solved += _keep_exact(grid, share, scale[0], k, work)
        if solved == 256 // part:
            return d
    return 0.0


@njit(**KERNEL)
def _keep_exact(grid: Any, share: Any, scale: Any, k: Any, work: Any) -> Any:
    """Keep the parts whose every value is its point times the scale; how many are new. work.y holds the points."""
    groups, found = 256 // grid.points.shape[1], 0
    for p in range(groups // share):
        same = work.scales[1, p] < 0
        for g in range(p * share, (p + 1) * share):
            for i in range(grid.points.shape[1]):
                same = same and work.t[i * groups + g] == scale * work.y[i * groups + g]
        if same:
            work.scales[1, p], found = k, found + 1
            work.kept[p * share : (p + 1) * share] = work.ids[p * share : (p + 1) * share]
    return found

"""The compiled part of `gptq_lattice`: one super-block of all rows, 32 rows side by side.

Arrays are [position, row]: position j of a super-block is its column `inside[j]`, a row is one of 32 lanes, and every loop
over lanes stands for itself, so that what a row becomes depends on no other. Eight positions, an *octet*, are searched at
once: one group of IQ2 or two of IQ3, laid out for `lattice.search` with the 32 rows as its groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.lanes import f16
from gptoss_convert.kernels.lattice import SUPER, search

LANES = 32
OCTET = 8
_FAST: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
_F0, _F1 = np.float32(0), np.float32(1)
I32 = NDArray[np.int32]


class Made(NamedTuple):
    """What 32 rows of a super-block are rounded to, by position."""

    error: F32  # [256, 32] in units of U_jj
    ids: I32  # [2, 32, 32]: numbers of an octet's first and second points
    signs: I32  # [32, 32]: of an octet
    scales: I32  # [16, 32]: of a part
    d: F32  # [32]
    loss: F32  # [32]: Σ error²


class Work(NamedTuple):
    """Scratch of 32 rows."""

    x: F32  # [256, 32]: the columns as they have become
    part: F32  # [32, 32]: those of a part at one of its scales
    y: F32  # [256] magnitudes over the scale, as `lattice.search` wants them
    w: F32  # [256]
    cells: I32  # [64]
    table: F32  # [2048]
    ids: I32  # [64]
    negative: I32  # [8, 32]
    point: F32  # [8, 32]: the points' coordinates, then with signs
    odd: I32  # [32]: whether the number of an octet's negative values is
    turned: I32  # [32]: which of an octet's signs is turned to make their number even, or −1
    cost: F32  # [32]: what the turn costs
    least: F32  # [32]: the least loss of a part
    scale: F32  # [32]
    inverse: F32  # [32]
    ones: F32  # [32]
    better: NDArray[np.bool_]  # [32]
    trial: Made
    now: Made  # the best of each part
    best: Made  # the best with any d


def new_work() -> Work:
    """Room for one thread's LANES rows."""

    def i32(*shape: int) -> I32:
        return np.zeros(shape, np.int32)

    def f32(*shape: int) -> F32:
        return np.zeros(shape, np.float32)

    def made() -> Made:
        return Made(f32(SUPER, LANES), i32(2, 32, LANES), i32(32, LANES), i32(16, LANES), f32(LANES), f32(LANES))

    return Work(
        f32(SUPER, LANES), f32(32, LANES), f32(SUPER), f32(SUPER), i32(64), f32(2048), i32(64), i32(OCTET, LANES),
        f32(OCTET, LANES), i32(LANES), i32(LANES), f32(LANES), f32(LANES), f32(LANES), f32(LANES),
        np.ones(LANES, np.float32), np.zeros(LANES, np.bool_), made(), made(), made(),
    )  # fmt: skip


@njit(**_FAST)
def round_block(
    left: Any, u: Any, weight: Any, inside: Any, given: Any, block: Any, grid: Any, part: Any, even: Any, step: Any,
    offsets: Any, factors: Any, work: Any, out: Any, error: Any,
) -> None:  # fmt: skip
    """A super-block of R rows, left f32 [R, 256] by position, its scales given as a `Packed` of one → `out`, error [R, 256]."""
    best, now = work.best, work.now
    for first in range(0, left.shape[0], LANES):
        count = min(LANES, left.shape[0] - first)
        for turn in range(factors.size):
            work.x[:], now.d[:], now.loss[:], work.trial.scales[:] = 0, 0, 0, 0
            for k in range(count):
                d = given.d[first + k, 0]
                now.d[k] = f16(d * factors[turn]) if d != _F0 else _F0
                for j in range(256):
                    work.x[j, k] = left[first + k, j]
            for start in range(0, 256, part):
                p = start // part
                for t in range(offsets.size):
                    for k in range(count):
                        own = np.int32(given.scales[first + k, 0, inside[start] // part])
                        work.trial.scales[p, k] = min(max(own + offsets[t], 0), 15)
                    _round_part(u, weight, start, part, even, step, grid, work)
                    for k in range(LANES):
                        work.better[k] = t == 0 or work.trial.loss[k] < work.least[k]
                        work.least[k] = work.trial.loss[k] if work.better[k] else work.least[k]
                    _keep(work.better, start, part, part, work.trial, now)
                for k in range(LANES):
                    now.loss[k] += work.least[k]
                _feed(u, start, start + part, now.error, work.x, 256, 0)
            for k in range(LANES):
                work.better[k] = turn == 0 or now.loss[k] < best.loss[k]
            _keep(work.better, 0, 256, part, now, best)
            for k in range(LANES):
                best.loss[k] = now.loss[k] if work.better[k] else best.loss[k]
                best.d[k] = now.d[k] if work.better[k] else best.d[k]
        _write(first, count, inside, part, best, block, out, error)


@njit(**_FAST)
def _round_part(u: Any, weight: Any, start: Any, part: Any, even: Any, step: Any, grid: Any, work: Any) -> None:
    """Positions `start` to `start + part` with the scales of work.trial, the errors passed on within the part."""
    trial, x = work.trial, work.part
    for k in range(LANES):
        work.scale[k] = work.now.d[k] * step * np.float32(2 * trial.scales[start // part, k] + 1)
    for k in range(LANES):
        work.inverse[k] = _F1 / work.scale[k] if work.scale[k] != _F0 else _F0
    x[:part] = work.x[start : start + part]
    loss = work.trial.loss
    loss[:] = 0
    for at in range(0, part, OCTET):
        _round_octet(at, start + at, weight, even, grid, work)
        for i in range(OCTET):
            j = start + at + i
            unit = _F1 / u[j, j]
            error = trial.error[j]
            for k in range(LANES):
                error[k] = (x[at + i, k] - work.point[i, k] * work.scale[k]) * unit
            for k in range(LANES):
                loss[k] += error[k] * error[k]
            for later in range(at + i + 1, at + OCTET):
                share = u[j, start + later]
                for k in range(LANES):
                    x[later, k] -= error[k] * share
        _feed(u, start + at, start + at + OCTET, trial.error, x, start + part, start)


@njit(inline="always")
def _place(i: Any, wide: Any) -> Any:
    """Where column i of an octet begins in y; `wide`: one group of 8 axes, else two of 4."""
    return i * 32 if wide else (i & 3) * 64 + (i >> 2) * 32


@njit(**_FAST)
def _round_octet(at: Any, position: Any, weight: Any, even: Any, grid: Any, work: Any) -> None:
    """Eight columns of work.part from `at` on → their points and signs in work.trial, and the product of both in work.point."""
    wide = grid.points.shape[1] == 8
    y, negative, odd, turned, cost = work.y, work.negative, work.odd, work.turned, work.cost
    odd[:], turned[:], cost[:] = 0, -1, np.inf
    for i in range(OCTET):
        place, importance = _place(i, wide), weight[position + i]
        work.w[place : place + LANES] = importance
        for k in range(LANES):
            y[place + k] = abs(work.part[at + i, k]) * work.inverse[k]
        for k in range(LANES):
            negative[i, k] = work.part[at + i, k] < _F0
        if even:
            for k in range(LANES):
                odd[k] ^= negative[i, k]
            _cheaper(i, importance, y[place : place + LANES], work.ones, cost, turned)
    if even:
        for k in range(LANES):
            if odd[k]:
                y[_place(turned[k], wide) + k] *= -_F1
    search(y, work.w, grid, work.cells, work.table, work.ids)
    for i in range(OCTET):
        second = 0 if wide else (i >> 2) * 32
        for k in range(LANES):
            work.point[i, k] = grid.points[np.uint64(work.ids[second + k]), np.uint64(i if wide else i & 3)]
    _choose_signs(position, weight, even, wide, work)
    ids = work.trial.ids
    for k in range(LANES):
        ids[0, position >> 3, k] = work.ids[k]
    for k in range(LANES):
        ids[1, position >> 3, k] = work.ids[32 + k]


@njit(**_FAST)
def _choose_signs(position: Any, weight: Any, even: Any, wide: Any, work: Any) -> None:
    """Signs of an octet whose points are known → work.trial, and onto work.point; the one that turns is the cheapest."""
    negative, turned, signs = work.negative, work.turned, work.trial.signs[position >> 3]
    if even:
        work.cost[:] = np.inf
        for i in range(OCTET):
            place = _place(i, wide)
            _cheaper(i, weight[position + i], work.y[place : place + LANES], work.point[i], work.cost, turned)
        for k in range(LANES):
            turned[k] = turned[k] if work.odd[k] else -1
    signs[:] = 0
    for i in range(OCTET):
        for k in range(LANES):
            negative[i, k] ^= np.int32(turned[k] == i)
        for k in range(LANES):
            signs[k] |= negative[i, k] << np.int32(i)
        for k in range(LANES):
            work.point[i, k] = -work.point[i, k] if negative[i, k] else work.point[i, k]


@njit(inline="always")
def _cheaper(i: Any, importance: Any, size: Any, point: Any, cost: Any, turned: Any) -> None:
    """Let sign i be the one that turns where that costs less, importance · |y| · point."""
    for k in range(LANES):
        here = importance * abs(size[k]) * point[k]
        turned[k] = np.int32(i) if here < cost[k] else turned[k]
        cost[k] = min(here, cost[k])


@njit(**_FAST)
def _feed(u: Any, start: Any, stop: Any, error: Any, x: Any, end: Any, first: Any) -> None:
    """Positions `stop` to `end`, in x from `first` on, make up for the errors of `start` to `stop`."""
    for later in range(stop, end):
        target = x[later - first]
        for j in range(start, stop, 8):
            u0, u1, u2, u3 = u[j, later], u[j + 1, later], u[j + 2, later], u[j + 3, later]
            u4, u5, u6, u7 = u[j + 4, later], u[j + 5, later], u[j + 6, later], u[j + 7, later]
            for k in range(LANES):
                target[k] -= (
                    u0 * error[j, k] + u1 * error[j + 1, k] + u2 * error[j + 2, k] + u3 * error[j + 3, k]
                    + u4 * error[j + 4, k] + u5 * error[j + 5, k] + u6 * error[j + 6, k] + u7 * error[j + 7, k]
                )  # fmt: skip


@njit(**_FAST)
def _keep(better: Any, start: Any, count: Any, part: Any, source: Any, target: Any) -> None:
    """Of `count` positions what was made, for the lanes where it is better."""
    for j in range(start, start + count):
        for k in range(LANES):
            target.error[j, k] = source.error[j, k] if better[k] else target.error[j, k]
    for h in range(start >> 3, (start + count) >> 3):
        for k in range(LANES):
            target.signs[h, k] = source.signs[h, k] if better[k] else target.signs[h, k]
        for k in range(LANES):
            target.ids[0, h, k] = source.ids[0, h, k] if better[k] else target.ids[0, h, k]
        for k in range(LANES):
            target.ids[1, h, k] = source.ids[1, h, k] if better[k] else target.ids[1, h, k]
    for p in range(start // part, (start + count) // part):
        for k in range(LANES):
            target.scales[p, k] = source.scales[p, k] if better[k] else target.scales[p, k]


@njit(**_FAST)
def _write(first: Any, count: Any, inside: Any, part: Any, made: Any, block: Any, out: Any, error: Any) -> None:
    """What was made, at the columns that the positions are."""
    each = out.ids.shape[2] // 32
    for k in range(count):
        row = first + k
        out.d[row, block] = made.d[k]
        for p in range(256 // part):
            out.scales[row, block, inside[p * part] // part] = made.scales[p, k]
        for h in range(32):
            octet = inside[8 * h] >> 3
            out.signs[row, block, octet] = made.signs[h, k]
            for i in range(each):
                out.ids[row, block, octet * each + i] = made.ids[i, h, k]
        for j in range(256):
            error[row, j] = made.error[j, k]

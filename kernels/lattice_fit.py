"""Encoding super-blocks of 256 values to a lattice (`lattice`): IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

    value = ± (d · step) · (2·scale + 1) · point      d: float16, one a super-block; scale: 0 … 15, one a part of 16 or 32
                                                      point: of a group of 8 or 4; ±: 8 bits a group of 8, or 7 (`even`)

Minimised is Σ w (x − decoded)² over each super-block, w the column's importance or 1:

0. a super-block that was decoded from the same format comes back exactly (`lattice_work.recover`);
1. where the number of negative signs must be even and is odd, the magnitude with the least w·|x| counts as negative;
2. each part by itself, with a real scale: its peak at several places of the levels' range, nearest points, least-squares
   scale, and the best of them again nearest points and scale, twice (Lloyd); between, with the points known, the sign
   that turns becomes the one with the least w·|x|·point, which is what it costs;
3. d so that these scales are closest to odd multiples of d · step, by the quadratic model of each part's loss;
4. for this d the true loss of each part at the nearest scale and at the next nearest; d refitted by least squares to all
   points at once, rounded to float16, and the nearest scales again; the round that loses less is kept.

Everything is scaled by a power of two to a peak of ½ … 1 first, so that neither subnormal nor huge values lose bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.lanes import F16_LEAST, F16_MAX, KERNEL, f16, nearest
from gptoss_convert.kernels.lattice import SUPER, Grid
from gptoss_convert.kernels.lattice_bits import Packed
from gptoss_convert.kernels.lattice_work import F1, SCALES, entry, evaluate, load, new_work, recover

ROUNDS = 2
_TINY = np.float32(1e-20)
# Relative to the mean: what has no importance at all is still encoded as well as the rest allows.
_LEAST_WEIGHT = np.float32(1e-9)
# Where the peak of a part may lie, in units of the highest level. With all signs free a fourth
# place gains less than 1 % and costs 12 % of the speed.
_PEAKS = np.array([0.65, 0.85, 1.05], np.float32)
_PEAKS_EVEN = np.array([0.6, 0.8, 1.0, 1.2], np.float32)
# Odd multiples of d · step at which the largest scale may lie, and between them.
_MULTIPLES = (33.5 - 0.5 * np.arange(40)).astype(np.float32)


def fit(values: F32, importance: F32 | None, grid: Grid, part: int, even: bool, step: float) -> Packed:
    """Values f32 [R, C], finite, C a multiple of 256; importance f32 [C] or None; `part` values share a scale.

    ValueError names row and column of a value beyond what a float16 d can reach.
    """
    rows, blocks, axes = values.shape[0], values.shape[1] // SUPER, grid.points.shape[1]
    values, scaled, _ = prepare(values, importance, SUPER)
    w = np.ones((blocks, SUPER), np.float32) if scaled is None else np.maximum(scaled, _LEAST_WEIGHT)
    w = np.ascontiguousarray(w.reshape(blocks, -1, axes).transpose(0, 2, 1)).reshape(blocks, SUPER)
    out = Packed(
        np.zeros((rows, blocks), np.float32),
        np.zeros((rows, blocks, SUPER // part), np.uint8),
        np.zeros((rows, blocks, SUPER // axes), np.uint16),
        np.zeros((rows, blocks, SUPER // 8), np.uint8),
    )
    products = np.unique(np.outer(grid.levels.astype(np.float64), 2 * np.arange(SCALES) + 1))
    limit = F16_MAX * step * products[-1]
    peaks = _PEAKS_EVEN if even else _PEAKS
    bad = _fit(values, w, grid, part, even, step, products, limit, peaks, _MULTIPLES, new_work(), out)
    refuse_size(int(bad), values, SUPER)
    return out


@njit(**KERNEL)
def _fit(
    values: Any, weights: Any, grid: Any, part: Any, even: Any, step: Any, products: Any, limit: Any,
    peaks: Any, multiples: Any, work: Any, out: Any,
) -> Any:  # fmt: skip
    for r in range(values.shape[0]):
        for b in range(weights.shape[0]):
            x = values[r, b * 256 : (b + 1) * 256]
            peak = np.float32(0)
            for i in range(256):
                peak = max(peak, abs(x[i]))
            if peak > limit:
                return r * weights.shape[0] + b
            if peak == 0:
                continue
            exponent = math.frexp(np.float64(peak))[1]
            load(x, weights[b], grid, even, exponent, work)
            unit = math.ldexp(step, -exponent)  # of d, in the scale of t
            d = recover(math.ldexp(np.float64(peak), -exponent), grid, part, unit, products, work)
            if d == 0:
                work.w[:] = weights[b]
                _fit_parts(grid, part, even, peaks, work)
                d = _fit_scales(grid, part, unit, multiples, work)
            if d != 0:
                out.d[r, b] = d
                out.signs[r, b] = work.signs
                for g in range(out.ids.shape[2]):
                    out.ids[r, b, g] = work.kept[g]
                for k in range(out.scales.shape[2]):
                    out.scales[r, b, k] = work.scales[1, k]
    return -1


@njit(**KERNEL)
def _fit_parts(grid: Any, part: Any, even: Any, peaks: Any, work: Any) -> None:
    """Step 2 → part[3]: scale, part[4]: Σ w p² there, part[5]: what it takes off the loss."""
    axes = grid.points.shape[1]
    groups, parts, share = 256 // axes, 256 // part, part // axes
    xp, pp, trial, scale, weight, gain, high = (
        work.part[0], work.part[1], work.part[2], work.part[3], work.part[4], work.part[5], work.part[6],
    )  # fmt: skip
    high[:] = _TINY
    for p in range(parts):
        for i in range(axes):
            for g in range(p * share, (p + 1) * share):
                high[p] = max(high[p], work.t[i * groups + g])
    scale[:], weight[:], gain[:] = 0, 0, 0
    for turn in range(peaks.size + 2):
        for p in range(parts):
            if turn < peaks.size:
                trial[p] = high[p] * peaks[turn] / grid.levels[-1]
            else:
                trial[p] = max(scale[p], _TINY)
        evaluate(grid, part, trial, work)
        for p in range(parts):
            if xp[p] > 0 and xp[p] * xp[p] > gain[p] * pp[p]:
                scale[p], weight[p], gain[p] = xp[p] / pp[p], pp[p], xp[p] * xp[p] / pp[p]
        if even and turn == peaks.size:
            _turn_cheapest(axes == 8, work)


@njit(**KERNEL)
def _first_unit(parts: Any, multiples: Any, work: Any) -> Any:
    """Step 3: d · unit as a real number."""
    scale, weight = work.part[3], work.part[4]
    widest = np.float32(0)
    for p in range(parts):
        widest = max(widest, scale[p])
    work.choice[:] = 0
    for p in range(parts):
        for c in range(multiples.size):
            u = widest / multiples[c]
            odd = min(max(nearest((scale[p] / u - F1) * np.float32(0.5)), np.float32(0)), np.float32(15))
            miss = scale[p] - u * (np.float32(2) * odd + F1)
            work.choice[c] += weight[p] * miss * miss
    return widest / multiples[np.argmin(work.choice)]


@njit(**KERNEL)
def _fit_scales(grid: Any, part: Any, unit: Any, multiples: Any, work: Any) -> Any:
    """Steps 3 and 4: d, 0 where zeros lose no more; points and scales kept."""
    parts, share = 256 // part, part // grid.points.shape[1]
    best, least = 0.0, 0.0
    real = _first_unit(parts, multiples, work) / unit
    if real < 0.25 * F16_LEAST:
        return best  # even the least d is too large
    d = np.float64(f16(np.float32(real)))
    for turn in range(ROUNDS):
        u = np.float32(d * unit)
        work.part[7, :] = np.inf
        for second in range(2 if turn == 0 else 1):
            for p in range(parts):
                real = (work.part[3, p] / u - F1) * np.float32(0.5)
                level = nearest(min(max(real, np.float32(0)), np.float32(15)))
                if second:
                    level += F1 if real > level else -F1
                work.scales[0, p] = np.int32(min(max(level, np.float32(0)), np.float32(15)))
                work.part[2, p] = u * np.float32(2 * work.scales[0, p] + 1)
            evaluate(grid, part, work.part[2], work)
            _keep_better(parts, share, work)
        loss, px, pp = 0.0, 0.0, 0.0
        for p in range(parts):
            odd = np.float64(2 * work.scales[2, p] + 1)
            loss += work.part[7, p]
            px += odd * work.part[8, p]
            pp += odd * odd * work.part[9, p]
        if loss < least:
            least, best = loss, d
            work.scales[1], work.kept[:] = work.scales[2], work.round
        refitted = np.float64(f16(np.float32(max(px, 0.0) / pp / unit)))
        if refitted in (d, 0.0):
            break
        d = refitted
    return best


@njit(**KERNEL)
def _keep_better(parts: Any, share: Any, work: Any) -> None:
    """Of each part the points, scale and sums in this round, where its loss (less the constant Σ w t²) is the least yet."""
    for p in range(parts):
        scale, xp, pp = work.part[2, p], work.part[0, p], work.part[1, p]
        loss = scale * (scale * pp - np.float32(2) * xp)
        if loss < work.part[7, p]:
            work.part[7, p], work.part[8, p], work.part[9, p] = loss, xp, pp
            work.scales[2, p] = work.scales[0, p]
            work.round[p * share : (p + 1) * share] = work.ids[p * share : (p + 1) * share]


@njit(**KERNEL)
def _turn_cheapest(wide: Any, work: Any) -> None:
    """Where a sign had to turn, turn the one that costs least while the points stay: 4 w |t| p. work.y holds the points."""
    for h in range(32):
        if work.flip[h] < 0:
            continue
        found, least = 0, np.inf
        for i in range(8):
            at = entry(8 * h + i, wide)
            cost = np.float64(work.w[at] * abs(work.t[at]) * work.y[at])
            if cost < least:
                found, least = i, cost
        for change in (np.int64(work.flip[h]), np.int64(found)):  # the same one twice changes nothing
            work.t[entry(8 * h + change, wide)] *= -F1
            work.signs[h] ^= np.uint8(1 << change)
        work.flip[h] = found

"""The scale of a block of integers, and its minimum where it has one: the searches of `legacy_blocks` and `q2_0`.

Arguments as in `lane_sums`. Losses are Σ w (x − decoded)² of each lane; scales and minima come out as float16 holds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lane_sums import affine_error, affine_sums, means, symmetric_error, symmetric_sums
from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, TINY, f16, f16_nearest, invert, lower, take

_NEXT = np.float32(0.75 * 2**-10)  # of a float16: moves it to the next one


@njit(**KERNEL)
def by_gain(
    x: Any, w: Any, factors: Any, low: Any, high: Any, peak: Any, best: Any, inverse: Any, most: Any, qx: Any, qq: Any
) -> None:
    """The candidates −peak/f, each with its least-squares scale qx/qq: the loss is Σ w x² − qx²/qq."""
    most[:] = F0
    for k in range(LANES):
        best[k] = peak[k] / low
    for i in range(factors.size):
        factor = -factors[i]
        for k in range(LANES):
            inverse[k] = factor / peak[k] if abs(peak[k]) > TINY else F0
        symmetric_sums(x, w, inverse, low, high, qx, qq)
        for k in range(LANES):
            qq[k] = qx[k] / qq[k] if qq[k] > F0 else F0
        for k in range(LANES):
            qx[k] *= -qq[k]  # least first, as losses are
        take(qx, most, qq, best)
        lower(qx, most)
    for k in range(LANES):
        best[k] = f16(best[k])


@njit(**KERNEL)
def refit(
    x: Any, w: Any, rounds: Any, low: Any, high: Any, best: Any, inverse: Any, least: Any, d: Any, qq: Any
) -> None:
    """Least squares again for the integers of the best scale as float16 holds it; kept where it loses less."""
    if rounds == 0:
        return
    invert(best, inverse)
    symmetric_error(x, w, best, inverse, low, high, least)
    for _ in range(rounds):
        invert(best, inverse)
        symmetric_sums(x, w, inverse, low, high, d, qq)
        for k in range(LANES):
            d[k] = f16(d[k] / qq[k]) if qq[k] > F0 else best[k]
        invert(d, inverse)
        symmetric_error(x, w, d, inverse, low, high, qq)
        take(qq, least, d, best)
        lower(qq, least)


@njit(**KERNEL)
def by_loss(
    x: Any,
    w: Any,
    factors: Any,
    low: Any,
    high: Any,
    peak: Any,
    best: Any,
    inverse: Any,
    least: Any,
    d: Any,
    error: Any,
) -> None:
    """The candidates −peak/f as float16 holds them, judged as they are."""
    least[:] = np.float32(np.inf)
    for i in range(factors.size):
        factor = -factors[i]
        for k in range(LANES):
            d[k] = f16(peak[k] / factor)
        invert(d, inverse)
        symmetric_error(x, w, d, inverse, low, high, error)
        take(error, least, d, best)
        lower(error, least)


@njit(**KERNEL)
def search_symmetric(
    x: Any, w: Any, factors: Any, rounds: Any, bits: Any, low: Any, high: Any, peak: Any,
    best: Any, inverse: Any, least: Any, d: Any, error: Any,
) -> None:  # fmt: skip
    """The best scale of each lane."""
    if bits == 8:  # losses are too small beside Σ w x² to be told by a difference
        by_loss(x, w, factors, low, high, peak, best, inverse, least, d, error)
        refit(x, w, 1, low, high, best, inverse, least, d, error)
    else:
        by_gain(x, w, factors, low, high, peak, best, inverse, least, d, error)
        refit(x, w, rounds, low, high, best, inverse, least, d, error)


@njit(**KERNEL)
def all_zero(loss: Any, flag: Any) -> Any:
    result = True
    for k in range(LANES):
        result &= flag[k] and loss[k] == F0
    return result


@njit(**KERNEL)
def search_affine(
    x: Any, w: Any, factors: Any, rounds: Any, high: Any, low: Any, top: Any, best: Any, base: Any, inverse: Any, s: Any
) -> None:
    """Scale `best` and offset `base` of LANES blocks side by side, so that base + best · q, 0 ≤ q ≤ high, is nearest to x by w.

    Starts from each of `factors` (steps between the extremes, shift of the lower one), then refits `rounds` times.
    """
    start, least, sw, sv, q1, qx, qq, d, mean, a, b, loss = (
        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11],
    )  # fmt: skip
    means(x, w, low, sw, sv)
    least[:] = np.float32(np.inf)
    for i in range(factors.shape[0] + rounds):
        if i >= factors.shape[0]:  # the integers of the best so far
            d[:], start[:] = best, base
            least[:] = np.float32(np.inf)
        else:
            steps, shift = factors[i, 0], factors[i, 1]
            for k in range(LANES):
                d[k] = (top[k] - low[k]) / steps
            for k in range(LANES):
                start[k] = low[k] + shift * d[k]
        for k in range(LANES):
            inverse[k] = np.float32(1) / d[k] if d[k] > TINY else F0
        affine_sums(x, w, inverse, start, high, q1, qx, qq)
        for k in range(LANES):
            mean[k] = sv[k] - (start[k] - low[k]) * sw[k]  # Σ w (x − start)
        for k in range(LANES):
            loss[k] = sw[k] * qq[k] - q1[k] * q1[k]
        for k in range(LANES):
            a[k] = max((sw[k] * qx[k] - mean[k] * q1[k]) / loss[k], F0) if loss[k] > F0 else F0
        for k in range(LANES):
            b[k] = (mean[k] - a[k] * q1[k]) / sw[k] if sw[k] > F0 else F0
        # What the line takes off Σ w (x − low)², of which the shift is the first part; negative, as of a loss.
        for k in range(LANES):
            loss[k] = (low[k] - start[k]) * (sv[k] + mean[k]) - a[k] * qx[k] - b[k] * mean[k]
        for k in range(LANES):
            b[k] += start[k]
        take(loss, least, a, best)
        take(loss, least, b, base)
        lower(loss, least)
    for k in range(LANES):
        best[k] = f16(best[k])
    for k in range(LANES):
        base[k] = f16_nearest(base[k])


@njit(**KERNEL)
def settle_affine(x: Any, w: Any, high: Any, best: Any, base: Any, inverse: Any, s: Any) -> None:
    """The offset as float16 holds it or next to it, each with the scale of the search and one refitted to it; by the loss."""
    least, d, b, error, q1, qq, scale, start = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
    scale[:], start[:] = best, base
    least[:] = np.float32(np.inf)
    for step in (F0, -_NEXT, _NEXT):
        for k in range(LANES):
            b[k] = f16_nearest(start[k] + start[k] * step)
        d[:] = scale
        for turn in range(2):
            invert(d, inverse)
            if turn == 1:
                affine_sums(x, w, inverse, b, high, q1, error, qq)
                for k in range(LANES):
                    d[k] = f16(max(error[k] / qq[k], F0)) if qq[k] > F0 else d[k]
                invert(d, inverse)
            affine_error(x, w, d, inverse, b, high, error)
            take(error, least, d, best)
            take(error, least, b, base)
            lower(error, least)


@njit(**KERNEL)
def few_bits_affine(
    x: Any, w: Any, factors: Any, high: Any, low: Any, top: Any,
    best: Any, base: Any, inverse: Any, least: Any, d: Any, error: Any,
) -> None:  # fmt: skip
    """Scales that put the largest magnitude f steps from zero, the least value at code 0."""
    least[:] = np.float32(np.inf)
    for k in range(LANES):
        base[k] = f16_nearest(low[k])
    for i in range(factors.size):
        factor = factors[i]
        for k in range(LANES):
            d[k] = f16(max(-low[k], top[k]) / factor)
        invert(d, inverse)
        affine_error(x, w, d, inverse, base, high, error)
        take(error, least, d, best)
        lower(error, least)

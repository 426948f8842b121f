"""The real-valued scale and minimum of each part of a super-block: step 1 of `k_affine`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lane_sums import affine_sums, moments
from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, TINY, bounds, take

F2 = np.float32(2)
# What several spreads do exactly, rounding must not decide: parts of one kind get one scale, which the others share.
_NOISE = np.float32(2**-18)
_SINGULAR = np.float32(1e-5)  # below it, relatively, the determinant is rounding error: the q are all equal


@njit(**KERNEL)
def fit_parts(x: Any, w: Any, high: Any, spreads: Any, s: Any, scale: Any, minimum: Any) -> None:
    """Step 1: real-valued scale ≥ 0 and minimum ≥ 0 (what is subtracted) of each lane.

    `spreads` f32 [M, 2]: the range takes (high + the first) steps, and the least value gets minus the second as its code.
    `s`: f32 [14, 64] of room.
    """
    low, span, inverse, q1, qx, qq, least, sw, sv, svv, base, a, b, error = (
        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13],
    )  # fmt: skip
    bounds(x, low, span)
    for k in range(LANES):
        low[k] = min(low[k], F0)
    for k in range(LANES):
        span[k] = max(span[k] - low[k], F0)
    moments(x, w, low, sw, sv, svv)
    least[:] = np.float32(np.inf)
    for i in range(spreads.shape[0]):
        width, shift = high + spreads[i, 0], spreads[i, 1]
        for k in range(LANES):
            inverse[k] = width / span[k] if span[k] > TINY else F0
        for k in range(LANES):
            base[k] = low[k] + shift * (span[k] / width)
        affine_sums(x, w, inverse, base, high, q1, qx, qq)
        _line(low, base, sw, sv, q1, qx, qq, a, b)
        _losses(a, b, sw, sv, svv, q1, qx, qq, error)
        for k in range(LANES):
            q1[k] = least[k] - _NOISE * svv[k]
        take(error, q1, a, scale)
        take(error, q1, b, minimum)
        take(error, q1, error, least)
    for k in range(LANES):
        scale[k] = max(scale[k], F0)
    for k in range(LANES):
        minimum[k] = max(-(low[k] + minimum[k]), F0)


@njit(**KERNEL)
def _line(low: Any, base: Any, sw: Any, sv: Any, q1: Any, qx: Any, qq: Any, a: Any, b: Any) -> None:
    """Least squares x − low ≈ a q + b from the sums over x − base for q and over x − low for 1; low + b ≤ 0.

    `qx` is turned into the sum over x − low. Where the q are all equal, b is 0.
    """
    for k in range(LANES):
        qx[k] += (base[k] - low[k]) * q1[k]
    for k in range(LANES):
        det = sw[k] * qq[k] - q1[k] * q1[k]
        slope = (qq[k] * sv[k] - q1[k] * qx[k]) / det
        b[k] = min(slope if det > _SINGULAR * (sw[k] * qq[k]) else F0, -low[k])
    for k in range(LANES):
        a[k] = (qx[k] - b[k] * q1[k]) / qq[k] if qq[k] > F0 else F0


@njit(**KERNEL)
def _losses(a: Any, b: Any, sw: Any, sv: Any, svv: Any, q1: Any, qx: Any, qq: Any, error: Any) -> None:
    """Σ w (x − low − a q − b)² of each lane."""
    for k in range(LANES):
        error[k] = svv[k] + a[k] * (a[k] * qq[k] - F2 * qx[k])
    for k in range(LANES):
        error[k] += b[k] * (b[k] * sw[k] - F2 * sv[k] + F2 * a[k] * q1[k])

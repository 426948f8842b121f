"""Sums and losses over the blocks of a tile (see `lanes`): what the encoders' searches are made of.

x: the tile f32 [N, 64]; w: importances likewise, or None for all ones; the others f32 [64], one number a lane. Integers q
are the nearest ones, within their range, of x/d or (x − base)/d, whose d is given by its inverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, nearest


@njit(**KERNEL)
def symmetric_error(x: Any, w: Any, d: Any, inverse: Any, low: Any, high: Any, error: Any) -> None:
    """Σ w (x − d·q)² of each lane, q the nearest integer to x/d within low … high."""
    for k in range(LANES):
        error[k] = F0
    for j in range(x.shape[0]):
        if w is None:
            for k in range(LANES):
                r = x[j, k] - nearest(min(max(x[j, k] * inverse[k], low), high)) * d[k]
                error[k] += r * r
        else:
            for k in range(LANES):
                r = x[j, k] - nearest(min(max(x[j, k] * inverse[k], low), high)) * d[k]
                error[k] += w[j, k] * r * r


@njit(**KERNEL)
def symmetric_sums(x: Any, w: Any, inverse: Any, low: Any, high: Any, qx: Any, qq: Any) -> None:
    """Σ w q x and Σ w q² of each lane: their quotient is the best d for these q (least squares)."""
    for k in range(LANES):
        qx[k] = F0
        qq[k] = F0
    for j in range(x.shape[0]):
        if w is None:
            for k in range(LANES):
                q = nearest(min(max(x[j, k] * inverse[k], low), high))
                qx[k] += q * x[j, k]
                qq[k] += q * q
        else:
            for k in range(LANES):
                q = nearest(min(max(x[j, k] * inverse[k], low), high))
                v = w[j, k] * q
                qx[k] += v * x[j, k]
                qq[k] += v * q


@njit(**KERNEL)
def affine_error(x: Any, w: Any, d: Any, inverse: Any, base: Any, high: Any, error: Any) -> None:
    """Σ w (x − base − d·q)² of each lane, q the nearest integer to (x − base)/d within 0 … high."""
    for k in range(LANES):
        error[k] = F0
    for j in range(x.shape[0]):
        if w is None:
            for k in range(LANES):
                v = x[j, k] - base[k]
                r = v - nearest(min(max(v * inverse[k], F0), high)) * d[k]
                error[k] += r * r
        else:
            for k in range(LANES):
                v = x[j, k] - base[k]
                r = v - nearest(min(max(v * inverse[k], F0), high)) * d[k]
                error[k] += w[j, k] * r * r


@njit(**KERNEL)
def affine_sums(x: Any, w: Any, inverse: Any, base: Any, high: Any, q1: Any, qx: Any, qq: Any) -> None:
    """Σ w q, Σ w q (x − base) and Σ w q² of each lane."""
    for k in range(LANES):
        q1[k] = F0
        qx[k] = F0
        qq[k] = F0
    for j in range(x.shape[0]):
        if w is None:
            for k in range(LANES):
                v = x[j, k] - base[k]
                q = nearest(min(max(v * inverse[k], F0), high))
                q1[k] += q
                qx[k] += q * v
                qq[k] += q * q
        else:
            for k in range(LANES):
                v = x[j, k] - base[k]
                q = nearest(min(max(v * inverse[k], F0), high))
                u = w[j, k] * q
                q1[k] += u
                qx[k] += u * v
                qq[k] += u * q


@njit(**KERNEL)
def means(x: Any, w: Any, base: Any, s0: Any, s1: Any) -> None:
    """Σ w and Σ w (x − base) of each lane."""
    for k in range(LANES):
        s0[k] = np.float32(x.shape[0]) if w is None else F0
        s1[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            if w is None:
                s1[k] += x[j, k] - base[k]
            else:
                s0[k] += w[j, k]
                s1[k] += w[j, k] * (x[j, k] - base[k])


@njit(**KERNEL)
def moments(x: Any, w: Any, base: Any, s0: Any, s1: Any, s2: Any) -> None:
    """Σ w, Σ w (x − base), Σ w (x − base)² of each lane."""
    for k in range(LANES):
        s0[k] = F0
        s1[k] = F0
        s2[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            v = x[j, k] - base[k]
            u = np.float32(1) if w is None else w[j, k]
            s0[k] += u
            s1[k] += u * v
            s2[k] += u * v * v

"""Super-blocks that were decoded from the same type: finding the integers they came of, so that they come back exactly.

    symmetric    value = (d · scale) · q                      Q3_K, Q6_K
    affine       value = (d · scale) · q − (dmin · min)       Q2_K, Q4_K, Q5_K

Within a part the values (affine: their differences) are multiples of d · scale, so their greatest common divisor, as a real
number, is a multiple of d, and at least the largest of them over the largest q. Ordinary values fail at this within the first
few of a super-block: Euclid's algorithm soon leaves a remainder that is smaller. The divisors of all parts have in turn one
that is c · d; for each c that makes d a float16, every part's scale is sought among the divisors of its own; the minima
follow as for dmin: a float16 that some integer takes to one part's least value, and others to those of all others.

Solutions are many where a part leaves codes unused; any will do, since what is taken gives back every value bit for bit.
None is found where float32 had to round the difference of d · scale · q and dmin · min; nor, now and then, where many parts
have two different values only, since the trials are counted (`_STEPS`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.k_bytes import pack
from gptoss_convert.kernels.lanes import F0, KERNEL, f16_bits, f16_nearest, nearest

_KEEP_2 = np.float32(2**22 + 1)
_BITS = 25  # of the first value or difference; products have up to 23, and 12 more fit above
_MOST = 2.0**45
_STEPS = 30_000  # after so many a super-block is given up: a tenth of a millisecond
_ENOUGH = 4  # values of few bits that are no accident of decoding


@njit(**KERNEL)
def recover(blocks: Any, low: Any, high: Any, least: Any, top: Any, out: Any) -> None:
    """Overwrite in `out` [S, bytes] the super-blocks of blocks f32 [S·parts, N] that come back exactly.

    Scales are least … top, codes low … high; affine if `low` is 0.
    """
    parts, affine = blocks.shape[0] // max(out.shape[0], 1), low == F0
    g, ends = np.empty(parts, np.int64), np.empty((2, parts), np.float64)
    found, words = np.empty((4, parts), np.float32), np.empty(2, np.float32)
    q = np.empty((blocks.shape[1], parts), np.uint8)
    limit = np.int64(high) if affine else np.int64(-low)
    for s in range(out.shape[0]):
        if limit > 24 and few_bits(blocks, s * parts, parts):
            continue
        unit = _divisors(blocks, s * parts, parts, affine, limit, g, ends)
        if unit == 0 and not (affine and _constant(blocks, s * parts, parts, limit, np.int64(top), found)):
            continue
        solved = unit == 0 or (
            _affine(g, ends, unit, limit, np.int64(top), found)
            if affine
            else _symmetric(g, ends, unit, low, high, np.int64(least), np.int64(top), found)
        )
        if solved and _codes(blocks, s * parts, found, low, high, q):
            words[0], words[1] = found[0, 0], found[1, 0]
            bits = words.view(np.uint32)
            pack(q, found[2], found[3], f16_bits(words[0], bits[0]), f16_bits(words[1], bits[1]), out[s])


@njit(**KERNEL)
def few_bits(blocks: Any, first: Any, parts: Any) -> Any:
    """Whether the first values of the parts have two significant bits at most, as MXFP4's have: the searches find those."""
    some = 0
    for p in range(parts):
        spread = blocks[first + p, 0] * _KEEP_2
        if spread - (spread - blocks[first + p, 0]) != blocks[first + p, 0]:
            return False
        some += blocks[first + p, 0] != F0
    return some >= _ENOUGH


@njit(**KERNEL)
def _divisors(blocks: Any, first: Any, parts: Any, affine: Any, limit: Any, g: Any, ends: Any) -> Any:
    """Each part's greatest common divisor, 0 if it is constant (symmetric: zero), in multiples of what is returned; least
    and largest value. 0 if a divisor is too small for `limit`, or all are 0."""
    unit = 0.0
    for p in range(parts):
        base = np.float64(blocks[first + p, 0]) if affine else 0.0
        lowest, highest, divisor = base, base, np.int64(0)
        for j in range(blocks.shape[1]):
            value = np.float64(blocks[first + p, j])
            lowest, highest = min(lowest, value), max(highest, value)
            size = abs(value - base)
            if size == 0.0:
                continue
            if unit == 0.0:
                unit = 2.0 ** (np.floor(np.log2(size)) - (_BITS - 1))
            steps = size / unit
            whole = np.int64(steps) if steps < _MOST else np.int64(0)
            if whole != steps:
                return 0.0
            widest = (highest - lowest) / unit if affine else max(highest, -lowest) / unit
            divisor = _common(divisor, whole, np.int64(np.ceil(widest / limit)))
            if divisor == 0:
                return 0.0
        g[p], ends[0, p], ends[1, p] = divisor, lowest, highest
        widest = (highest - lowest) / unit if affine else max(highest, -lowest) / unit
        if unit > 0 and divisor * limit < widest:
            return 0.0
    return unit


@njit(**KERNEL)
def _constant(blocks: Any, first: Any, parts: Any, high: Any, top: Any, found: Any) -> Any:
    """Whether all values are one that d · scale · q, or −dmin · min, can be."""
    value = blocks[first, 0]
    for p in range(parts):
        for j in range(blocks.shape[1]):
            if blocks[first + p, j] != value:
                return False
    found[:] = F0
    for scale in range(top, 0, -1):
        for q in range(high if value > F0 else 1, 0, -1):
            d = np.float64(abs(value)) / (scale * q)
            if _exact(d):
                found[0 if value > F0 else 1, :], found[2 if value > F0 else 3, :] = d, scale
                return True
    return False


@njit(**KERNEL)
def _common(a: Any, b: Any, least: Any) -> Any:
    """The greatest common divisor, or 0 if it is below `least`."""
    while b != 0:
        a, b = b, a % b
        if b != 0 and b < least:
            return np.int64(0)
    return a if a >= least else np.int64(0)


@njit(**KERNEL)
def _exact(value: Any) -> Any:
    """Whether a float16 holds it."""
    return value > 0 and np.float64(f16_nearest(np.float32(value))) == value


@njit(**KERNEL)
def _all(g: Any) -> Any:
    whole = np.int64(0)
    for p in range(g.size):
        if g[p] > 0:
            whole = _common(whole, g[p], np.int64(1))
    return whole


@njit(**KERNEL)
def _symmetric(g: Any, ends: Any, unit: Any, low: Any, high: Any, least: Any, top: Any, found: Any) -> Any:
    whole, widest, left = _all(g), max(ends[1].max(), -ends[0].min()), _STEPS
    for c in range(1, np.int64(np.float64(low) * least * whole * unit / widest) + 1):
        d = whole * unit / c
        if not _exact(d):
            continue
        for sign in (1.0, -1.0):
            solved = True
            for p in range(g.size):
                scale = _scale(g[p] // whole * c, sign * d, ends[0, p], ends[1, p], low, high, least, top)
                found[0, p], found[1, p], found[2, p], found[3, p] = sign * d, sign * d, scale, scale
                solved &= scale != 0 or g[p] == 0
                left += least  # as many divisors are tried at most
                if not solved or left < 0:
                    break
            if left < 0:
                return False
            if solved:
                return True
    return False


@njit(**KERNEL)
def _scale(multiple: Any, d: Any, lowest: Any, highest: Any, low: Any, high: Any, least: Any, top: Any) -> Any:
    """The largest divisor of `multiple`, or its negative, that as a scale leaves the codes within their range; or 0."""
    for s in range(min(multiple, -least), 0, -1):
        if multiple % s == 0:
            for scale in (s, -s):
                a, b = lowest / (d * scale), highest / (d * scale)
                if least <= scale <= top and min(a, b) >= low and max(a, b) <= high:
                    return scale
    return 0


@njit(**KERNEL)
def _affine(g: Any, ends: Any, unit: Any, high: Any, top: Any, found: Any) -> Any:
    left = np.full(1, _STEPS)
    whole, widest = _all(g), (ends[1] - ends[0]).max()
    for c in range(1, np.int64(high * top * whole * unit / widest) + 1):
        d = whole * unit / c
        if left[0] < 0:
            break
        if not _exact(d):
            continue
        if _fits(g, ends, whole, c, d, 0.0, high, top, left, found):
            return True
        for p in np.argsort(ends[0]):
            if _from_part(g, ends, whole, c, d, p, high, top, left, found):
                return True
    return False


@njit(**KERNEL)
def _from_part(
    g: Any, ends: Any, whole: Any, c: Any, d: Any, p: Any, high: Any, top: Any, left: Any, found: Any
) -> Any:  # fmt: skip
    """Whether every part has a scale and a min for this d and a dmin of which part p's minimum is a multiple."""
    multiple = g[p] // whole * c
    for s in range(min(multiple, top), -1, -1):
        if (s == 0) != (multiple == 0) or (s > 0 and multiple % s != 0):
            continue
        spare = high - np.int64((ends[1, p] - ends[0, p]) / (d * s)) if s > 0 else 0
        for first in range(spare + 1):
            minimum = d * s * first - ends[0, p]
            left[0] -= top
            if left[0] < 0:
                return False
            for n in range(top, 0, -1):
                dmin = minimum / n
                if _exact(dmin) and dmin * n == minimum and _fits(g, ends, whole, c, d, dmin, high, top, left, found):
                    return True
    return False


@njit(**KERNEL)
def _fits(
    g: Any, ends: Any, whole: Any, c: Any, d: Any, dmin: Any, high: Any, top: Any, left: Any, found: Any
) -> Any:  # fmt: skip
    """Whether every part has a scale and a min for this d and dmin; they are put down in `found`."""
    for p in range(g.size):
        multiple, done = g[p] // whole * c, False
        for turn in range((min(multiple, top) if multiple > 0 else top) + 1):
            s = min(multiple, top) - turn if multiple > 0 else turn
            left[0] -= 1
            if multiple > 0 and (s == 0 or multiple % s != 0):
                continue
            used = np.int64((ends[1, p] - ends[0, p]) / (d * s)) if multiple > 0 else 0
            left[0] -= high - used
            if left[0] < 0:
                return False
            for first in range(high - used + 1 if s > 0 else 1):
                minimum = d * s * first - ends[0, p]
                n = minimum / dmin if dmin > 0 else 0.0
                if 0 <= n <= top and n == np.floor(n) and n * dmin == minimum:
                    found[0, p], found[1, p], found[2, p], found[3, p] = d, dmin, s, n
                    done = True
                    break
            if done:
                break
        if not done:
            return False
    return True


@njit(**KERNEL)
def _codes(blocks: Any, first: Any, found: Any, low: Any, high: Any, q: Any) -> Any:
    """The codes, from 0, of a solution; whether they give back every value."""
    for p in range(found.shape[1]):
        unit = found[0, p] * found[2, p]
        base = found[1, p] * found[3, p] if low == F0 else F0
        inverse = np.float32(1) / unit if unit != F0 else F0
        for j in range(blocks.shape[1]):
            code = nearest(min(max((blocks[first + p, j] + base) * inverse, low), high))
            if unit * code - base != blocks[first + p, j]:
                return False
            q[j, p] = np.int32(code - low)
    return True

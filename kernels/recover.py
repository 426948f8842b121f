"""Blocks that were decoded from integers with a float16 scale: finding that scale, so that they come back exactly.

    symmetric    value = d · q,      low ≤ q ≤ high < −low
    affine       value = d · q + m,    0 ≤ q ≤ high

The values (affine: less the least of them) are integer multiples of d then, so their greatest common divisor, as real
numbers, is g = c · d with an integer c, and not less than the largest over −low or `high`. Euclid's algorithm finds it, all
lanes of a tile (see `lanes`) at once: exactly, because such multiples fit into float32. What is found is taken only if it
gives back every value as it is.

Where m and d · q are so far apart that float32 rounds their sum, all pairs of codes of the least and largest are tried.

Other blocks are passed over as soon as some value has more significant bits than a product d · q, or, one with the next, the
divisor is too small; so are blocks whose values have two significant bits at most, as MXFP4's have: with a scale of
float16's precision that is no accident of decoding. Only where the search would not find what such values decode from, which
is told by `thorough`, are they looked into.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.block_bytes import pack
from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, TINY, bounds, f16_bits, f16_nearest, invert, nearest

F1 = np.float32(1)
_KEEP_2 = np.float32(2**22 + 1)
_KEEP_5 = np.float32(2**19 + 1)
_KEEP_20 = np.float32(2**4 + 1)
_USUAL = np.float32(2.0**-16)  # below, float16 scales have few bits themselves
_ROUNDING = np.float32(2.0**-20)
_NEARLY = np.float32(0.999)
_FIRST = 4  # values of a block that are looked at before all are


@njit(**KERNEL)
def recover(
    blocks: Any, bits: Any, low: Any, high: Any, thorough: Any,
    x: Any, s: Any, words: Any, flag: Any, q: Any, out: Any,
) -> None:  # fmt: skip
    """Overwrite in `out`, [B, bytes], the blocks f32 [B, 32] that come back exactly; affine if `low` is 0.

    x f32 [32, 64], s f32 [8 or more, 64], `words` its bits, flag bool [64], q uint8 [32, 64]: scratch.
    """
    chosen, room = np.empty(LANES, np.int64), np.empty((LANES, out.shape[1]), np.uint8)
    affine, count, limit = low == F0, 0, high if low == F0 else -low
    keep, usual = np.float32(2 ** (13 - bits) + 1), np.float32(np.inf) if thorough else limit * _USUAL
    for b in range(blocks.shape[0] + 1):
        if b < blocks.shape[0]:  # written out here: a call for each block would cost a tenth of the encoder
            first, second, third, fourth = blocks[b, 0], blocks[b, 1], blocks[b, 2], blocks[b, 3]
            few = abs(first) >= usual and _beyond(first, _KEEP_2) == F0 and _beyond(second, _KEEP_2) == F0
            if few and (not affine or (first != second and _beyond(second - first, _KEEP_5) == F0)):
                continue
            if affine:  # one of the four may be so large that its sum was rounded
                if _beyond(second - first, keep) != F0 and _beyond(fourth - third, keep) != F0:
                    continue
                if _beyond(third - second, keep) != F0 and _beyond(first - fourth, keep) != F0:
                    continue
            elif _beyond(first, keep) != F0 or _beyond(second, keep) != F0 or _beyond(third, keep) != F0:
                continue
            base = first if affine else F0
            if not plausible(abs(first - base), abs(second - base), abs(third - base), abs(fourth - base), limit):
                continue
            if thorough or not few_bits(blocks, b, usual, affine):
                chosen[count] = b
                count += 1
        if count == LANES or (b == blocks.shape[0] and count > 0):
            x[:, count:] = F0
            for k in range(count):
                x[:, k] = blocks[chosen[k]]
            if _solve(x, bits, low, high, limit, flag, s):
                _write(x, bits, low, high, s, words, q, room)
                for k in range(count):
                    if flag[k]:
                        out[chosen[k]] = room[k]
            count = 0


@njit(**KERNEL)
def plausible(first: Any, second: Any, third: Any, fourth: Any, limit: Any) -> Any:
    """Whether the greatest common divisor of four sizes is not less than the largest over `limit`; rounding aside."""
    g = max(first, second, third, fourth)
    least, nothing = g / limit * _NEARLY, g * _ROUNDING
    for size in (first, second, third, fourth):
        rest = size
        while rest > nothing:
            if rest < least:
                return False
            g, rest = rest, abs(g - nearest(g / rest) * rest)
    return True


@njit(**KERNEL)
def few_bits(blocks: Any, b: Any, usual: Any, affine: Any) -> Any:
    """Whether the first values that are not too small to tell have two significant bits at most, affine: and differ by few."""
    few = 0
    for j in range(blocks.shape[1]):
        if _beyond(blocks[b, j], _KEEP_2) != F0:
            return False
        change = blocks[b, j] - (blocks[b, j - 1] if affine and j > 0 else F0)
        if affine and _beyond(change, _KEEP_5) != F0:
            return False
        few += abs(blocks[b, j]) >= usual and change != F0
        if few == 2:
            return True
    return few > 0


@njit(**KERNEL)
def _beyond(v: Any, keep: Any) -> Any:
    """What v has beyond the bits that `keep` leaves it (Veltkamp's splitting, Dekker 1971)."""
    spread = v * keep
    return spread - (spread - v) - v


@njit(**KERNEL)
def _solve(x: Any, bits: Any, low: Any, high: Any, limit: Any, flag: Any, s: Any) -> Any:
    """d → s[0] and m → s[1] of the lanes that `flag` is set for; whether there are any."""
    d, base, size, least, most = s[0], s[1], s[2], s[3], s[4]
    bounds(x, least, most)
    for k in range(LANES):
        base[k] = least[k] if low == F0 else F0
        size[k] = most[k] - least[k] if low == F0 else max(-least[k], most[k])
    some = common_unit(x, base, size, limit, bits, s[5:], d) or low == F0
    if not some:
        return False
    some = False
    for k in range(LANES):
        found, unit, offset, g = False, F0, F0, d[k]
        count, c = (nearest(size[k] / g), F1) if g > F0 else (F1, limit + F1)
        while not found and count * c <= limit:
            unit = g / c
            if f16_nearest(unit) == unit:
                if low < F0:
                    unit = -unit if count * c > high and most[k] == size[k] else unit
                    found = _gives_back(x[:, k], unit, F0, low, high)
                for first in range(np.int64(limit - count * c) + 1 if low == F0 else 0):
                    offset = least[k] - unit * np.float32(first)
                    if f16_nearest(offset) == offset and _gives_back(x[:, k], unit, offset, low, high):
                        found = True
                        break
            c += F1
        if low == F0 and not found:
            found, unit, offset = _rounded_line(x[:, k], least[k], size[k], high)
        flag[k], d[k], base[k] = found, unit, offset
        some |= found
    return some


@njit(**KERNEL)
def _rounded_line(x: Any, least: Any, span: Any, high: Any) -> Any:
    """Whether, and which, d and m give back values some of whose sums d · q + m float32 had to round: by trying."""
    many = False
    for j in range(x.size):
        many |= _beyond(x[j], _KEEP_20) != F0
    if many:
        for count in range(1, np.int64(high) + 1):
            d = f16_nearest(span / np.float32(count))
            for first in range(np.int64(high) - count + 1):
                base = f16_nearest(least - d * np.float32(first))
                if d > F0 and _gives_back(x, d, base, F0, high):
                    return True, d, base
    return False, F0, F0


@njit(**KERNEL)
def _gives_back(x: Any, d: Any, base: Any, low: Any, high: Any) -> Any:
    inverse = F1 / d
    for j in range(x.size):
        q = nearest(min(max((x[j] - base) * inverse, low), high))
        if q * d + base != x[j]:
            return False
    return True


@njit(**KERNEL)
def common_unit(x: Any, base: Any, size: Any, limit: Any, bits: Any, s: Any, g: Any) -> Any:
    """The greatest common divisor of each lane's |x − base|, or 0 where it is less than size/limit; whether any is left."""
    inverse, rest, other = s[0], s[1], s[2]
    for k in range(LANES):
        g[k] = size[k] if size[k] > TINY else F0
    for rows in (_FIRST, x.shape[0]):
        for _ in range(bits + 1):  # each time a divisor is halved at least, or solved
            invert(g, inverse)
            _rest(x, base, rows, g, inverse, rest)
            left, unsolved = False, False
            for k in range(LANES):
                if rest[k] > F0 and rest[k] * limit < size[k] * _NEARLY:
                    g[k] = F0
                rest[k] = rest[k] if g[k] > F0 else F0
                unsolved |= rest[k] > F0
                left |= g[k] > F0
            if not left:
                return False
            if not unsolved:
                break
            left = False
            for _ in range(bits):
                _euclid(g, rest, other)
            for k in range(LANES):
                g[k] = g[k] if rest[k] == F0 and g[k] * limit >= size[k] * _NEARLY else F0
                left |= g[k] > F0
            if not left:
                return False
    return True


@njit(**KERNEL)
def _rest(x: Any, base: Any, rows: Any, g: Any, inverse: Any, rest: Any) -> None:
    """What the last row leaves that is no multiple of g; 0 where all are."""
    for k in range(LANES):
        rest[k] = F0
    for j in range(rows):
        for k in range(LANES):
            v = abs(x[j, k] - base[k])
            r = abs(v - nearest(v * inverse[k]) * g[k])
            rest[k] = r if r > F0 else rest[k]


@njit(**KERNEL)
def _euclid(g: Any, rest: Any, other: Any) -> None:
    """One step: (g, rest) → (rest, what g leaves of it); lanes whose rest is 0 stay."""
    for k in range(LANES):
        ratio = g[k] / rest[k] if rest[k] > F0 else F0
        other[k] = abs(g[k] - nearest(ratio) * rest[k])
    for k in range(LANES):
        g[k] = rest[k] if rest[k] > F0 else g[k]
    for k in range(LANES):
        rest[k] = other[k] if rest[k] > F0 else F0


@njit(**KERNEL)
def _write(x: Any, bits: Any, low: Any, high: Any, s: Any, words: Any, q: Any, out: Any) -> None:
    """All lanes' blocks of s[0] and, affine, s[1]."""
    inverse, heads, zero = s[2], 2 if low == F0 else 1, F0 if bits == 8 else low
    invert(s[0], inverse)
    for j in range(x.shape[0]):
        for k in range(LANES):
            q[j, k] = np.int32(nearest(min(max((x[j, k] - s[1, k]) * inverse[k], low), high)) - zero)
    for k in range(LANES):
        for i in range(heads):
            word = f16_bits(s[i, k], words[i, k])
            out[k, 2 * i], out[k, 2 * i + 1] = word & np.uint16(255), word >> np.uint16(8)
    pack(q, bits, 2 * heads, 0, LANES, out)

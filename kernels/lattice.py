"""The lattices of ggml's IQ2 and IQ3 formats, and the nearest point of one by a weighted distance.

A lattice is a list of points in 8 (IQ2) or 4 (IQ3) dimensions whose coordinates take 3 or 8 positive values, the *levels*;
a format stores the number of the point for the magnitudes of a group of weights, their signs apart. The points are a part
of the format and come from the gguf package (`gguf.quants`), loaded when first asked for.

**Nearest point.** `nearest` finds the point p that minimises Σ w_i (y_i − p_i)² for any weights w ≥ 0, exactly up to float32's
rounding of the sum; `nearest_reference` tries every point and is its specification. Each axis is cut into intervals (at the
levels and halfway between them); a product of intervals is a *cell*, 16 bits name it. Within an interval the order of two
levels by distance seldom depends on where y lies, so that in a cell most points have a rival that is no farther on every
axis, hence no farther for whatever weights. The rest, a handful (7 on average for Gaussian data), are the cell's candidates,
listed once (`_list_candidates`); a search looks up the list and adds up one table entry a pair of axes for each candidate.

Arrays of one super-block of 256 values are kept axis by axis: entry i · G + g is axis i of group g, G = 256 / axes.
"""

from __future__ import annotations

from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32, U16

SUPER = 256  # values of a super-block
_GUARD = 0x8888888888888888  # the top bit of every 4-bit field
_MOST = 3_000_000  # entries of the longest candidate list (2.4 million), with room


class Grid(NamedTuple):
    """One lattice of N points in `axes` dimensions, with the candidates of each cell."""

    points: F32  # [N, axes]
    levels: F32  # the 3 or 8 values of a coordinate, ascending
    bounds: F32  # where an axis is cut
    entries: U16  # [N, 4]: for each quarter of the axes, where its term stands in the table of `_tables8`, `_tables4`
    starts: NDArray[np.uint32]  # [65537]: the candidates of cell c are lists[starts[c] : starts[c + 1]]
    lists: U16  # numbers of points, each list padded to a multiple of 4 by repeating one, unless it is a single point


_GRIDS: dict[str, Grid] = {}
_LOCK = Lock()


def grid(name: str) -> Grid:
    """The lattice of a format (`iq2_xxs`, `iq2_xs`, `iq2_s`, `iq3_xxs`, `iq3_s`); the first call takes up to a second."""
    with _LOCK:
        if name not in _GRIDS:
            _GRIDS[name] = _prepare(*_load(name))
        return _GRIDS[name]


def points(name: str) -> F32:
    """The points alone, f32 [N, axes]: what a decoder needs."""
    return _GRIDS[name].points if name in _GRIDS else _load(name)[0]


def _load(name: str) -> tuple[F32, F32]:
    import gguf.quants

    source = getattr(gguf.quants, name.upper())
    source.init_grid()
    found = np.ascontiguousarray(source.grid.reshape(source.grid_shape), np.float32)
    return found, np.array(source.grid_map, np.float32)


def _prepare(found: F32, levels: F32) -> Grid:
    axes = found.shape[1]
    level = np.searchsorted(levels, found)
    if axes == 8:  # intervals: where the order of the three levels by distance changes
        low, middle, high = levels
        bounds = np.array([low + middle, low + high, middle + high], np.float32) / np.float32(2)
        entries = (level[:, 0::2] + 3 * level[:, 1::2]) * 128 + np.arange(4) * 32
    else:  # half steps from halfway between the first two levels; the uneven last level only lengthens some lists
        step = (levels[1] - levels[0]) / 2
        bounds = (levels[0] + step * np.arange(1, 14)).astype(np.float32)
        entries = level * 256 + np.arange(4) * 64
    starts, lists = np.zeros(65537, np.uint32), np.empty(_MOST, np.uint16)
    ranks = _ranks(levels, bounds)
    _list_candidates(*_keys(level, ranks, 16 // axes), np.uint64(_GUARD), len(ranks), 16 // axes, starts, lists)
    return Grid(found, levels, bounds, entries.astype(np.uint16), starts, lists[: starts[-1]].copy())


def _ranks(levels: F32, bounds: F32) -> NDArray[np.uint64]:
    """[intervals, levels]: 4 bits each, the rank of a level by its distance from the interval's lower and upper end.

    The difference of two squared distances is linear in y: a level that is no farther at both ends is nowhere farther.
    """
    ends = np.concatenate([[-1e6], bounds.astype(np.float64), [1e6]])
    rank = [np.unique(np.abs(levels - end), return_inverse=True)[1] for end in ends]
    return np.array([low | high << 4 for low, high in pairwise(rank)], np.uint64)


def _keys(level: NDArray[np.int64], ranks: NDArray[np.uint64], bits: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each half of a cell's name (256 each) and point: the fields of its axes' ranks, and the sum of these ranks."""
    half = level.shape[1] // 2
    cells = np.arange(256)
    keys = np.zeros((2, 256, len(level)), np.uint64)
    total = np.zeros((2, 256, len(level)), np.int64)
    for axis in range(2 * half):
        interval = np.minimum(cells >> bits * (axis % half) & (1 << bits) - 1, len(ranks) - 1)
        rank = ranks[interval[:, None], level[None, :, axis]]
        keys[axis // half] |= rank << np.uint64(8 * axis)
        total[axis // half] += (rank & 15).astype(np.int64) + (rank >> 4).astype(np.int64)
    return keys, total


@njit(cache=True, nogil=True)
def _list_candidates(keys: Any, total: Any, guard: Any, intervals: Any, bits: Any, starts: Any, lists: Any) -> None:
    count = keys.shape[2]
    key, accepted = np.empty(count, np.uint64), np.empty(count, np.uint64)
    following, head = np.empty(count, np.int64), np.empty(128, np.int64)
    mask = (1 << bits) - 1
    at = 0
    for cell in range(65536):
        starts[cell] = at
        used = True
        for shift in range(0, 16, bits):
            used = used and ((cell >> shift) & mask) < intervals
        if not used:
            continue
        low, high = cell & 255, cell >> 8
        nearest = 0
        for p in range(count):
            key[p] = keys[0, low, p] | keys[1, high, p]
            if total[0, low, p] + total[1, high, p] < total[0, low, nearest] + total[1, high, nearest]:
                nearest = p
        # A field of (k | guard) − other keeps its guard bit just where k ≥ other: `other` is no farther on that axis. Rivals
        # come first in the order of their rank sums, so one pass through buckets of equal sums suffices.
        head[:] = -1
        for p in range(count - 1, -1, -1):
            if p != nearest and (((key[p] | guard) - key[nearest]) & guard) != guard:
                rank = total[0, low, p] + total[1, high, p]
                following[p], head[rank] = head[rank], p
        accepted[0], lists[at], found = key[nearest], nearest, 1
        for rank in range(128):
            p = head[rank]
            while p >= 0:
                beaten = False
                for other in range(found):
                    if (((key[p] | guard) - accepted[other]) & guard) == guard:
                        beaten = True
                        break
                if not beaten:
                    accepted[found], lists[at + found] = key[p], p
                    found += 1
                p = following[p]
        at += found
        while found > 1 and found % 4:
            lists[at] = lists[at - 1]
            at, found = at + 1, found + 1
    starts[65536] = at


@njit(cache=True, nogil=True)
def _tables8(y: Any, w: Any, levels: Any, bounds: Any, cells: Any, table: Any) -> None:
    """Cells of the 32 groups, and table[(k0 + 3·k1)·128 + 32·j + g]: what axes 2j and 2j + 1 at levels k0, k1 cost."""
    first, second, third = bounds[0], bounds[1], bounds[2]
    low, middle, high = levels[0], levels[1], levels[2]
    cells[:32] = 0
    for i in range(8):
        for g in range(32):
            v = y[i * 32 + g]
            cells[g] += (np.int32(v > first) + np.int32(v > second) + np.int32(v > third)) << np.int32(2 * i)
    for j in range(4):
        for g in range(32):
            x0, x1, w0, w1 = y[64 * j + g], y[64 * j + 32 + g], w[64 * j + g], w[64 * j + 32 + g]
            a, b, c = w0 * (x0 - low) * (x0 - low), w0 * (x0 - middle) * (x0 - middle), w0 * (x0 - high) * (x0 - high)
            d, e, f = w1 * (x1 - low) * (x1 - low), w1 * (x1 - middle) * (x1 - middle), w1 * (x1 - high) * (x1 - high)
            at = 32 * j + g
            table[at], table[128 + at], table[256 + at] = a + d, b + d, c + d
            table[384 + at], table[512 + at], table[640 + at] = a + e, b + e, c + e
            table[768 + at], table[896 + at], table[1024 + at] = a + f, b + f, c + f


@njit(cache=True, nogil=True)
def _tables4(y: Any, w: Any, levels: Any, bounds: Any, cells: Any, table: Any) -> None:
    """Cells of the 64 groups, and table[256·k + 64·i + g]: what axis i at level k costs."""
    inverse = np.float32(1) / (bounds[1] - bounds[0])
    shift = np.float32(1) - bounds[0] * inverse
    cells[:64] = 0
    for i in range(4):
        for g in range(64):
            interval = min(max(y[i * 64 + g] * inverse + shift, np.float32(0)), np.float32(13))
            cells[g] += np.int32(interval) << np.int32(4 * i)
    for k in range(8):
        level = levels[k]
        for g in range(256):
            table[256 * k + g] = w[g] * (y[g] - level) * (y[g] - level)


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as an integer; of two positive numbers the greater one has the greater bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), build


@njit(inline="always")
def _key(entries: Any, table: Any, point: Any, group: Any) -> Any:
    """A point's cost above its number: the least key is the least cost, and of these the least number."""
    first = table[group + entries[point, np.uint64(0)]] + table[group + entries[point, np.uint64(1)]]
    cost = first + (table[group + entries[point, np.uint64(2)]] + table[group + entries[point, np.uint64(3)]])
    return (np.uint64(_bits(cost)) << np.uint64(16)) | point


@njit(cache=True, nogil=True)
def search(y: Any, w: Any, grid: Any, cells: Any, table: Any, ids: Any) -> None:
    """Numbers of the points nearest to the groups of y, f32 [256] axis by axis, weights alike → ids int32 [G].

    cells int32 [64], table f32 [2048]: scratch.
    """
    if grid.points.shape[1] == 8:
        _tables8(y, w, grid.levels, grid.bounds, cells, table)
    else:
        _tables4(y, w, grid.levels, grid.bounds, cells, table)
    four, groups = np.uint64(4), 256 // grid.points.shape[1]
    for g in range(groups):  # by itself, so that the lists' way from memory overlaps
        ids[g] = grid.lists[np.uint64(grid.starts[np.uint64(cells[g])])]
    for g in range(groups):
        cell, group = np.uint64(cells[g]), np.uint64(g)
        at, end = np.uint64(grid.starts[cell]), np.uint64(grid.starts[cell + np.uint64(1)])
        if end - at > np.uint64(1):
            best = ~np.uint64(0)
            while at < end:
                p0, p1 = np.uint64(grid.lists[at]), np.uint64(grid.lists[at + np.uint64(1)])
                p2, p3 = np.uint64(grid.lists[at + np.uint64(2)]), np.uint64(grid.lists[at + np.uint64(3)])
                k0, k1 = _key(grid.entries, table, p0, group), _key(grid.entries, table, p1, group)
                k2, k3 = _key(grid.entries, table, p2, group), _key(grid.entries, table, p3, group)
                first, second = min(k0, k1), min(k2, k3)
                best = min(best, first, second)
                at += four
            ids[g] = np.int32(best & np.uint64(0xFFFF))


def nearest_reference(y: F32, w: F32, found: F32) -> NDArray[np.intp]:
    """Groups y f32 [K, axes], weights w alike, points [N, axes] → [K]: by trying every point, in float64."""
    distance = (w[:, None].astype(np.float64) * (y[:, None].astype(np.float64) - found[None]) ** 2).sum(axis=2)
    return cast("NDArray[np.intp]", distance.argmin(axis=1))

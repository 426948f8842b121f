"""GPTQ onto any codec with a grid: columns are rounded one after the other, and what each loses is made up for by the rest.

    minimise  (W − Q) H (W − Q)ᵀ,  row by row, H = mean of x xᵀ over the inputs  [C, C]

    H = M Mᵀ, M upper triangular;  U = M⁻¹, so that H⁻¹ = Uᵀ U
    for each block of the codec, in the order of its columns:
        scales by the codec's own encoder from what W has become, a column's importance being 1 / U_jj²
        for each column j:   q = nearest level;   W[:, k] −= (W[:, j] − q) · U_jk / U_jj   for all k > j

(Frantar et al., arXiv 2210.17323, eq. 2–4; 1 / U_jj² is what an error in column j costs once all later columns have made up for
it.) Blocks lie where the codec has them; `order` says in which order they, and the columns within one, are taken. Columns that
no input ever reaches (H_jj = 0: the zeros of a widened model) cost nothing and take part in nothing.

Damping: λ · mean of diag H is added to the diagonal. A factorisation that fails is tried again with ten and a hundred times the
damping, and then is NotPositive, which callers report for that matrix; there is no fallback to an identity.

`quantize_reference` is the specification; `quantize` does the same on whole blocks, rows in numba. Lattice types: `gptq_lattice`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.grids import Grid, grid, lines, put_codes
from gptoss_convert.kernels.products import factor

F64 = NDArray[np.float64]
LEAST_DAMPING = 0.01


class NotPositive(ValueError):
    """A Hessian that no damping makes positive definite."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian. order: int [C], positions → columns; u: f32 [C, C] in that order; damping as used."""

    order: NDArray[np.intp]
    u: F32
    live: NDArray[np.bool_]
    damping: float


@dataclass(frozen=True)
class Rounded:
    """rows: uint8 [R, row bytes]; values: f32 [R, C], decoded; loss: tr (W − Q) H (W − Q)ᵀ over tr W H Wᵀ."""

    rows: U8
    values: F32
    loss: float


def block_order(diagonal: F64, block: int, *within: int) -> NDArray[np.intp]:
    """Blocks by falling mean H_jj, and in each its runs of `within` columns, the longer ones first, none: single columns. Ties
    stay in place. The costliest are rounded while most can still make up for them; blocks stay whole, they share scales.
    """
    order = np.arange(len(diagonal)).reshape(1, -1)
    for size in (block, *(within or (1,))):
        runs = order.reshape(len(order), -1, size)
        first = np.argsort(-diagonal[runs].sum(axis=2), axis=1, kind="stable")
        order = np.take_along_axis(runs, first[:, :, None], axis=1).reshape(-1, size)
    return order.reshape(-1)


def factorise(hessian: torch.Tensor, block: int, *within: int, damping: float = LEAST_DAMPING) -> Factor:
    """H [C, C] symmetric, any float dtype and device → its Factor, columns ordered as `block_order` says; NotPositive."""
    h = hessian.to(torch.float64)
    diagonal = h.diagonal().cpu().numpy().copy()
    if not np.isfinite(diagonal).all():
        raise NotPositive("the Hessian is not finite")
    live = diagonal > 0
    if not live.any():
        raise NotPositive("no input ever reached this matrix")
    order = block_order(diagonal, block, *within)
    mean = float(diagonal[live].mean())
    at = torch.as_tensor(order, device=h.device)
    h = h[at][:, at]
    dead = torch.as_tensor(~live[order], device=h.device)
    h[dead, :] = 0
    h[:, dead] = 0
    for tried in (damping, 10 * damping, 100 * damping):
        damped = h.clone()
        damped.diagonal().add_(tried * mean)
        u = factor(damped)
        if u is not None and bool(torch.isfinite(u).all()):
            return Factor(order, u.to(torch.float32).cpu().numpy(), live, tried)
    raise NotPositive(f"the Hessian is not positive definite, even with {tried:g} of its mean added")


def importance_of(factor: Factor) -> F32:
    """f32 [C] in the order of columns, mean 1: 1 / U_jj², nothing where no input comes."""
    weight = np.zeros(len(factor.order), np.float32)
    weight[factor.order] = 1 / factor.u.diagonal() ** 2
    weight[~factor.live] = 0
    weight /= weight[factor.live].mean()
    return weight


def _grid(codec: str) -> Grid:
    found = grid(codec)
    if found is None or CODECS[codec].encode is None:
        raise ValueError(f"{codec} has no grid of its own for each value")
    return found


def quantize(weight: F32, factor: Factor, codec: str) -> U8:
    """W f32 [R, C] → rows uint8 [R, row bytes]; ValueError where the codec cannot hold a value."""
    g, c = _grid(codec), CODECS[codec]
    encode = c.encode
    assert encode is not None
    columns, block = weight.shape[1], g.block
    importance = importance_of(factor)
    left = torch.from_numpy(np.ascontiguousarray(weight[:, factor.order]))
    u = torch.from_numpy(factor.u)
    out = np.empty((weight.shape[0], c.row_bytes(columns)), np.uint8)
    by_level = np.argsort(g.levels, kind="stable").astype(np.uint8)
    sorted_levels = g.levels[by_level]
    codes = np.empty((weight.shape[0], block), np.uint8)
    for at in range(0, columns, block):
        here = factor.order[at : at + block]
        first = int(here.min())
        inside = here - first
        now = left[:, at : at + block].numpy()
        whole = np.empty_like(now)
        whole[:, inside] = now
        rows = encode(whole, importance[first : first + block])
        slope, offset = lines(g, rows)
        error = np.empty_like(now)
        _round_block(
            np.ascontiguousarray(now), np.ascontiguousarray(slope[:, inside]), np.ascontiguousarray(offset[:, inside]),
            np.ascontiguousarray(factor.u[at : at + block, at : at + block]), sorted_levels, by_level, inside, codes, error,
        )  # fmt: skip
        start = first // block * c.block_bytes
        out[:, start : start + c.block_bytes] = put_codes(g, rows, codes)
        if at + block < columns:
            left[:, at + block :].addmm_(torch.from_numpy(error), u[at : at + block, at + block :], alpha=-1)
    return out


@njit(cache=True, nogil=True, fastmath={"contract", "nsz", "arcp"})
def _round_block(
    w: Any, slope: Any, offset: Any, u: Any, levels: Any, code_of: Any, inside: Any, codes: Any, error: Any
) -> None:
    """One block's columns, positions in order; error f32 [R, block] in units of U_jj. `w` is used up."""
    even = levels[levels.size - 1] - levels[0] == levels.size - 1
    for r in range(w.shape[0]):
        for j in range(w.shape[1]):
            a, b, x = slope[r, j], offset[r, j], w[r, j]
            index = _nearest((x - b) / a if a != 0 else np.float32(0), levels, even)
            lost = (x - (a * levels[index] + b)) / u[j, j]
            codes[r, inside[j]] = code_of[index]
            error[r, j] = lost
            for k in range(j + 1, w.shape[1]):
                w[r, k] -= lost * u[j, k]


@njit(cache=True, nogil=True)
def _nearest(x: Any, levels: Any, even: Any) -> Any:
    """Index of the level nearest to x, the lower of two that are as near."""
    last = levels.size - 1
    if even:
        return min(max(np.int64(np.ceil(x - levels[0] - np.float32(0.5))), 0), last)
    index = 0
    while index < last and x > (levels[index] + levels[index + 1]) * np.float32(0.5):
        index += 1
    return index


def quantize_reference(weight: F32, factor: Factor, codec: str) -> U8:
    """The same, a column at a time in float64: what `quantize` is held against."""
    g, c = _grid(codec), CODECS[codec]
    encode = c.encode
    assert encode is not None
    importance = importance_of(factor)
    w = weight.astype(np.float64)[:, factor.order]
    u = factor.u.astype(np.float64)
    rows = np.empty((weight.shape[0], c.row_bytes(weight.shape[1])), np.uint8)
    for j, column in enumerate(factor.order):
        first = column // g.block * g.block
        part = slice(first // g.block * c.block_bytes, (first // g.block + 1) * c.block_bytes)
        if j % g.block == 0:
            whole = np.empty((weight.shape[0], g.block), np.float32)
            whole[:, factor.order[j : j + g.block] - first] = w[:, j : j + g.block]
            rows[:, part] = encode(whole, importance[first : first + g.block])
            slope, offset = (line.astype(np.float64) for line in lines(g, rows[:, part]))
            codes = np.empty((weight.shape[0], g.block), np.uint8)
        a, b = slope[:, column - first], offset[:, column - first]
        wanted = np.divide(w[:, j] - b, a, out=np.zeros_like(b), where=a != 0)
        chosen = np.abs(wanted[:, None] - g.levels).argmin(axis=1)
        codes[:, column - first] = chosen
        lost = (w[:, j] - (a * g.levels[chosen] + b)) / u[j, j]
        w[:, j + 1 :] -= lost[:, None] * u[j, j + 1 :]
        if j % g.block == g.block - 1:
            rows[:, part] = put_codes(g, rows[:, part], codes)
    return rows


def relative_loss(weight: F32, values: F32, hessian: torch.Tensor) -> float:
    """tr (W − Q) H (W − Q)ᵀ / tr W H Wᵀ: the share of the output's energy that rounding takes."""
    h = hessian.to(torch.float32).cpu()
    lost, w = torch.from_numpy(weight - values), torch.from_numpy(weight)
    return float(((lost @ h) * lost).sum(dtype=torch.float64) / ((w @ h) * w).sum(dtype=torch.float64))

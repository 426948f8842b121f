"""GPTQ onto the lattice types, IQ2 and IQ3, whose codes name eight or four values at once.

The rule is `gptq`'s, with H = M Mᵀ and U = M⁻¹, by super-blocks of 256 columns. In place of a column's nearest level there is a
group's nearest point (as BlockLDLQ in QuIP#, Tseng et al., arXiv 2402.04396, and GPTVQ, van Baalen et al., arXiv 2402.15319):

    when a super-block begins: d and scales by the codec's own encoder from what W has become, importance 1 / U_jj²
    for some d near it:                                            the one with the least Σ e² is kept, row by row
        for each part of columns that share a scale:
            for some scales near the encoder's:                    likewise, by the part's Σ e²
                for each octet of columns B:
                    q_B = ± scale · point, signs as the format has them, nearest to W_B by Σ (W_j − q_j)² / U_jj²
                    for j in B:   e_j = (W_j − q_j) / U_jj;   W_k −= e_j · U_jk   for all k > j

Σ e² over all columns is tr (W − Q) H (W − Q)ᵀ, over some of them what they add to it once the later ones have made up for them.
Where an even number of eight values must be negative and an odd one is, the sign turns with the least |W_j| / U_jj², and, once
the points are known, the least |W_j| · point_j / U_jj². Super-blocks, the parts in one and the octets in one go by falling mean
square; the columns of an octet, which are searched together, stay in place.

`round_reference` is the specification, in float64; `round_onto` does the same with 32 rows at once (`gptq_lattice_work`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gptoss_convert.kernels import iq2, iq3, lattice
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.gptq import Factor, importance_of
from gptoss_convert.kernels.gptq_lattice_work import OCTET, new_work, round_block
from gptoss_convert.kernels.lattice import SUPER
from gptoss_convert.kernels.lattice_bits import Packed
from gptoss_convert.kernels.lattice_fit import fit

F64 = NDArray[np.float64]
RULES = iq2.RULES | iq3.RULES
OFFSETS = (0, -1, 1, 2)  # from the encoder's scale of a part; the sooner of two that lose the same
FACTORS = (1.0, 1.04)  # of the encoder's d


def runs(codec: str) -> tuple[int, int, int]:
    """Super-block, part and octet: how `gptq.factorise` must order the columns."""
    return SUPER, RULES[codec].part, OCTET


def quantize(weight: F32, factor: Factor, codec: str) -> U8:
    """W f32 [R, C], a Factor by the codec's `runs` → rows uint8 [R, row bytes]; ValueError where it cannot hold a value."""
    return RULES[codec].pack(round_onto(weight, factor, codec)[0])


def round_onto(weight: F32, factor: Factor, codec: str) -> tuple[Packed, F32]:
    """W f32 [R, C] → what it becomes, and e f32 [R, C] in the factor's order."""
    rule, found = RULES[codec], lattice.grid(codec)
    importance = importance_of(factor)
    left = torch.from_numpy(np.ascontiguousarray(weight[:, factor.order]))
    u = torch.from_numpy(factor.u)
    out, error, work = _empty(weight, codec), np.empty_like(weight), new_work()
    for at in range(0, weight.shape[1], SUPER):
        part = slice(at, at + SUPER)
        first, inside = _columns(factor, at)
        now = np.ascontiguousarray(left[:, part].numpy())
        given = _given(now, inside, importance[first : first + SUPER], codec)
        lost = np.empty_like(now)
        round_block(
            now, np.ascontiguousarray(factor.u[part, part]), _weight(factor, at), inside, given, first // SUPER, found,
            rule.part, rule.even, np.float32(rule.step), np.array(OFFSETS), np.array(FACTORS, np.float32), work, out, lost,
        )  # fmt: skip
        error[:, part] = lost
        left[:, at + SUPER :].addmm_(torch.from_numpy(lost), u[part, at + SUPER :], alpha=-1)
    return out, error


def _empty(weight: F32, codec: str) -> Packed:
    rows, blocks = weight.shape[0], weight.shape[1] // SUPER
    axes = lattice.points(codec).shape[1]
    return Packed(
        np.zeros((rows, blocks), np.float32),
        np.zeros((rows, blocks, SUPER // RULES[codec].part), np.uint8),
        np.zeros((rows, blocks, SUPER // axes), np.uint16),
        np.zeros((rows, blocks, SUPER // OCTET), np.uint8),
    )


def _columns(factor: Factor, at: int) -> tuple[int, NDArray[np.intp]]:
    """The first column of the super-block that begins at a position, and [256]: positions → its columns."""
    here = factor.order[at : at + SUPER]
    first = int(here.min())
    return first, here - first


def _given(now: F32, inside: NDArray[np.intp], importance: F32, codec: str) -> Packed:
    """d and scales of one super-block, f32 [R, 256] by position, from the codec's own encoder."""
    rule = RULES[codec]
    whole = np.empty_like(now)
    whole[:, inside] = now
    return fit(whole, importance, lattice.grid(codec), rule.part, rule.even, rule.step)


def _weight(factor: Factor, at: int) -> F32:
    """f32 [256] by position: 1 / U_jj², of which the largest is 1."""
    weight: F64 = 1 / factor.u.diagonal()[at : at + SUPER].astype(np.float64) ** 2
    return np.asarray(weight / weight.max(), np.float32)


def round_reference(weight: F32, factor: Factor, codec: str) -> tuple[Packed, F32]:
    """The same, an octet at a time in float64: what `round_onto` is held against."""
    w, u = weight.astype(np.float64)[:, factor.order], factor.u.astype(np.float64)
    out, error = _empty(weight, codec), np.empty_like(w)
    importance = importance_of(factor)
    for at in range(0, weight.shape[1], SUPER):
        part = slice(at, at + SUPER)
        first, inside = _columns(factor, at)
        given = _given(w[:, part].astype(np.float32), inside, importance[first : first + SUPER], codec)
        least = np.full(len(w), np.inf)
        for times in FACTORS:
            d = (given.d * np.float32(times)).astype(np.float16).astype(np.float32)
            made = Packed(d, given.scales.copy(), given.ids.copy(), given.signs.copy())
            lost = _block_reference(w[:, part], u[part, part], _weight(factor, at), inside, made, codec)
            better = (lost**2).sum(axis=1) < least
            least[better] = (lost**2).sum(axis=1)[better]
            error[better, part] = lost[better]
            block = first // SUPER
            out.d[better, block], out.scales[better, block] = made.d[better, 0], made.scales[better, 0]
            out.ids[better, block], out.signs[better, block] = made.ids[better, 0], made.signs[better, 0]
        w[:, at + SUPER :] -= error[:, part] @ u[part, at + SUPER :]
    return out, error.astype(np.float32)


def _block_reference(w: F64, u: F64, weight: F32, inside: NDArray[np.intp], made: Packed, codec: str) -> F64:
    """One super-block [R, 256] with its d and, about, its scales → e [R, 256]; scales, points and signs into `made`."""
    rule, points = RULES[codec], lattice.points(codec)
    w, error, each = w.copy(), np.empty_like(w), OCTET // points.shape[1]
    for start in range(0, SUPER, rule.part):
        here = slice(start, start + rule.part)
        own, least = made.scales[:, 0, inside[start] // rule.part].astype(np.int64), np.full(len(w), np.inf)
        for offset in OFFSETS:
            scales = np.clip(own + offset, 0, 15)
            scale = made.d[:, 0].astype(np.float64) * rule.step * (2 * scales + 1)
            x, lost = w[:, here].copy(), np.empty((len(w), rule.part))
            chosen = []
            for j in range(0, rule.part, OCTET):
                octet = slice(start + j, start + j + OCTET)
                ids, signs = _octet_reference(x[:, j : j + OCTET], scale, weight[octet], points, rule.even)
                chosen.append((inside[octet.start] // OCTET, ids, signs))
                q = scale[:, None] * points[ids].reshape(len(w), OCTET) * signs
                for i in range(j, j + OCTET):
                    lost[:, i] = (x[:, i] - q[:, i - j]) / u[start + i, start + i]
                    x[:, i + 1 :] -= lost[:, i, None] * u[start + i, start + i + 1 : here.stop]
            better = (lost**2).sum(axis=1) < least
            least[better], error[better, here] = (lost**2).sum(axis=1)[better], lost[better]
            made.scales[better, 0, inside[start] // rule.part] = scales[better]
            for place, ids, signs in chosen:
                made.ids[better, 0, each * place : each * place + each] = ids[better]
                made.signs[better, 0, place] = np.packbits(signs < 0, axis=1, bitorder="little")[better, 0]
        w[:, here.stop :] -= error[:, here] @ u[here, here.stop :]
    return error


def _octet_reference(
    x: F64, scale: F64, weight: F32, points: F32, even: bool
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """[R, 8] → the points nearest to its magnitudes [R, 8 / axes], and signs ±1 [R, 8]."""
    y = np.divide(x, scale[:, None], out=np.zeros_like(x), where=scale[:, None] > 0)
    signs, size, rows = np.where(y < 0, -1, 1), np.abs(y), np.arange(len(y))
    turned = (weight * size).argmin(axis=1)
    odd = even & ((y < 0).sum(axis=1) % 2 == 1)
    size[rows, turned] *= np.where(odd, -1, 1)
    axes = points.shape[1]
    ids = lattice.nearest_reference(size.reshape(-1, axes), np.tile(weight, len(y)).reshape(-1, axes), points)
    turned = (weight * np.abs(size) * points[ids].reshape(len(y), OCTET)).argmin(axis=1)
    signs[rows, turned] *= np.where(odd, -1, 1)
    return ids.reshape(len(y), -1), signs

"""Groups of plain integers with a scale, as safetensors formats hold them: int4 and int8, one group or a row at a time.

    symmetric    value = scale · q                 q: −2^(b−1) … 2^(b−1) − 1          scale > 0
    zero point   value = scale · (q − zero)        q, zero: 0 … 2^b − 1, integers     scale > 0
    offset       value = scale · q + offset        q: 0 … 2^b − 1                      scale > 0

Groups are consecutive columns of a row; a group of all columns is a channel. Codes are returned unpacked, one a byte: each
target packs them its own way. Scales and offsets are float32 that the storage type (float16, bfloat16 or float32) holds.

Minimised is Σ w (x − decoded)² of each group, w the column's importance or 1: several ranges, then least-squares scales of
the best one's integers, each rounded to the storage type before it is judged; the earliest of equals. MXFP4-valued groups
come back exactly in int8 of any storage type, their scale a power of two. Groups are brought near 1 by a power of two
first, so any finite float32 will do; ValueError where float16 cannot hold the scale, and for offsets above 2^126.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.inputs import Unfit, prepare
from gptoss_convert.kernels.lane_sums import affine_error, affine_sums, means
from gptoss_convert.kernels.lanes import (
    F0,
    F16_MAX,
    KERNEL,
    LANES,
    bounds,
    coarse,
    f16,
    f16_nearest,
    gather,
    gather_cyclic,
    nearest,
    sizes,
)

Kind = Literal["symmetric", "zero", "offset"]
Storage = Literal["f16", "bf16", "f32"]
_STORAGE: dict[Storage, int] = {"f16": 0, "bf16": 1, "f32": 2}
_KIND: dict[Kind, int] = {"symmetric": 0, "zero": 1, "offset": 2}
_KEEP_8 = np.float32(2**16 + 1)


@dataclass(frozen=True)
class IntGroups:
    """Codes [R, C] (int8 if symmetric, else uint8); scales f32 [R, C/group]; zeros uint8 or offsets f32, or neither."""

    codes: NDArray[Any]
    scales: F32
    zeros: NDArray[np.uint8] | None = None
    offsets: F32 | None = None


def int_decode(groups: IntGroups) -> F32:
    """→ f32 [R, C], computed in float32."""
    rows, count = groups.scales.shape
    q = groups.codes.reshape(rows, count, -1).astype(np.float32)
    if groups.zeros is not None:
        q -= groups.zeros[..., None].astype(np.float32)
    values = q * groups.scales[..., None]
    if groups.offsets is not None:
        values += groups.offsets[..., None]
    return cast(F32, values.reshape(rows, -1))


def int_encode(
    values: F32,
    bits: int,
    group: int,
    kind: Kind = "symmetric",
    storage: Storage = "bf16",
    importance: F32 | None = None,
) -> IntGroups:
    """f32 [R, C], C a multiple of `group`, importance f32 [C] or None → groups of `bits`-bit integers (2 to 8)."""
    values, w, tile = prepare(values, importance, group)
    if storage == "f16" or kind == "offset":
        of_scale = F16_MAX if kind == "offset" else F16_MAX * 2 ** (bits - 1)
        _refuse_beyond(values, of_scale if storage == "f16" else 2.0**126)
    blocks = values.reshape(-1, group)
    codes = np.empty(blocks.shape, np.uint8)
    scales, extra = np.empty(len(blocks), np.float32), np.empty(len(blocks), np.float32)
    x, s, q = (
        np.empty((group, LANES), np.float32),
        np.empty((16, LANES), np.float32),
        np.empty((group, LANES), np.uint8),
    )
    steps, exact = _steps(bits, kind, importance is not None), np.array((96, 64) if bits == 8 else (), np.float32)
    _encode(
        blocks, w, 2**bits - 1, _KIND[kind], _STORAGE[storage], steps, exact, 1 if importance is None else 2,
        x, tile, s, np.empty(LANES, np.bool_), q, codes, scales, extra,
    )  # fmt: skip
    shape = (values.shape[0], -1)
    if kind == "symmetric":
        signed = (
            (codes ^ np.uint8(2 ** (bits - 1))).view(np.int8)
            if bits == 8
            else codes.view(np.int8) - np.int8(2 ** (bits - 1))
        )
        return IntGroups(signed.reshape(values.shape), scales.reshape(shape))
    shaped = codes.reshape(values.shape)
    if kind == "zero":
        return IntGroups(shaped, scales.reshape(shape), zeros=extra.astype(np.uint8).reshape(shape))
    return IntGroups(shaped, scales.reshape(shape), offsets=extra.reshape(shape))


def _steps(bits: int, kind: Kind, wide: bool) -> F32:
    """Candidates: how many steps the largest magnitude (symmetric), or the range of the values, takes."""
    full = 2 ** (bits - 1) if kind == "symmetric" else 2**bits - 1
    shares = [1.0, 1 - 1 / full, 1 - 0.5 / full, 0.96, 1.04]
    if wide:
        shares += [0.98, 0.94, 0.91, 0.88, 0.84, 1.02, 1.08, 1.12]
    return np.array([full * share for share in shares], np.float32)


def _refuse_beyond(values: F32, limit: float) -> None:
    bad = np.argwhere(np.abs(values) > limit)
    if len(bad):
        row, column = bad[0]
        raise Unfit(float(values[row, column]), int(row), int(column), "exceeds what the group can hold")


@njit(**KERNEL)
def _store(value: Any, storage: Any, unit: Any) -> Any:
    """value · unit as the storage type holds it, over unit."""
    if storage == 2:
        return value
    if storage == 0:
        return f16(value * unit) / unit
    spread = value * _KEEP_8
    return spread - (spread - value)


@njit(**KERNEL)
def _encode(
    blocks: Any, importance: Any, top: Any, kind: Any, storage: Any, steps: Any, exact: Any, rounds: Any,
    x: Any, w: Any, s: Any, flag: Any, q: Any, codes: Any, scales: Any, extra: Any,
) -> None:  # fmt: skip
    unit, d, base, inverse = s[0], s[1], s[2], s[3]
    high = np.float32(top)
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        _normalise(x, unit)
        some = exact.size > 0 and coarse(x, flag)
        _search(x, w, steps, exact, some, flag, high, kind, storage, rounds, unit, d, base, inverse, s[4:])
        for k in range(LANES):
            inverse[k] = np.float32(1) / d[k] if d[k] > F0 else F0
        for j in range(x.shape[0]):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max((x[j, k] - base[k]) * inverse[k], F0), high)))
        for k in range(min(LANES, blocks.shape[0] - first)):
            scales[first + k] = d[k] * unit[k]
            extra[first + k] = nearest(-base[k] * inverse[k]) if kind == 1 else base[k] * unit[k]
            for j in range(x.shape[0]):
                codes[first + k, j] = q[j, k]


@njit(**KERNEL)
def _normalise(x: Any, unit: Any) -> None:
    """Divide each lane by a power of two near its largest magnitude, within 2^±120."""
    sizes(x, unit)
    for k in range(LANES):
        unit[k] = 2.0 ** min(max(np.floor(np.log2(np.float64(unit[k]))), -120.0), 120.0) if unit[k] > F0 else 1.0
    for j in range(x.shape[0]):
        for k in range(LANES):
            x[j, k] /= unit[k]


@njit(**KERNEL)
def _search(
    x: Any, w: Any, steps: Any, exact: Any, some: Any, flag: Any, high: Any, kind: Any, storage: Any, rounds: Any,
    unit: Any, best: Any, base: Any, inverse: Any, s: Any,
) -> None:  # fmt: skip
    """Candidates in order: the steps, the exact ones (in the lanes of `flag`), refits of the best so far."""
    low, span, d, b, error, least = s[0], s[1], s[2], s[3], s[4], s[5]
    bounds(x, low, span)
    fitted = steps.size + exact.size
    for i in range(fitted + rounds):
        if i >= steps.size and i < fitted and not some:
            continue
        if i >= fitted:
            _refit(x, w, high, kind, best, base, inverse, d, b, s[6:])
        for k in range(LANES):
            size = max(abs(low[k]), abs(span[k]))
            if i < steps.size:
                bottom = low[k] if kind == 2 else min(low[k], F0)
                d[k] = (size if kind == 0 else max(span[k], bottom if kind == 2 else F0) - bottom) / steps[i]
            elif i < fitted:
                d[k] = size / exact[i - steps.size]
            d[k] = _store(d[k], storage, unit[k])
            inverse[k] = np.float32(1) / d[k] if d[k] > F0 else F0
            if kind == 2:
                b[k] = low[k] if i < fitted else b[k]
                b[k] = f16_nearest(b[k] * unit[k]) / unit[k] if storage == 0 else _store(b[k], storage, unit[k])
            else:
                zero = (
                    (high + np.float32(1)) / np.float32(2)
                    if kind == 0
                    else nearest(min(-min(low[k], F0) * inverse[k], high))
                )
                b[k] = -d[k] * zero
        affine_error(x, w, d, inverse, b, high, error)
        for k in range(LANES):
            better = i == 0 or (error[k] < least[k] and (i < steps.size or i >= fitted or flag[k]))
            best[k] = d[k] if better else best[k]
            base[k] = b[k] if better else base[k]
            least[k] = error[k] if better else least[k]


@njit(**KERNEL)
def _refit(x: Any, w: Any, high: Any, kind: Any, best: Any, base: Any, inverse: Any, d: Any, b: Any, s: Any) -> None:
    """Least squares for the integers of the best candidate: d, and the offset where there is one, into d and b."""
    q1, qx, qq, sw, sv = s[0], s[1], s[2], s[3], s[4]
    for k in range(LANES):
        inverse[k] = np.float32(1) / best[k] if best[k] > F0 else F0
    means(x, w, base, sw, sv)
    affine_sums(x, w, inverse, base, high, q1, qx, qq)
    for k in range(LANES):
        zero = -base[k] * inverse[k]
        if kind == 2:
            det = sw[k] * qq[k] - q1[k] * q1[k]
            good = det > F0
            d[k] = max((sw[k] * qx[k] - sv[k] * q1[k]) / det, F0) if good else best[k]
            b[k] = base[k] + (qq[k] * sv[k] - q1[k] * qx[k]) / det if good else base[k]
        else:
            # x = d (q − zero): from the sums over v = x − base those over x, whose base adds d · zero.
            top = (qx[k] + base[k] * q1[k]) - zero * (sv[k] + base[k] * sw[k])
            bottom = qq[k] - np.float32(2) * zero * q1[k] + zero * zero * sw[k]
            d[k] = max(top / bottom, F0) if bottom > F0 else best[k]

"""The rotary embedding's tables, as a runtime that has no YaRN of its own wants them: cosines and sines by position.

    f_i      = theta^(−2i/d)                                        i = 0 … d/2 − 1
    f'_i     = f_i / factor · ramp_i + f_i · (1 − ramp_i)            ramp: 0 below `low`, 1 above `high`, linear between
    low, high = d · ln(original / (2π·beta)) / (2 ln theta)          of beta_fast and beta_slow; truncate: floor and ceiling
    cos[p, i] = cos(p · f'_i) · attention                            attention = 0.1 · ln(factor) + 1

Frequencies and angles are float32, computed in the order in which transformers computes them, and equal its bit for bit; for
that the power is torch's (SLEEF's `pow` of float32, 32 at a time, which errs by 0.53 units in the last place; what remains of a
width that is no multiple of 64 is rounded correctly). Cosine and sine of the float32 angle are rounded correctly to float32,
then multiplied by the attention factor. torch takes its own from MKL, within one unit in the last place, and MKL's last bit is
not the same on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32

ROWS = 4096  # positions at a time: float64 of them is small
ONE = np.float32(1)
VECTOR = 32  # values that torch raises to a power together
_LOGARITHM = (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
_EXPONENTIAL = (
    0.00136324646882712841033936,
    0.00836596917361021041870117,
    0.0416710823774337768554688,
    0.166665524244308471679688,
    0.499999850988388061523438,
)


@dataclass(frozen=True)
class Yarn:
    """What a configuration says of the rotary embedding. dim: a head's width."""

    dim: int
    theta: float
    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention: float | None


def frequencies(yarn: Yarn) -> F32:
    """f' as float32 [dim/2]."""
    exponents = np.arange(0, yarn.dim, 2, dtype=np.float32) / np.float32(yarn.dim)
    powers = _powers(yarn.theta, exponents)
    apart = ONE / powers
    together = ONE / (np.float32(yarn.factor) * powers)
    low, high = _bounds(yarn)
    if low == high:
        high += 0.001
    ramp = (np.arange(yarn.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = ONE - np.clip(ramp, np.float32(0), ONE)
    found: F32 = together * (ONE - keep) + apart * keep
    return found


def _powers(base: float, exponents: F32) -> F32:
    """base to the power of each exponent."""
    whole = len(exponents) // VECTOR * VECTOR
    rest = np.power(np.float64(base), exponents[whole:].astype(np.float64)).astype(np.float32)
    return np.concatenate([_exponential(_logarithm(base) * exponents[:whole].astype(np.float64)), rest])


def _logarithm(x: float) -> np.float64:
    """ln x by SLEEF's `logk`: the series of artanh after a power of two; its pairs of float32 are float64 here."""
    x = float(np.float32(x))
    exponent = math.floor(math.log2(x / 0.75))
    mantissa = x / 2.0**exponent
    ratio = np.float64((mantissa - 1) / (mantissa + 1))
    square = ratio * ratio
    series = _horner(_LOGARITHM, np.array([square], np.float64).astype(np.float32))[0]
    third = np.float64(np.float32(0.66666662693023681640625)) + np.float64(np.float32(3.69183861259614332084311e-09))
    ln2 = np.float64(np.float32(0.69314718246459960938)) + np.float64(np.float32(-1.904654323148236017e-09))
    return np.float64(ln2 * exponent + 2 * ratio + square * ratio * (square * np.float64(series) + third))


def _exponential(x: NDArray[np.float64]) -> F32:
    """e to the power of x by SLEEF's `expk`."""
    halvings = np.rint(x.astype(np.float32) * np.float32(1 / math.log(2))).astype(np.float64)
    small = x - halvings * np.float64(np.float32(0.693145751953125))
    small -= halvings * np.float64(np.float32(1.428606765330187045e-06))
    series = _horner(_EXPONENTIAL, small.astype(np.float32)).astype(np.float64)
    found: F32 = np.ldexp((1 + (small + small * small * series)).astype(np.float32), halvings.astype(np.int64))
    return found


def _horner(coefficients: tuple[float, ...], x: F32) -> F32:
    """A polynomial in float32, each step a fused multiplication and addition: one rounding."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = (total.astype(np.float64) * x + np.float64(np.float32(coefficient))).astype(np.float32)
    return total


def _bounds(yarn: Yarn) -> tuple[float, float]:
    def dimension(rotations: float) -> float:
        turns = yarn.original / (rotations * 2 * math.pi)
        return yarn.dim * math.log(turns) / (2 * math.log(yarn.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, yarn.dim - 1)


def attention_factor(yarn: Yarn) -> float:
    """What cosines and sines are multiplied by."""
    if yarn.attention is not None:
        return yarn.attention
    return 1.0 if yarn.factor <= 1 else 0.1 * math.log(yarn.factor) + 1.0


def tables(yarn: Yarn, positions: int) -> tuple[bytes, bytes]:
    """Cosines and sines, each float32 [positions, dim/2], little-endian."""
    parts = [(cosines.tobytes(), sines.tobytes()) for _, cosines, sines in table_rows(yarn, positions)]
    return b"".join(part[0] for part in parts), b"".join(part[1] for part in parts)


def table_rows(yarn: Yarn, positions: int) -> Iterator[tuple[int, F32, F32]]:
    """The same some positions at a time: (first position, cosines, sines), each f32 [up to ROWS, dim/2], little-endian."""
    f, scale = frequencies(yarn), np.float32(attention_factor(yarn))
    for start in range(0, positions, ROWS):
        places = np.arange(start, min(start + ROWS, positions), dtype=np.float32)
        angles = (places[:, None] * f).astype(np.float64)
        cosines, sines = ((made(angles).astype("<f4") * scale).astype("<f4") for made in (np.cos, np.sin))
        yield start, cosines, sines

"""The rotary embedding's tables, as a runtime that has no YaRN of its own wants them: cosines and sines by position.

    f_i      = theta^(−2i/d)                                        i = 0 … d/2 − 1
    f'_i     = f_i / factor · ramp_i + f_i · (1 − ramp_i)            ramp: 0 below `low`, 1 above `high`, linear between
    low, high = d · ln(original / (2π·beta)) / (2 ln theta)          of beta_fast and beta_slow; truncate: floor and ceiling
    cos[p, i] = cos(p · f'_i) · attention                            attention = 0.1 · ln(factor) + 1

Frequencies and angles are float32, computed in the order in which transformers computes them, and equal its bit for bit.
Cosine and sine of the float32 angle are rounded correctly to float32 (from float64), then multiplied by the attention factor.
torch's own cosine is within one unit in the last place and is not the same on every machine (MKL chooses by processor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gptoss_convert.kernels.floats import F32

ROWS = 4096  # positions at a time: float64 of them is small
ONE = np.float32(1)


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
    powers = np.power(np.float64(yarn.theta), exponents.astype(np.float64)).astype(np.float32)
    apart = ONE / powers
    together = ONE / (np.float32(yarn.factor) * powers)
    low, high = _bounds(yarn)
    if low == high:
        high += 0.001
    ramp = (np.arange(yarn.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = ONE - np.clip(ramp, np.float32(0), ONE)
    found: F32 = together * (ONE - keep) + apart * keep
    return found


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
    f, scale = frequencies(yarn), np.float32(attention_factor(yarn))
    cosines, sines = bytearray(), bytearray()
    for start in range(0, positions, ROWS):
        places = np.arange(start, min(start + ROWS, positions), dtype=np.float32)
        angles = (places[:, None] * f).astype(np.float64)
        cosines += (np.cos(angles).astype("<f4") * scale).astype("<f4").tobytes()
        sines += (np.sin(angles).astype("<f4") * scale).astype("<f4").tobytes()
    return bytes(cosines), bytes(sines)

"""One expert's forward pass on a few probes, and the numbers that compare two bodies of values.

    h = gate_up · x + bias;  a = clamp(gate, max 7) · σ(1.702 · gate) · (clamp(up, −7 … 7) + 1);  y = down · a + bias

(gpt_oss/torch/model.py and transformers' modeling_gpt_oss.py; limit and alpha are the config's.) Products are summed in 64
float32 lanes and these in float64, in a fixed order: the result depends neither on threads nor on chunks
nor on the machine's vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32

F64 = NDArray[np.float64]
ALPHA = 1.702


def probes(columns: int, count: int, seed: int) -> F32:
    """`count` probe vectors f32 [count, columns]: no two entries alike, no symmetry, the same on every machine.

    Entry i of probe p is a Weyl sequence (fractional parts of multiples of an irrational number) in −1 … 1: asymmetric
    under reversal, shifting, swapping of neighbours or halves, so that a permuted weight matrix changes the product.
    """
    i = np.arange(1, columns + 1, dtype=np.float64)
    golden = 0.6180339887498949
    steps = [golden + 0.1 * np.sqrt(2 + 3 * p + 7 * seed) for p in range(count)]
    return np.stack([2 * np.modf(i * step)[0] - 1 for step in steps]).astype(np.float32)


def product(rows: F32, vectors: F32) -> F64:
    """rows f32 [R, C] · vectors f32 [P, C] → f64 [P, R]."""
    out = np.empty((vectors.shape[0], rows.shape[0]), np.float64)
    _product(rows, np.ascontiguousarray(vectors), np.empty(64, np.float32), out)
    return out


@njit(cache=True, nogil=True)
def _product(rows: Any, vectors: Any, part: Any, out: Any) -> None:
    # 64 partial sums, added up in a fixed order: vectorised without leave to reassociate, and enough of them to hide the
    # latency of an addition.
    columns = rows.shape[1]
    whole = columns // 64 * 64
    for r in range(rows.shape[0]):
        for p in range(vectors.shape[0]):
            part[:] = 0
            for i in range(0, whole, 64):
                for lane in range(64):
                    part[lane] += rows[r, i + lane] * vectors[p, i + lane]
            total = 0.0
            for lane in range(64):
                total += np.float64(part[lane])
            for i in range(whole, columns):
                total += np.float64(rows[r, i]) * np.float64(vectors[p, i])
            out[p, r] = total


def activation(gate: F64, up: F64, limit: float) -> F64:
    """gate, up f64 [P, F] (biases added) → f64 [P, F]."""
    gate = np.minimum(gate, limit)
    up = np.clip(up, -limit, limit)
    with np.errstate(over="ignore"):
        result: F64 = gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)
        return result


def differences(a: F32, b: F32) -> tuple[int, float, float, float]:
    """(values that differ, Σ(a−b)², Σa², max |a−b|) of two bodies f32 [R, C]; a zero equals a negative zero."""
    if np.array_equal(a, b):
        return 0, 0.0, float(np.einsum("rc,rc->", a, a, dtype=np.float64)), 0.0
    count, error, square, largest = _differences(a, b)
    return int(count), float(error), float(square), float(largest)


@njit(cache=True, nogil=True)
def _differences(a: Any, b: Any) -> Any:
    count, error, square, largest = 0, 0.0, 0.0, 0.0
    for r in range(a.shape[0]):
        for c in range(a.shape[1]):
            x, y = np.float64(a[r, c]), np.float64(b[r, c])
            count += x != y
            error += (x - y) ** 2
            square += x * x
            largest = max(largest, abs(x - y))
    return count, error, square, largest

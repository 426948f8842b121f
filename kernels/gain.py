"""Restoring a row's gain: rounding to the nearest shrinks, and every row shrinks alike.

An encoder that minimises Σ w (x − q)² leaves an error that is uncorrelated with q, not with x: Σ w x q < Σ w x². At two bits
that is 7 % of every output, in the same direction in every matrix, which a random error of the same size is not: it adds up
through gate, up, down and the layers. Multiplying a row's scales by

    factor = Σ w x² / Σ w x q      (or, with a Hessian H, x H xᵀ / x H qᵀ)

makes the rounded row's output unbiased. The sum of squares grows by the square of what was missing; the next token's distribution
comes nearer (docs/measurements.md). Scales of 16 bits take the factor; MXFP4's and NVFP4's, in coarse steps, do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32, U8, bf16_to_f32, f32_to_bf16

# Where a block holds the scales (and minimums) that all its values are multiples of: byte offsets.
_F16 = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "q2_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
    "iq3_s": (0,), "iq3_xxs": (0,), "iq2_s": (0,), "iq2_xs": (0,), "iq2_xxs": (0,),
}  # fmt: skip
_BF16 = {"int4_g32": (0,), "int8_g32": (0,)}
LEAST, MOST = 0.8, 1.5  # a factor beyond says that the row is not held at all


def restore(rows: U8, codec: str, wanted: NDArray[np.float64], held: NDArray[np.float64]) -> U8:
    """Rows uint8 [R, row bytes], their scales times wanted / held, [R] each; as they are where the codec's cannot take it."""
    places, short = _F16.get(codec), False
    if places is None:
        places, short = _BF16.get(codec, ()), True
    if not places:
        return rows
    factor = np.divide(wanted, held, out=np.ones_like(wanted), where=held > 0)
    factor = np.where((factor >= LEAST) & (factor <= MOST), factor, 1.0).astype(np.float32)[:, None]
    blocks = rows.reshape(len(rows), -1, CODECS[codec].block_bytes).copy()
    for at in places:
        words = np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<u2")[:, :, 0]
        if short:
            scaled = f32_to_bf16(bf16_to_f32(words) * factor)
        else:
            values = words.view("<f2").astype(np.float32) * factor
            scaled = np.clip(values, -65504, 65504).astype("<f2").view("<u2")
        blocks[:, :, at : at + 2] = np.ascontiguousarray(scaled[:, :, None]).view(np.uint8)
    return blocks.reshape(rows.shape)


def restore_by_importance(rows: U8, codec: str, values: F32, importance: F32) -> U8:
    """Rows that hold `values` f32 [R, C], each with its gain restored, columns weighted by importance f32 [C]."""
    weighted = values.astype(np.float64) * importance
    held = CODECS[codec].decode(rows)
    return restore(rows, codec, np.einsum("rc,rc->r", weighted, values), np.einsum("rc,rc->r", weighted, held))

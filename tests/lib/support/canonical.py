"""The canonical tensors of a model, by their names and as [E, R, C] float32: what every source must read. No product here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from support.model import Model, dequantize
from support.release import hf_sources

F32 = NDArray[np.float32]


def stacked(values: NDArray[np.float32]) -> F32:
    """[E, R, C] of a vector, a matrix or a stack."""
    return values.reshape((1,) * (3 - values.ndim) + values.shape)


def canonical_values(model: Model) -> dict[str, F32]:
    """Canonical name → float32 [E, R, C]; experts decoded."""
    values: dict[str, F32] = {}
    for name, (source, first, end) in hf_sources(model.spec).items():
        if name.endswith("_blocks"):
            scales = model.tensors[source.replace("blocks", "scales")]
            values[name.removesuffix("_blocks")] = dequantize(model.tensors[source], scales).numpy()
        elif not name.endswith("_scales"):
            values[name] = stacked(model.tensors[source][first:end].float().numpy())
    return values

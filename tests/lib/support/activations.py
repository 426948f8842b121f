"""What transformers' gpt-oss multiplies its matrices with, by hooks: the oracle of calibration statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from support.checkpoints import Model

F64 = NDArray[np.float64]


def inputs_in_transformers(model: Model, sequences: Sequence[NDArray[np.int32]], layer: int) -> dict[str, list[F64]]:
    """Inputs [T, C] of a layer's q, o and mlp, and of the head, sequence by sequence."""
    made = model.transformers()
    seen: dict[str, list[F64]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: seen.setdefault(name, []).append(inputs[0].detach().double().numpy())

    block = made.model.layers[layer]
    for name, module in (
        ("q", block.self_attn.q_proj), ("o", block.self_attn.o_proj), ("head", made.lm_head), ("mlp", block.mlp.router),
    ):  # fmt: skip
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        for sequence in sequences:
            made(input_ids=torch.from_numpy(sequence.astype(np.int64))[None], use_cache=False)
    return {name: [a.reshape(-1, a.shape[-1]) for a in found] for name, found in seen.items()}

"""A model that says one thing: every token of a chain makes the next one all but certain, whatever came before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from support.checkpoints import Model

LOUD = 4.0  # a logit of 4 · hidden for the next token; of another in the chain, some half of that


def parrot(model: Model, chain: Sequence[int]) -> Model:
    """The model, changed in place. chain: ids that are all different; the first is what the prompt ends with."""
    assert len(set(chain)) == len(chain), "one token cannot be followed by two"
    tensors, hidden = model.tensors, model.spec.hidden
    for name, tensor in tensors.items():
        if name.endswith((".attn.out.weight", ".attn.out.bias", ".mlp.mlp2_bias", ".mlp.mlp2_weight.blocks")):
            tensor.zero_()  # nothing is added to the embedding
    tensors["norm.scale"].fill_(1)
    tensors["unembedding.weight"].zero_()
    signs = np.random.default_rng(7).choice([-1.0, 1.0], (len(chain), hidden))
    for (before, after), direction in zip(pairwise(chain), torch.from_numpy(signs), strict=False):
        tensors["embedding.weight"][before] = direction
        tensors["unembedding.weight"][after] = LOUD * direction
    return model

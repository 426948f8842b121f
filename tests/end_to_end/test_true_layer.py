"""One layer of the released width, HF → GGUF → llama.cpp, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import TRUE_LAYER, Model, write_hf
from support.judges import TEXT, convert, divergence, in_llama, log_softmax
from tokenizers import Tokenizer


@pytest.mark.slow
def test_layer_of_the_true_shape_agrees_with_transformers(tmp_path: Path) -> None:
    """2880 × 2880, 32 experts of which 4 are taken; MXFP4 and BF16, so llama.cpp rounds activations (see test_llama_cpp).

    Where two experts score nearly alike that rounding now and then takes the other one, and that token's distribution
    jumps: a KL of 2.7e-4 in the median and of 0.4 at one token was measured. So the median is held to the rounding alone, and one
    token in ten may jump.
    """
    model = Model(TRUE_LAYER)
    write_hf(model, tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    ids = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode(TEXT).ids
    got = in_llama(path, ids)
    kl = divergence(log_softmax(model.logits(ids)), got)
    assert np.median(kl) < 1e-3
    assert np.quantile(kl, 0.9) < 2e-3

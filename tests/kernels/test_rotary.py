"""YaRN's tables against transformers': frequencies and angles bit for bit, cosines and sines to the last place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gptoss_convert.kernels.rotary import Yarn, attention_factor, frequencies, tables

RELEASE = Yarn(64, 150000.0, 32.0, 4096, 32.0, 1.0, False, None)
SMALL = Yarn(64, 40000.0, 16.0, 512, 32.0, 1.0, False, None)
POSITIONS = 131072


def theirs(yarn: Yarn) -> Any:
    """transformers' rotary embedding of these numbers."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    rope = {
        "rope_type": "yarn", "rope_theta": yarn.theta, "factor": yarn.factor, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow, "truncate": yarn.truncate, "original_max_position_embeddings": yarn.original,
    }  # fmt: skip
    if yarn.attention is not None:
        rope["attention_factor"] = yarn.attention
    return GptOssRotaryEmbedding(GptOssConfig(head_dim=yarn.dim, rope_parameters=rope))


@pytest.mark.parametrize(
    "yarn",
    [
        RELEASE,
        SMALL,
        replace(SMALL, truncate=True),
        replace(RELEASE, attention=1.1),
        replace(RELEASE, beta_fast=20.0),
        replace(SMALL, beta_fast=1.0),
    ],
)
def test_frequencies_and_factor_are_transformers_bit_for_bit(yarn: Yarn) -> None:
    made = theirs(yarn)
    assert np.array_equal(frequencies(yarn).view(np.uint32), made.inv_freq.numpy().view(np.uint32))
    assert attention_factor(yarn) == made.attention_scaling


def test_tables_are_transformers_to_one_unit_in_the_last_place() -> None:
    """torch takes its cosine from MKL, whose last bit depends on the processor; ours is rounded correctly. One entry in thirty
    differs from torch's, none by more than one unit before the attention factor is multiplied in."""
    places = torch.arange(POSITIONS)[None]
    for mine, reference in zip(tables(RELEASE, POSITIONS), theirs(RELEASE)(torch.zeros(1), places), strict=True):
        got = np.frombuffer(mine, "<f4").reshape(POSITIONS, 32)
        want = reference[0].numpy()[:, :32]
        assert (got == want).mean() > 0.96
        assert np.abs(got - want).max() <= 1.2e-7


def test_tables_are_the_exact_cosine_rounded_once() -> None:
    angles = (np.arange(5000, dtype=np.float32)[:, None] * frequencies(SMALL)).astype(np.longdouble)
    scale = np.float32(attention_factor(SMALL))
    cosines, sines = (np.frombuffer(table, "<f4").reshape(5000, 32) for table in tables(SMALL, 5000))
    assert np.array_equal(cosines, np.cos(angles).astype(np.float32) * scale)
    assert np.array_equal(sines, np.sin(angles).astype(np.float32) * scale)

"""The rule by which an expert's statistic leans on other tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gptoss_convert.kernels import gptq
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.quant.shrinkage import evenly, others_wanted, own_weight, shrink, tokens_wanted

COLUMNS = 128


def test_an_expert_with_enough_tokens_keeps_its_own_statistic() -> None:
    assert tokens_wanted(COLUMNS) == 256
    assert own_weight(256, COLUMNS) == 1.0
    assert others_wanted(256, COLUMNS) == others_wanted(9999, COLUMNS) == 0
    own, others = np.ones(3), np.zeros(3)
    assert shrink(own, others, 256, COLUMNS) is own


def test_one_that_saw_nothing_takes_the_others() -> None:
    assert others_wanted(0, COLUMNS) == 256
    assert np.array_equal(shrink(np.zeros(3), np.full(3, 7.0), 0, COLUMNS), np.full(3, 7.0))


def test_trust_rises_steadily_and_without_a_jump() -> None:
    weights = [own_weight(n, COLUMNS) for n in range(300)]
    assert all(a <= b for a, b in itertools.pairwise(weights))
    assert max(b - a for a, b in itertools.pairwise(weights)) < 0.02


def test_the_others_are_spread_over_the_text() -> None:
    assert evenly(3, 9).tolist() == [0, 3, 6]
    assert evenly(9, 3).tolist() == [0, 1, 2]
    assert evenly(0, 5).tolist() == []


def _covariance(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    mix = np.eye(COLUMNS) + 0.2 * random.standard_normal((COLUMNS, COLUMNS))
    return mix * np.exp(0.6 * random.standard_normal(COLUMNS))


@pytest.mark.parametrize("tokens", [16, 40, 96])
def test_between_both_extremes_it_loses_less_than_either(tokens: int) -> None:
    """An expert's inputs are like the layer's and yet its own; it has seen a few. GPTQ by the shrunk Hessian loses less of its
    true output than by its own tokens alone and than by the layer's tokens alone.
    """
    random = np.random.default_rng(5)
    common, apart = _covariance(1), _covariance(2)
    expert = common + 0.45 * apart
    weight = (random.standard_normal((64, COLUMNS)) * 0.02).astype(np.float32)
    truth = torch.from_numpy((expert.T @ expert).astype(np.float32))
    losses = np.zeros(3)
    for _ in range(6):
        own = random.standard_normal((tokens, COLUMNS)) @ expert
        others = random.standard_normal((others_wanted(tokens, COLUMNS), COLUMNS)) @ common
        means = [torch.from_numpy(x.T @ x / len(x)) for x in (own, others)]
        for i, h in enumerate((means[0], means[1], shrink(means[0], means[1], tokens, COLUMNS))):
            values = CODECS["q4_0"].decode(gptq.quantize(weight, gptq.factorise(h, 32), "q4_0"))
            losses[i] += gptq.relative_loss(weight, values, truth)
    assert losses[2] < 0.97 * losses[:2].min()

"""GPTQ onto lattices: the fast body equals the slow one, loses far less than the encoder, and the bytes hold what it thinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptoss_convert.kernels import gptq, gptq_lattice
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.gptq import Factor

TYPES = list(gptq_lattice.RULES)
EVEN = [name for name, rule in gptq_lattice.RULES.items() if rule.even]


def hessian(columns: int, dead: int = 0, tokens: int = 2000) -> torch.Tensor:
    """Of correlated, unevenly large inputs, not symmetric in any order of the columns; the last `dead` are zero."""
    random = np.random.default_rng(0)
    mix = np.eye(columns) + 0.15 * random.standard_normal((columns, columns)) * (256 / columns) ** 0.5
    x = random.standard_normal((tokens, columns)) @ mix * np.exp(0.7 * random.standard_normal(columns))
    x[:, columns - dead :] = 0
    return torch.from_numpy((x.T @ x / tokens).astype(np.float32))


def weights(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, columns)) * 0.02 * np.exp(0.3 * random.standard_normal((rows, 1)))).astype(
        np.float32
    )


def factor_of(h: torch.Tensor, name: str) -> Factor:
    return gptq.factorise(h, *gptq_lattice.runs(name))


def encoded(w: np.ndarray, name: str, importance: np.ndarray) -> np.ndarray:
    codec = CODECS[name]
    assert codec.encode is not None
    return codec.decode(codec.encode(w, importance))


def rounded(w: np.ndarray, factor: Factor, name: str) -> np.ndarray:
    return CODECS[name].decode(gptq_lattice.quantize(w, factor, name))


@pytest.mark.parametrize("name", TYPES)
def test_it_loses_far_less_of_the_output_than_the_encoder_with_importance(name: str) -> None:
    h, w = hessian(512), weights(96, 512)
    plain = encoded(w, name, h.diagonal().numpy().copy())
    ours = rounded(w, factor_of(h, name), name)
    assert gptq.relative_loss(w, ours, h) < 0.6 * gptq.relative_loss(w, plain, h)


@pytest.mark.parametrize("name", TYPES)
def test_the_fast_body_is_the_slow_one(name: str) -> None:
    w = weights(37, 512)
    factor = factor_of(hessian(512), name)
    fast, slow = (body(w, factor, name) for body in (gptq_lattice.round_onto, gptq_lattice.round_reference))
    # Of two choices that lose the same but for float32's last bits either may be taken, and what follows in that row with it.
    same = np.all([(a == b).reshape(len(w), -1).all(axis=1) for a, b in zip(fast[0], slow[0], strict=True)], axis=0)
    assert same.mean() > 0.85
    assert fast[1][same] == pytest.approx(slow[1][same], abs=1e-4 * float(np.abs(slow[1]).max()))
    assert (fast[1] ** 2).sum() == pytest.approx((slow[1] ** 2).sum(), rel=2e-3)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (33, 768)])
def test_the_bytes_lose_what_the_algorithm_says_they_lose(name: str, rows: int, columns: int) -> None:
    h, w = hessian(columns), weights(rows, columns)
    factor = factor_of(h, name)
    made, error = gptq_lattice.round_onto(w, factor, name)
    lost = (w - CODECS[name].decode(gptq_lattice.RULES[name].pack(made))).astype(np.float64)
    damped = h.double().numpy() + factor.damping * float(h.double().diagonal().mean()) * np.eye(columns)
    assert (error.astype(np.float64) ** 2).sum(axis=1) == pytest.approx(((lost @ damped) * lost).sum(axis=1), rel=1e-4)


@pytest.mark.parametrize("name", EVEN)
def test_of_eight_signs_an_even_number_is_negative_where_the_format_asks_for_it(name: str) -> None:
    made, _ = gptq_lattice.round_onto(weights(40, 512), factor_of(hessian(512), name), name)
    assert not (np.bitwise_count(made.signs) % 2).any()
    assert len(np.unique(made.signs)) == 128


@pytest.mark.parametrize("name", TYPES)
def test_what_the_type_holds_exactly_comes_back(name: str) -> None:
    held = encoded(weights(20, 512), name, np.ones(512, np.float32))
    assert np.array_equal(rounded(held, factor_of(hessian(512), name), name), held)


@pytest.mark.parametrize("name", TYPES)
def test_with_uncorrelated_inputs_it_loses_no_more_than_the_encoder(name: str) -> None:
    w = weights(40, 512)
    ours, plain = rounded(w, factor_of(torch.eye(512), name), name), encoded(w, name, np.ones(512, np.float32))
    assert ((ours - w) ** 2).sum() <= ((plain - w) ** 2).sum() * 1.0001


def test_rows_are_independent_of_each_other() -> None:
    w, factor = weights(75, 512), factor_of(hessian(512), "iq3_xxs")
    whole = gptq_lattice.quantize(w, factor, "iq3_xxs")
    parts = np.concatenate([gptq_lattice.quantize(part, factor, "iq3_xxs") for part in (w[:41], w[41:])])
    assert (whole == parts).mean() > 0.99


@pytest.mark.parametrize("name", ["iq2_xs", "iq3_s"])
def test_columns_that_no_input_reaches_cost_the_others_nothing_and_rows_of_zeros_stay_zeros(name: str) -> None:
    h, w = hessian(768, dead=200), weights(16, 768)
    w[5] = 0
    other = w.copy()
    other[:, -200:] *= 1.5  # so that no value is the super-block's largest that was not before
    other[5] = 0
    factor = factor_of(h, name)
    a, b = rounded(w, factor, name), rounded(other, factor, name)
    assert np.array_equal(a[:, :512], b[:, :512])
    assert not a[5].any()


def test_a_value_beyond_a_float16_scale_is_refused() -> None:
    w = weights(3, 256)
    w[1, 7] = 1e9
    with pytest.raises(ValueError, match="row 1"):
        gptq_lattice.quantize(w, factor_of(hessian(256), "iq2_xxs"), "iq2_xxs")

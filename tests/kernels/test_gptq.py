"""GPTQ: the fast body equals the slow one, loses less than rounding, and refuses what cannot be factorised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptoss_convert.kernels import gptq
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.grids import grid

TYPES = [
    "q2_k",
    "q3_k",
    "q4_k",
    "q6_k",
    "iq4_xs",
    "q4_0",
    "q4_1",
    "q5_1",
    "iq4_nl",
    "mxfp4",
    "nvfp4",
    "q2_0",
    "int4_g32",
]


def inputs(columns: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Correlated, unevenly large, not symmetric in any order of the columns."""
    random = np.random.default_rng(seed)
    mix = np.eye(columns) + 0.15 * random.standard_normal((columns, columns))
    x = random.standard_normal((tokens, columns)) @ mix * np.exp(0.7 * random.standard_normal(columns))
    return torch.from_numpy(x.astype(np.float32))


def weights(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(1)
    return (random.standard_normal((rows, columns)) * 0.02 * np.exp(0.3 * random.standard_normal((rows, 1)))).astype(
        np.float32
    )


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def width(name: str) -> int:
    found = grid(name)
    assert found is not None
    return 2 * found.block if found.block == 256 else 5 * found.block


@pytest.mark.parametrize("name", TYPES)
def test_it_loses_far_less_of_the_output_than_rounding_with_importance(name: str) -> None:
    columns = width(name)
    h, w, codec = hessian(inputs(columns)), weights(96, columns), CODECS[name]
    factor = gptq.factorise(h, grid(name).block)  # type: ignore[union-attr]
    ours = codec.decode(gptq.quantize(w, factor, name))
    assert codec.encode is not None
    plain = codec.decode(codec.encode(w, h.diagonal().numpy().copy()))
    assert gptq.relative_loss(w, ours, h) < 0.75 * gptq.relative_loss(w, plain, h)


@pytest.mark.parametrize("name", TYPES)
def test_the_fast_body_is_the_slow_one(name: str) -> None:
    columns = width(name)
    h, w = hessian(inputs(columns)), weights(24, columns)
    factor = gptq.factorise(h, grid(name).block)  # type: ignore[union-attr]
    fast, slow = (CODECS[name].decode(body(w, factor, name)) for body in (gptq.quantize, gptq.quantize_reference))
    # A value half way between two levels may fall either way in the last bit, and what follows it with it.
    losses = [gptq.relative_loss(w, values, h) for values in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert (fast == slow).mean() > 0.7


def test_rows_are_independent_of_each_other() -> None:
    h, w = hessian(inputs(512)), weights(40, 512)
    factor = gptq.factorise(h, 256)
    whole = gptq.quantize(w, factor, "q4_k")
    parts = np.concatenate([gptq.quantize(w[:24], factor, "q4_k"), gptq.quantize(w[24:], factor, "q4_k")])
    assert (whole == parts).mean() > 0.99


def test_with_uncorrelated_inputs_it_is_rounding() -> None:
    w = weights(16, 96)
    factor = gptq.factorise(torch.eye(96), 32)
    codec = CODECS["q4_0"]
    assert codec.encode is not None
    assert np.array_equal(
        codec.decode(gptq.quantize(w, factor, "q4_0")), codec.decode(codec.encode(w, np.ones(96, np.float32)))
    )


def test_columns_that_no_input_reaches_cost_the_other_blocks_nothing() -> None:
    x = inputs(512)
    x[:, 400:] = 0
    h, w = hessian(x), weights(16, 512)
    factor = gptq.factorise(h, 256)
    other = w.copy()
    other[:, 400:] = 0
    a, b = (CODECS["q3_k"].decode(gptq.quantize(v, factor, "q3_k"))[:, :256] for v in (w, other))
    assert np.array_equal(a, b)


def test_blocks_stay_whole_whatever_the_order() -> None:
    diagonal = np.random.default_rng(0).random(512)
    order = gptq.block_order(diagonal, 32)
    assert sorted(order.tolist()) == list(range(512))
    for at in range(0, 512, 32):
        assert len({column // 32 for column in order[at : at + 32]}) == 1
        assert (np.diff(diagonal[order[at : at + 32]]) <= 0).all()


def test_runs_within_a_block_stay_whole_too_and_columns_in_place_within_the_shortest() -> None:
    diagonal = np.random.default_rng(0).random(512)
    order = gptq.block_order(diagonal, 256, 32, 8)
    assert sorted(order.tolist()) == list(range(512))
    for size in (256, 32, 8):
        runs = order.reshape(-1, size)
        assert (runs // size == runs[:, :1] // size).all()
        means = diagonal[runs].mean(axis=1).reshape(-1, {256: 2, 32: 8, 8: 4}[size])
        assert (np.diff(means, axis=1) <= 0).all()
    assert (np.diff(order.reshape(-1, 8), axis=1) == 1).all()


def test_a_rank_deficient_hessian_is_damped_and_one_that_is_not_finite_is_refused() -> None:
    x = inputs(64, tokens=5)
    assert gptq.factorise(hessian(x), 32).damping >= gptq.LEAST_DAMPING
    with pytest.raises(gptq.NotPositive, match="no input"):
        gptq.factorise(torch.zeros(64, 64), 32)
    with pytest.raises(gptq.NotPositive, match="not finite"):
        gptq.factorise(torch.full((64, 64), float("nan")), 32)


def test_damping_rises_until_the_factorisation_succeeds_and_then_gives_up() -> None:
    h = torch.eye(64)
    h[0, 1] = h[1, 0] = 1.05  # one negative eigenvalue, −0.05
    assert gptq.factorise(h, 32).damping == pytest.approx(0.1)
    h[0, 1] = h[1, 0] = 3.0
    with pytest.raises(gptq.NotPositive, match="not positive definite"):
        gptq.factorise(h, 32)


def test_lattice_types_have_no_grid_to_round_onto() -> None:
    factor = gptq.factorise(torch.eye(256), 256)
    with pytest.raises(ValueError, match="iq2_xs"):
        gptq.quantize(weights(2, 256), factor, "iq2_xs")

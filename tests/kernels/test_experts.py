"""One expert's forward pass in parts: products, activation, probes that notice permutations, differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert.kernels import experts


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(1, 5))
def test_a_product_is_numpys_in_float64(rows: int, columns: int, vectors: int) -> None:
    rng = np.random.default_rng([rows, columns, vectors])
    a = rng.standard_normal((rows, columns), np.float32)
    x = rng.standard_normal((vectors, columns), np.float32)
    expected = x.astype(np.float64) @ a.astype(np.float64).T
    size = np.abs(x.astype(np.float64)) @ np.abs(a.astype(np.float64)).T
    found = experts.product(a, x)
    assert found.shape == (vectors, rows)
    assert (np.abs(found - expected) <= 1e-6 * size).all()


def test_a_product_does_not_depend_on_how_its_rows_are_divided() -> None:
    a = np.random.default_rng(3).standard_normal((130, 2880), np.float32)
    x = experts.probes(2880, 2, 5)
    whole = experts.product(a, x)
    parts = np.concatenate([experts.product(a[i : i + 17], x) for i in range(0, 130, 17)], axis=1)
    assert np.array_equal(whole, parts)
    assert np.array_equal(whole, experts.product(np.asfortranarray(a), x))


def test_the_activation_is_the_models() -> None:
    rng = np.random.default_rng(4)
    gate, up = rng.standard_normal((2, 5, 40)) * 6
    for limit in (7.0, 3.5):
        g = torch.from_numpy(gate).clamp(max=limit)
        u = torch.from_numpy(up).clamp(-limit, limit)
        expected = (u + 1) * (g * torch.sigmoid(g * 1.702))
        assert np.allclose(experts.activation(gate, up, limit), expected.numpy(), rtol=1e-12, atol=0)
    assert experts.activation(np.array([[-1e6]]), np.array([[0.0]]), 7.0).tolist() == [[0.0]]


PERMUTATIONS = {
    "reversed": lambda i: i[::-1],
    "shifted by one": lambda i: np.roll(i, 1),
    "shifted by a block": lambda i: np.roll(i, 32),
    "neighbours swapped": lambda i: i.reshape(-1, 2)[:, ::-1].reshape(-1),
    "halves swapped": lambda i: np.roll(i, len(i) // 2),
    "even then odd": lambda i: np.concatenate([i[0::2], i[1::2]]),
    "nibbles of ggml taken for the release's": lambda i: i.reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1),
    "blocks reversed": lambda i: i.reshape(-1, 32)[:, ::-1].reshape(-1),
}


@pytest.mark.parametrize("name", PERMUTATIONS)
@pytest.mark.parametrize("columns", [96, 128, 2880])
def test_probes_notice_each_permutation_a_layout_can_hide(name: str, columns: int) -> None:
    x = experts.probes(columns, 2, 11)
    changed = x[:, PERMUTATIONS[name](np.arange(columns))]
    assert (np.linalg.norm(changed - x, axis=1) > 0.3 * np.linalg.norm(x, axis=1)).all()


def test_probes_have_no_two_entries_alike_and_differ_by_seed() -> None:
    for seed in (0, 1, 767, 4607):
        x = experts.probes(2880, 2, seed)
        assert np.abs(x).max() <= 1
        assert all(len(np.unique(row)) > 2870 for row in x)
        assert abs(float(np.corrcoef(x)[0, 1])) < 0.2
        assert not np.allclose(x, experts.probes(2880, 2, seed + 1), atol=0.1)


def test_differences_are_counted_and_measured() -> None:
    a = np.random.default_rng(6).standard_normal((5, 33), np.float32)
    b = a.copy()
    assert experts.differences(a, b) == (0, 0.0, pytest.approx(float((a.astype(float) ** 2).sum())), 0.0)
    b[3, 7] += 2
    b[4, 32] -= 1
    count, error, square, largest = experts.differences(a, b)
    assert count == 2
    assert error == pytest.approx(((a - b).astype(float) ** 2).sum())
    assert square == pytest.approx((a.astype(float) ** 2).sum())
    assert largest == pytest.approx(2, rel=1e-6)


def test_a_zero_equals_a_negative_zero_and_nothing_equals_nan() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert experts.differences(zeros, -zeros)[0] == 0
    spoiled = zeros.copy()
    spoiled[1, 1] = np.nan
    assert experts.differences(zeros, spoiled)[0] == 1

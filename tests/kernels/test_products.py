"""Products in runs of rows: the same numbers as at once, and the same bytes for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptoss_convert.kernels import products


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    products.use_threads(1)
    torch.set_num_threads(before)


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(columns: int) -> torch.Tensor:
    x = made(3 * columns, columns).double() * torch.linspace(0.1, 3, columns)
    return x.T @ x / len(x)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 900])
def test_runs_of_rows_give_the_product(rows: int) -> None:
    x, w = made(rows, 70), made(90, 70, seed=1)
    assert torch.allclose(products.by_rows(x, 90, lambda part: part @ w.T), x @ w.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 200, 256, 600])
def test_an_outer_product_is_added(columns: int) -> None:
    x, total = made(40, columns), made(columns, columns, seed=1)
    wanted = total + x.T @ x
    products.add_outer(total, x)
    assert torch.allclose(total, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 100, 256, 257, 700])
def test_the_inverse_of_the_upper_factor(columns: int) -> None:
    h = positive(columns)
    u = products.factor(h.clone())
    assert u is not None
    assert (u.tril(-1) == 0).all()
    assert torch.allclose(u.T @ u, torch.linalg.inv(h), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("at", [3, 300, 599])
def test_what_is_not_positive_definite_has_no_factor(at: int) -> None:
    h = positive(600)
    h[at, at] = -1
    assert products.factor(h) is None


def test_the_number_of_threads_changes_no_bit() -> None:
    x, w, h = made(1000, 300), made(500, 300, seed=1), positive(700)
    found = []
    for threads in (1, 2, 5):
        products.use_threads(threads)
        total = torch.zeros(300, 300)
        products.add_outer(total, x)
        found.append((products.by_rows(x, 500, lambda part: part @ w.T), total, products.factor(h.clone())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True) if a is not None and b is not None)


def test_an_error_in_a_run_is_raised() -> None:
    products.use_threads(2)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("this run")

    with pytest.raises(ValueError, match="this run"):
        products.by_rows(made(600, 3), 3, fail)

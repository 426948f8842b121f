"""Matrix products cut into the same runs of rows whatever the number of threads, so that this number changes no byte.

A library divides a product among the threads that it is given, and sums in another order for another number of them. Here torch
keeps to one thread (`use_threads` sets that), and the runs, whose size is fixed, are shared out among threads of our own; each
run is one call of the library. On CUDA everything is one call.

    by_rows    f of runs of rows
    add_outer  H += xᵀ x
    factor     H = M Mᵀ, M upper triangular → M⁻¹, float64; blocked, so that its parts are runs too

What another processor's instructions sum in another order stays different.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

ROWS = 256  # of a run
MOST_THREADS = 16  # each holds a run's temporaries


class _Threads:
    pool: ThreadPoolExecutor | None = None


def use_threads(count: int) -> None:
    """From here on products take this many threads, MOST_THREADS at most, and torch itself one."""
    torch.set_num_threads(1)
    if _Threads.pool is not None:
        _Threads.pool.shutdown()
    threads = min(count, MOST_THREADS)
    _Threads.pool = (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) if threads > 1 else None
    )


def each(count: int, size: int, function: Callable[[slice], None]) -> None:
    """function of every run of `size` among `count`, side by side. It must not call `each`."""
    runs = [slice(at, min(at + size, count)) for at in range(0, count, size)]
    if _Threads.pool is None or len(runs) == 1:
        for run in runs:
            function(run)
    else:
        list(_Threads.pool.map(function, runs))


def by_rows(x: Tensor, width: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """x [T, C] → [T, width]: function of runs [r, C] → [r, width]."""
    if x.device.type != "cpu":
        return function(x)
    out = torch.empty((len(x), width), dtype=x.dtype)

    def run(part: slice) -> None:
        out[part] = function(x[part])

    each(len(x), ROWS, run)
    return out


def add_outer(total: Tensor, x: Tensor) -> None:
    """total [C, C] += xᵀ x, x [T, C]."""
    if x.device.type != "cpu":
        total.addmm_(x.T, x)
        return

    def run(part: slice) -> None:
        total[part].addmm_(x[:, part].T, x)

    each(len(total), ROWS, run)


def factor(h: Tensor) -> Tensor | None:
    """H [C, C] positive definite, used up, → U = M⁻¹ [C, C] where H = M Mᵀ and M is upper triangular; None for another H."""
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    if h.device.type != "cpu":
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        return None if int(failed) else torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    found = _cholesky(h.flip(0, 1))
    if found is None:
        return None
    m = found.flip(0, 1)

    def run(part: slice) -> None:
        whole = slice(0, part.stop)
        eye[whole, part] = torch.linalg.solve_triangular(m[whole, whole], eye[whole, part].clone(), upper=True)

    each(len(m), ROWS, run)
    return eye


def _cholesky(a: Tensor) -> Tensor | None:
    """a = L Lᵀ → L lower triangular, in a's place; None where a is not positive definite."""
    count = len(a)
    for at in range(0, count, ROWS):
        here = slice(at, min(at + ROWS, count))
        diagonal, failed = torch.linalg.cholesky_ex(a[here, here])
        if int(failed):
            return None
        a[here, here] = diagonal
        below = a[here.stop :]

        def solve(part: slice, below: Tensor = below, here: slice = here, diagonal: Tensor = diagonal) -> None:
            below[part, here] = torch.linalg.solve_triangular(diagonal.T, below[part, here], upper=True, left=False)

        def subtract(part: slice, below: Tensor = below, here: slice = here) -> None:
            columns = slice(here.stop, here.stop + part.stop)  # the lower triangle is all that is read
            below[part, columns].addmm_(below[part, here], below[: part.stop, here].T, alpha=-1)

        each(len(below), ROWS, solve)
        each(len(below), ROWS, subtract)
    return a.tril()

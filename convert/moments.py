"""Second moments of inputs: sums of squares a channel, and, where the whole Hessian is asked for, sums of x xᵀ.

Sums     f64 [C]       what importance is made from
Hessian  f32 [C, C]    what GPTQ is made from
Moments  both, of the same inputs; `shrunk` joins an expert's own with the others' (quant/shrinkage.py)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert.kernels.products import add_outer
from gptoss_convert.quant.shrinkage import shrink

F64 = NDArray[np.float64]


class Sums:
    """Sums of squares f64 [C] and the count of some tokens' inputs."""

    def __init__(self, columns: int) -> None:
        self.total, self.count = np.zeros(columns, np.float64), 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [T, C]."""
        self.total += inputs.double().square().sum(0).cpu().numpy()
        self.count += len(inputs)

    @property
    def mean(self) -> F64:
        """f64 [C]; zeros where nothing was counted."""
        return self.total / max(self.count, 1)


class Hessian:
    """Sum of x xᵀ, f32 [C, C], and the count."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros((columns, columns), device=device)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [T, C]."""
        add_outer(self.total, inputs)
        self.count += len(inputs)

    @property
    def mean(self) -> Tensor:
        """[C, C]; zeros where nothing was counted."""
        return self.total / max(self.count, 1)

    def without(self, part: Hessian) -> Hessian:
        """Of the inputs that are not in a part of them."""
        rest = Hessian(0, self.total.device)
        rest.total, rest.count = self.total - part.total, self.count - part.count
        return rest


class Moments:
    """Sums of squares, and with `full` the Hessian too, of the same inputs."""

    def __init__(self, columns: int, device: torch.device, full: bool) -> None:
        self.columns = columns
        self.squares = Sums(columns)
        self.outer = Hessian(columns, device) if full else None

    def add(self, inputs: Tensor) -> None:
        """inputs: [T, C]."""
        self.squares.add(inputs)
        if self.outer is not None:
            self.outer.add(inputs)

    @property
    def count(self) -> int:
        """Tokens."""
        return self.squares.count

    def without(self, part: Moments) -> Moments:
        """Of the inputs that are not in a part of them."""
        rest = Moments(0, torch.device("cpu"), False)
        rest.columns = self.columns
        rest.squares.total, rest.squares.count = self.squares.total - part.squares.total, self.count - part.count
        if self.outer is not None and part.outer is not None:
            rest.outer = self.outer.without(part.outer)
        return rest

    def mean(self) -> tuple[F64, Tensor | None]:
        """Mean square f64 [C] and mean of x xᵀ f32 [C, C]."""
        return self.squares.mean, None if self.outer is None else self.outer.mean

    def shrunk(self, others: Moments) -> tuple[F64, Tensor | None]:
        """The same of an expert's own inputs, leaning on the others' as far as they are short."""
        if not others.count:
            return self.mean()
        squares = shrink(self.squares.mean, others.squares.mean, self.count, self.columns)
        if self.outer is None or others.outer is None:
            return squares, None
        outer: Any = shrink(self.outer.mean, others.outer.mean, self.count, self.columns)
        return squares, outer

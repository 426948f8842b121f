"""How far an expert's own tokens are trusted, and what stands in for those that it has not seen.

An expert's statistic over C inputs (mean squares [C], or a Hessian [C, C]) is estimated well from 2·C tokens of its own; the
router gives some experts far fewer, some none. With n tokens of its own, m = max(0, 2C − n) others of the layer are sent
through that same expert (fewer where the layer has fewer), and

    statistic = w · (mean over its own) + (1 − w) · (mean over the others),      w = n / (n + WORTH · m)

so that an expert with 2·C tokens or more keeps exactly its own statistic, one that saw none takes the others', and between them
w rises steadily. WORTH is how much a token that the router would not have sent says about those that it does send: 1 would be
plain pooling, 0 would trust any handful. For gate and up the others' mean is free, because all experts of a layer read the same
hidden states; it then is the mean over all of the layer's other tokens, m counting as above.

An own mean square over n tokens has a relative variance of about 2/n, the others' a bias b² that no number of tokens mends; their
best combination gives own tokens the weight n / (n + 2/b²), a constant in place of WORTH · m. The rule above bends it so that the
extra passes end at 2·C.

What is still thin is not trusted either. `effective` counts the tokens that stand behind a statistic, n + WORTH · m, and

    importance of a column = (tokens · mean square + PRIOR · their average over the columns) / (tokens + PRIOR)
    damping of a Hessian   = max(LEAST_DAMPING, RIDGE · C / tokens), in units of its mean diagonal

The three constants are measured on the trained small model with few tokens (docs/measurements.md): without RIDGE, GPTQ by less
than 5·C tokens an expert is worse than plain rounding, without PRIOR importance by fewer than 100 is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

WORTH = 0.25
PRIOR = 256
LEAST_DAMPING, RIDGE = 0.01, 1.0
Statistic = TypeVar("Statistic", "NDArray[np.float64]", "torch.Tensor")


def tokens_wanted(columns: int) -> int:
    """Own tokens from which an expert with this many inputs needs no others."""
    return 2 * columns


def others_wanted(own: int, columns: int) -> int:
    """How many of the layer's other tokens an expert's shortfall asks for."""
    return max(0, tokens_wanted(columns) - own)


def own_weight(own: int, columns: int) -> float:
    """w: the share of an expert's own mean in its statistic."""
    if not own:
        return 0.0
    return own / (own + WORTH * others_wanted(own, columns))


def effective(own: int, others: int, columns: int) -> float:
    """How many own tokens' worth stand behind a shrunk statistic; others: how many there are, of which its shortfall is taken."""
    return own + WORTH * min(others, others_wanted(own, columns))


def level(mean: NDArray[np.float32], tokens: NDArray[np.float64]) -> NDArray[np.float32]:
    """Mean squares [E, C] → importance [E, C]: PRIOR tokens in which all columns are alike are added to each expert's own."""
    alike = mean.mean(axis=1, keepdims=True, dtype=np.float64)
    weight = (tokens / (tokens + PRIOR))[:, None]
    return np.asarray(weight * mean + (1 - weight) * alike, np.float32)


def damping(tokens: float, columns: int) -> float:
    """λ of GPTQ, in units of the Hessian's mean diagonal, by how many tokens it was estimated from."""
    return max(LEAST_DAMPING, RIDGE * columns / max(tokens, 1.0))


def shrink(own_mean: Statistic, others_mean: Statistic, own: int, columns: int) -> Statistic:
    """The expert's statistic; means over no tokens count as zeros and get no weight."""
    weight = own_weight(own, columns)
    if weight == 1.0:
        return own_mean
    return weight * own_mean + (1.0 - weight) * others_mean


def evenly(count: int, among: int) -> NDArray[np.intp]:
    """`count` of `among` positions, evenly spaced, ascending; all where there are not more."""
    if count >= among:
        return np.arange(among)
    return (np.arange(count) * among) // max(count, 1)

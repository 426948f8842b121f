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
extra passes end at 2·C. WORTH is a judgement, not a measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

WORTH = 0.25
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

"""Importance of columns, carried through what a plan does to a model's widths."""

from __future__ import annotations

import numpy as np

from gptoss_convert.convert.cut import CutColumns
from gptoss_convert.convert.views import View
from gptoss_convert.convert.widen import Wide
from gptoss_convert.kernels.floats import F32

LEAST = 1e-3  # of the mean: an input that the text never used is not worthless in another


def fit(importance: F32, view: View, expert: int) -> F32:
    """Importance f32 [C] of a true matrix's columns → of the view's: cut ones left out, those that widening added worth
    nothing.
    """
    if isinstance(view, Wide):
        inner = fit(importance, view.base, expert)
        return np.concatenate([inner, np.zeros(view.stack[2] - len(inner), np.float32)])
    if isinstance(view, CutColumns):
        return np.ascontiguousarray(importance[view.kept[expert]])
    floor = np.float32(LEAST) * np.mean(importance, dtype=np.float64).astype(np.float32)
    return np.maximum(importance, floor).astype(np.float32)

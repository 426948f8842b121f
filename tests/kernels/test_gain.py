"""Restored gains: a rounded row's output is unbiased, and nothing else of its bytes changes."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_convert.kernels import gain
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.grids import get_codes, grid

ONNX = ("int4_mm", "int8_mm", "int4_moe", "int8_moe")  # rounded by fixed rules
TYPES = [
    name
    for name, codec in CODECS.items()
    if codec.encode is not None and name not in ("mxfp4", "nvfp4", "int8_channel", *ONNX)
]


def some(columns: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    values = (random.standard_normal((7, columns)) * 0.02).astype(np.float32)
    return values, np.exp(random.standard_normal(columns)).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_the_projection_on_the_row_itself_becomes_one(name: str) -> None:
    codec = CODECS[name]
    values, importance = some(4 * codec.block)
    assert codec.encode is not None
    rows = codec.encode(values, importance)
    restored = gain.restore_by_importance(rows, name, values, importance)
    before, after = (
        (importance * values * codec.decode(r)).sum(1) / (importance * values * values).sum(1) for r in (rows, restored)
    )
    # Sixteen bits of scale: 2^-11 of float16, 2^-8 of bfloat16.
    step = 2.0**-8 if name.startswith("int") else 2.0**-10
    assert np.abs(after - 1).max() <= step
    assert np.abs(after - 1).max() <= np.abs(before - 1).max() + step


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_1", "int4_g32"])
def test_codes_stay_as_they_are(name: str) -> None:
    codec, g = CODECS[name], grid(name)
    assert codec.encode is not None
    assert g is not None
    values, importance = some(2 * codec.block)
    rows = codec.encode(values, importance)
    restored = gain.restore_by_importance(rows, name, values, importance)
    assert np.array_equal(get_codes(g, rows), get_codes(g, restored))


def test_two_bits_shrink_and_are_brought_back() -> None:
    values, importance = some(1024)
    rows = CODECS["q2_k"].encode(values, importance)  # type: ignore[misc]
    share = (importance * values * CODECS["q2_k"].decode(rows)).sum() / (importance * values * values).sum()
    assert share < 0.96
    restored = CODECS["q2_k"].decode(gain.restore_by_importance(rows, "q2_k", values, importance))
    assert (importance * values * restored).sum() / (importance * values * values).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scales_in_coarse_steps_are_left_alone(name: str) -> None:
    codec = CODECS[name]
    assert codec.encode is not None
    values, importance = some(2 * codec.block)
    rows = codec.encode(values, importance)
    assert gain.restore_by_importance(rows, name, values, importance) is rows


def test_rows_that_are_not_held_at_all_are_left_alone() -> None:
    rows = CODECS["q4_0"].encode(some(64)[0], None)  # type: ignore[misc]
    for wanted, held in ((1.0, 0.0), (1.0, -1.0), (1.0, 0.1), (0.1, 1.0), (np.nan, 1.0)):
        same = gain.restore(rows, "q4_0", np.full(7, wanted), np.full(7, held))
        assert np.array_equal(same, rows)

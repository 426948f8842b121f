"""Q2_0: bytes against ggml's decoder, errors against ggml's encoder, and what any input may expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import blocks

from gptoss_convert.kernels import q2_0


def test_bytes_decode_as_ggml_decodes_them() -> None:
    blocks.check_decoder("q2_0")


@pytest.mark.parametrize("kind", blocks.DATA)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_far_below_ggmls(kind: str, weighted: bool) -> None:
    blocks.check_error("q2_0", kind, weighted, 0.9)


def test_a_block_does_not_see_its_neighbours() -> None:
    blocks.check_independence("q2_0")


def test_error_is_near_the_best_of_all_scales() -> None:
    values = blocks.sample("gaussian", 2880, 2)
    x = values.reshape(-1, 64).astype(np.float64)
    scales = np.linspace(-1, 1, 401)[:, None, None] * np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.nan_to_num(np.clip(np.rint(x / scales), -1, 2))
    best = np.min(((x - scales * q) ** 2).sum(axis=2), axis=0).sum()
    read = q2_0.q2_0_decode(q2_0.q2_0_encode(values))
    assert ((values.astype(np.float64) - read) ** 2).sum() <= 1.03 * best


@pytest.mark.parametrize("kind", blocks.DATA)
def test_decoded_blocks_encode_to_the_same_values(kind: str) -> None:
    blocks.check_again("q2_0", blocks.sample(kind, 2880))


@settings(max_examples=40, deadline=None)
@given(values=hnp.arrays(np.float32, (2, 128), elements=st.floats(-65504, 65504, width=32)), weighted=st.booleans())
def test_any_finite_values_stay_finite(values: np.ndarray, weighted: bool) -> None:
    blocks.check_finite("q2_0", values, np.linspace(0, 3, 128, dtype=np.float32) if weighted else None)


def test_values_beyond_float16s_range_are_refused_by_place() -> None:
    values = np.ones((2, 128), np.float32)
    values[1, 100] = 65600
    with pytest.raises(ValueError, match="at row 1, column 100"):
        q2_0.q2_0_encode(values)

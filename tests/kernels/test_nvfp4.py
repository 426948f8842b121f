"""NVFP4: bytes against ggml's decoder, errors against ggml's encoder, the scales against OCP's E4M3 (torch)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import blocks

from gptoss_convert.kernels import nvfp4


def test_scales_are_e4m3() -> None:
    codes = torch.arange(127, dtype=torch.uint8)
    assert np.array_equal(nvfp4.SCALES[:127], codes.view(torch.float8_e4m3fn).float().numpy())
    assert nvfp4.SCALES[127] == 0


def test_bytes_decode_as_ggml_decodes_them() -> None:
    blocks.check_decoder("nvfp4")


@pytest.mark.parametrize("kind", blocks.DATA)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_below_ggmls(kind: str, weighted: bool) -> None:
    blocks.check_error("nvfp4", kind, weighted, 0.99)


def test_a_block_does_not_see_its_neighbours() -> None:
    blocks.check_independence("nvfp4")


def test_mxfp4_valued_blocks_come_back_exactly() -> None:
    values = blocks.sample("mxfp4", 2880)
    for scale in (1.0, 2.0**6, 2.0**12):
        scaled = values * np.float32(scale)
        assert np.array_equal(nvfp4.nvfp4_decode(nvfp4.nvfp4_encode(scaled)), scaled)


@pytest.mark.parametrize("kind", blocks.DATA)
def test_decoded_blocks_encode_to_the_same_values(kind: str) -> None:
    blocks.check_again("nvfp4", blocks.sample(kind, 2880))


def test_a_tensor_scale_lowers_the_error_of_small_weights() -> None:
    values = blocks.sample("gaussian", 2880)
    scale = nvfp4.tensor_scale(float(np.abs(values).max()))
    read = nvfp4.nvfp4_decode(nvfp4.nvfp4_encode(values / scale)) * scale
    plain = nvfp4.nvfp4_decode(nvfp4.nvfp4_encode(values))
    assert blocks.relative_rms(values, read) < blocks.relative_rms(values, plain)
    assert 1344 <= np.abs(values).max() / scale <= 2688


@settings(max_examples=40, deadline=None)
@given(values=hnp.arrays(np.float32, (2, 128), elements=st.floats(-2688, 2688, width=32)), weighted=st.booleans())
def test_any_finite_values_stay_finite(values: np.ndarray, weighted: bool) -> None:
    blocks.check_finite("nvfp4", values, np.linspace(0, 3, 128, dtype=np.float32) if weighted else None)


def test_values_beyond_448_times_6_are_refused_by_place() -> None:
    values = np.ones((2, 128), np.float32)
    values[1, 100] = -2700
    with pytest.raises(ValueError, match="at row 1, column 100"):
        nvfp4.nvfp4_encode(values)

"""Q2_K to Q6_K: bytes against ggml's decoder, errors against ggml's encoder, and what any input may expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import blocks

from gptoss_convert.kernels.codecs import CODECS

TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
TOP = {"q2_k": 15, "q3_k": 128, "q4_k": 63, "q5_k": 63, "q6_k": 4096}
# The error over ggml's that each type must reach, without and with importance, on the worst of the data sets.
AT_MOST = {
    "q2_k": (0.9, 0.96),
    "q3_k": (0.99, 0.99),
    "q4_k": (0.98, 0.975),
    "q5_k": (0.96, 0.945),
    "q6_k": (0.98, 0.97),
}


@pytest.mark.parametrize("name", TYPES)
def test_bytes_decode_as_ggml_decodes_them(name: str) -> None:
    blocks.check_decoder(name)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", blocks.DATA)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_below_ggmls(name: str, kind: str, weighted: bool) -> None:
    blocks.check_error(name, kind, weighted, AT_MOST[name][weighted])


@pytest.mark.parametrize("name", TYPES)
def test_a_super_block_does_not_see_its_neighbours(name: str) -> None:
    blocks.check_independence(name)


@pytest.mark.parametrize("name", ["q5_k", "q6_k"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mxfp4_valued_super_blocks_come_back_exactly(name: str, weighted: bool) -> None:
    importance = blocks.importances(3072) if weighted else None
    for scale in (2.0**-6, 1.0, 2.0**10):
        values = blocks.sample("mxfp4", 3072) * np.float32(scale)
        assert np.array_equal(CODECS[name].decode(blocks.encoded(name, values, importance)), values)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", blocks.DATA)
def test_decoded_super_blocks_encode_to_the_same_values(name: str, kind: str) -> None:
    blocks.check_again(name, blocks.sample(kind, 3072))


@settings(max_examples=25, deadline=None)
@given(
    values=hnp.arrays(
        np.float32, (1, 512), elements=st.floats(-65504, 65504, width=32, allow_nan=False, allow_infinity=False)
    ),
    weighted=st.booleans(),
)
@pytest.mark.parametrize("name", TYPES)
def test_any_finite_values_stay_finite(name: str, values: np.ndarray, weighted: bool) -> None:
    importance = np.linspace(0, 3, 512, dtype=np.float32) if weighted else None
    blocks.check_finite(name, values, importance)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-30, 1.0, -3.7, 60000.0])
def test_constant_super_blocks(name: str, value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    read = CODECS[name].decode(blocks.encoded(name, values))
    assert np.abs(read - values).max() <= abs(value) * 2**-9 + 2**-20


@pytest.mark.parametrize("name", TYPES)
def test_a_single_value_among_zeros(name: str) -> None:
    for value in (1.0, -1.0):
        values = np.zeros((1, 512), np.float32)
        values[0, 300] = value
        read = CODECS[name].decode(blocks.encoded(name, values))
        assert np.abs(read - values).max() <= 2**-9


@pytest.mark.parametrize("name", TYPES)
def test_values_beyond_the_scales_are_refused_by_place(name: str) -> None:
    values = np.ones((3, 512), np.float32)
    values[1, 290] = -TOP[name] * 65504 * 1.01
    with pytest.raises(ValueError, match="at row 1, column 290"):
        blocks.encoded(name, values)
    values[1, 290] = -TOP[name] * 65504
    assert np.isfinite(CODECS[name].decode(blocks.encoded(name, values))).all()

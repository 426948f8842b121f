"""Q4_0 to Q8_0: bytes against ggml's decoder, errors against ggml's encoder, and what any input may expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import blocks, ggml

from gptoss_convert.kernels.codecs import CODECS

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
LIMIT = {"q4_0": 8 * 65504, "q4_1": 65504, "q5_0": 16 * 65504, "q5_1": 65504, "q8_0": 128 * 65504}
LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 256}


@pytest.mark.parametrize("name", TYPES)
def test_bytes_decode_as_ggml_decodes_them(name: str) -> None:
    blocks.check_decoder(name)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", blocks.DATA)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_at_most_ggmls(name: str, kind: str, weighted: bool) -> None:
    blocks.check_error(name, kind, weighted, 0.995)


@pytest.mark.parametrize("name", TYPES)
def test_a_block_does_not_see_its_neighbours(name: str) -> None:
    blocks.check_independence(name)


@pytest.mark.parametrize("name", ["q5_0", "q5_1", "q8_0"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mxfp4_valued_blocks_come_back_exactly(name: str, weighted: bool) -> None:
    importance = blocks.importances(2880) if weighted else None
    for scale in (2.0**-10, 1.0, 2.0**10):
        values = blocks.sample("mxfp4", 2880) * np.float32(scale)
        assert np.array_equal(CODECS[name].decode(blocks.encoded(name, values, importance)), values)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_decoded_blocks_encode_to_the_same_values(name: str, kind: str) -> None:
    blocks.check_again(name, blocks.sample(kind, 2880))


@pytest.mark.parametrize("name", TYPES)
def test_codes_are_the_nearest_to_their_values(name: str) -> None:
    values = blocks.sample("heavy", 2880)
    data = blocks.encoded(name, values)
    head = 4 if name.endswith("_1") else 2
    levels = []
    for code in range(LEVELS[name]):  # every value of the block at once at each code, by ggml's word
        probe = data.reshape(-1, CODECS[name].block_bytes).copy()
        low = code if name == "q8_0" else (code & 15) * 17
        probe[:, head:] = low
        if "5_" in name:
            probe[:, head : head + 4] = 255 * (code >> 4)
        levels.append(ggml.decode(name, probe.reshape(data.shape), 2880))
    read = ggml.decode(name, data, 2880)
    best = np.min([np.abs(level - values) for level in levels], axis=0)
    assert (np.abs(read - values) <= best + 1e-6 * np.abs(values).max()).all()


@settings(max_examples=40, deadline=None)
@given(
    values=hnp.arrays(
        np.float32, (2, 64), elements=st.floats(-65504, 65504, width=32, allow_nan=False, allow_infinity=False)
    ),
    weighted=st.booleans(),
)
@pytest.mark.parametrize("name", TYPES)
def test_any_finite_values_stay_finite(name: str, values: np.ndarray, weighted: bool) -> None:
    importance = np.linspace(0, 3, 64, dtype=np.float32) if weighted else None
    blocks.check_finite(name, values, importance)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-30, 1.0, -3.7, 60000.0])
def test_constant_blocks(name: str, value: float) -> None:
    values = np.full((1, 64), value, np.float32)
    read = CODECS[name].decode(blocks.encoded(name, values))
    assert np.abs(read - values).max() <= abs(value) * 2**-10 + 2**-25


@pytest.mark.parametrize("name", TYPES)
def test_values_beyond_float16s_range_are_refused_by_place(name: str) -> None:
    values = np.ones((3, 96), np.float32)
    values[1, 70] = -LIMIT[name] * 1.01
    with pytest.raises(ValueError, match="at row 1, column 70"):
        blocks.encoded(name, values)
    values[1, 70] = -LIMIT[name]
    assert np.isfinite(CODECS[name].decode(blocks.encoded(name, values))).all()


def test_importance_must_be_finite_and_not_negative() -> None:
    values = np.ones((1, 32), np.float32)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="importance"):
            blocks.encoded("q4_0", values, np.full(32, bad, np.float32))
    assert np.array_equal(blocks.encoded("q8_0", values, np.zeros(32, np.float32)).shape, (1, 34))

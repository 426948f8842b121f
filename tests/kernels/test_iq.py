"""The i-types (iq2, iq3, iq4): decoded like ggml, encoded with less error; exact where the input came from the format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import block_codecs, ggml

from gptoss_convert.kernels import lattice
from gptoss_convert.kernels.codecs import CODECS

# name: (columns, the largest magnitude it holds)
TYPES = {
    "iq2_xxs": (3072, 65504 / 8 * 31 * 43),
    "iq2_xs": (3072, 65504 / 8 * 31 * 43),
    "iq2_s": (3072, 65504 / 8 * 31 * 43),
    "iq3_xxs": (3072, 65504 / 4 * 31 * 62),
    "iq3_s": (3072, 65504 * 31 * 15),
    "iq4_nl": (2880, 65504 * 127),
    "iq4_xs": (3072, 65504 * 32 * 127),
}
LATTICES = [name for name in TYPES if not name.startswith("iq4")]
# Our error over ggml's, at most: without and with importance.
RATIOS = {
    "iq2_xxs": (0.97, 0.94),
    "iq2_xs": (0.97, 0.93),
    "iq2_s": (0.92, 0.94),
    "iq3_xxs": (0.86, 0.97),
    "iq3_s": (0.87, 0.94),
    "iq4_nl": (0.99, 0.99),
    "iq4_xs": (0.985, 0.985),
}
FINITE = st.floats(-1e6, 1e6, width=32, allow_subnormal=True)


@pytest.mark.parametrize("name", TYPES)
def test_decodes_any_bytes_like_ggml(name: str) -> None:
    block_codecs.assert_decodes_like_ggml(name, TYPES[name][0])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", block_codecs.DATA)
def test_loses_less_than_ggml_with_and_without_importance(name: str, kind: str) -> None:
    plain, weighted = RATIOS[name]
    assert block_codecs.error_ratio(name, kind, TYPES[name][0], False) <= plain
    assert block_codecs.error_ratio(name, kind, TYPES[name][0], True) <= weighted


@pytest.mark.parametrize("name", TYPES)
def test_a_row_encodes_the_same_alone_in_any_chunk_and_in_threads(name: str) -> None:
    block_codecs.assert_rows_stand_alone(name, TYPES[name][0])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", block_codecs.DATA)
def test_what_was_decoded_encodes_to_the_same_values(name: str, kind: str) -> None:
    values = block_codecs.data(kind, 3, TYPES[name][0])
    decoded = CODECS[name].decode(block_codecs.encode(name, values, None))
    again = CODECS[name].decode(block_codecs.encode(name, decoded, block_codecs.importance(TYPES[name][0])))
    np.testing.assert_array_equal(again, decoded)


@pytest.mark.parametrize("name", LATTICES)
def test_the_fast_search_finds_the_nearest_point_for_any_weights(name: str) -> None:
    grid = lattice.grid(name)
    axes = grid.points.shape[1]
    rng = np.random.default_rng(4)
    for _ in range(20):
        y = np.abs(rng.normal(size=(256 // axes, axes))) * grid.levels[-1] * rng.uniform(0.1, 1.5)
        y = np.where(rng.random(y.shape) < 0.05, -y, y).astype(np.float32)
        w = np.exp(rng.normal(size=y.shape) * rng.uniform(0, 3)).astype(np.float32)
        ids = np.zeros(64, np.int32)
        scratch = np.zeros(64, np.int32), np.zeros(2048, np.float32)
        lattice.search(y.T.copy().reshape(-1), w.T.copy().reshape(-1), grid, *scratch, ids)
        nearest = lattice.nearest_reference(y, w, grid.points)
        found, best = (
            (w * (y.astype(np.float64) - grid.points[chosen]) ** 2).sum(axis=1) for chosen in (ids[: len(y)], nearest)
        )
        assert (found <= best * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", TYPES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_finite_values_and_importance_encode(name: str, data: st.DataObject) -> None:
    fill = st.one_of(st.just(0.0), FINITE)
    values = data.draw(hnp.arrays(np.float32, (2, 256), elements=FINITE, fill=fill))
    values *= data.draw(st.sampled_from([np.float32(1), np.float32(1e-30), np.float32(1e-42), np.float32(1e-6)]))
    weights = data.draw(st.none() | hnp.arrays(np.float32, 256, elements=st.floats(0, 1e6, width=32)))
    block_codecs.assert_sane(name, values, weights)


@pytest.mark.parametrize("name", TYPES)
def test_zeros_come_back_and_constants_and_single_values_lose_no_more_than_with_ggml(name: str) -> None:
    zeros, ones = np.zeros((1, 256), np.float32), np.ones(256, np.float32)
    assert not CODECS[name].decode(block_codecs.encode(name, zeros, None)).any()
    for value in (1.0, -3.5e-4, 3.5e-5, 1e5):
        single = zeros.copy()
        single[0, 77] = value
        for values in (single, zeros + np.float32(value)):
            ours, theirs = (
                block_codecs.relative_error(values, CODECS[name].decode(rows), None)
                for rows in (block_codecs.encode(name, values, None), ggml.encode(name, values, ones))
            )
            assert ours <= theirs + 1e-3


@pytest.mark.parametrize("name", TYPES)
def test_what_float16_cannot_scale_is_refused_by_row_and_column(name: str) -> None:
    values = np.ones((3, 512), np.float32)
    values[2, 300] = -TYPES[name][1]
    block_codecs.encode(name, values, None)
    values[2, 300] *= np.float32(1.01)
    with pytest.raises(ValueError, match="row 2, column 300"):
        block_codecs.encode(name, values, None)
    values[2, 300] = 3e38
    with pytest.raises(ValueError, match="row 2, column 300"):
        block_codecs.encode(name, values, None)


@pytest.mark.parametrize("name", TYPES)
def test_importance_that_is_negative_or_not_finite_is_refused(name: str) -> None:
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="importance"):
            block_codecs.encode(name, np.ones((1, 256), np.float32), np.full(256, wrong, np.float32))

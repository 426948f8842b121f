"""Grids: where each codec keeps its codes, held against the codec's own decoder."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.grids import Grid, get_codes, grid, lines, put_codes

WITH_GRID = [name for name in CODECS if grid(name) is not None]


def of(name: str) -> Grid:
    found = grid(name)
    assert found is not None
    return found


def rows(name: str, blocks: int = 3) -> np.ndarray:
    codec, g = CODECS[name], of(name)
    values = np.random.default_rng(7).standard_normal((5, blocks * g.block)).astype(np.float32)
    assert codec.encode is not None
    return codec.encode(values, None)


def test_every_codec_that_rounds_values_one_by_one_has_a_grid() -> None:
    lattices = {"iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
    rounding = {name for name, codec in CODECS.items() if codec.encode is not None}
    assert lattices <= rounding
    onnx = {"int4_mm", "int8_mm", "int4_moe", "int8_moe"}  # rounded by fixed rules
    assert set(WITH_GRID) == rounding - lattices - {"int8_channel"} - onnx


@pytest.mark.parametrize("name", WITH_GRID)
def test_codes_that_are_read_and_put_back_give_the_same_bytes(name: str) -> None:
    data = rows(name)
    assert np.array_equal(put_codes(of(name), data, get_codes(of(name), data)), data)


@pytest.mark.parametrize("name", WITH_GRID)
def test_every_code_at_every_place_decodes_to_its_level(name: str) -> None:
    g, data = of(name), rows(name)
    slope, offset = lines(g, data)
    for shift in range(len(g.levels)):
        codes = ((np.arange(data.shape[0] * 3 * g.block) + shift) % len(g.levels)).astype(np.uint8)
        codes = codes.reshape(data.shape[0], -1)
        found = CODECS[name].decode(put_codes(g, data, codes)).astype(np.float64)
        wanted = slope.astype(np.float64) * g.levels[codes] + offset
        tolerance = 4e-6 * np.abs(slope).max() * np.abs(g.levels).max()
        assert np.abs(found - wanted).max() <= tolerance


@pytest.mark.parametrize("name", WITH_GRID)
def test_no_two_codes_share_a_bit(name: str) -> None:
    bits = of(name).bits
    assert len(np.unique(bits)) == bits.size
    assert bits.max() < 8 * CODECS[name].block_bytes
    assert len(of(name).levels) == 2 ** bits.shape[1]

"""Exact zeros: the table says of every codec where it holds them, and its own decoder agrees."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_convert.kernels.codecs import BY_GGML_ID, FLOATS
from gptoss_convert.quant.zeros import RUN, holds_zeros

COLUMNS = 512
CODECS = [codec for codec in BY_GGML_ID.values() if codec.encode is not None]
PLACES = (1, 8, 16, 24, 32, 48, 64, 128, 160, 256, 272, 320)
SHAPES = {
    "even": lambda x: x,
    "positive": np.abs,
    "negative, far from zero": lambda x: -np.abs(x) - 0.05,
    "small": lambda x: x * 1e-4,
    "shifted": lambda x: x + 0.5,
    "few values": lambda x: np.round(x * 100) / 64,
}


def beyond(codec: str, first: int, *, masked: bool) -> float:
    """The largest magnitude that comes out where zeros went in, from column `first` on."""
    (chosen,) = (c for c in CODECS if c.name == codec)
    assert chosen.encode is not None
    importance = (np.arange(COLUMNS) < first).astype(np.float32) if masked else None
    largest = 0.0
    for shape in SHAPES.values():
        values = np.zeros((8, COLUMNS), np.float32)
        values[:, :first] = shape(np.random.default_rng(first).standard_normal((8, first)) * 0.02)
        decoded = chosen.decode(chosen.encode(values, importance))
        largest = max(largest, float(np.abs(decoded[:, first:]).max()))
    return largest


def test_the_table_speaks_of_every_codec_that_a_gguf_can_be_written_in() -> None:
    assert set(RUN) == {codec.name for codec in CODECS} | set(FLOATS)


@pytest.mark.parametrize("codec", [codec.name for codec in CODECS])
def test_zeros_come_out_exactly_where_the_table_says_and_nowhere_else(codec: str) -> None:
    for first in PLACES:
        assert (beyond(codec, first, masked=True) == 0) == holds_zeros(codec, first), first


@pytest.mark.parametrize("codec", [codec.name for codec in CODECS])
def test_they_do_without_importance_too(codec: str) -> None:
    assert all(beyond(codec, first, masked=False) == 0 for first in PLACES if holds_zeros(codec, first))


@pytest.mark.parametrize("codec", [codec.name for codec in CODECS])
def test_rows_of_zeros_come_out_as_zeros(codec: str) -> None:
    (chosen,) = (c for c in CODECS if c.name == codec)
    assert chosen.encode is not None
    values = np.zeros((5, COLUMNS), np.float32)
    values[1] = np.random.default_rng(1).standard_normal(COLUMNS)
    for importance in (None, (np.arange(COLUMNS) < 300).astype(np.float32)):
        decoded = chosen.decode(chosen.encode(values, importance))
        assert decoded[1].any()
        assert not decoded[[0, 2, 3, 4]].any()

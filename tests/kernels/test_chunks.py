"""Chunks: rows in the encoding they are stored in, selected, interleaved, looked through for values that are none."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_convert.kernels.chunks import Mxfp4, Rows, interleave
from gptoss_convert.kernels.codecs import encode_float

RNG = np.random.default_rng(9)


def packed(rows: int = 6) -> Mxfp4:
    return Mxfp4(RNG.integers(0, 256, (rows, 3, 16), np.uint8), RNG.integers(100, 130, (rows, 3), np.uint8))


def rows(encoding: str, count: int = 6) -> Rows:
    return Rows(encoding, encode_float(RNG.standard_normal((count, 96), np.float32), encoding))


@pytest.mark.parametrize("make", [packed, lambda: rows("bf16"), lambda: rows("f16"), lambda: rows("f32")])
def test_selecting_rows_selects_their_values(make) -> None:
    chunk = make()
    assert chunk.shape == (6, 96)
    for part in (slice(1, 4), slice(0, None, 2), slice(1, None, 2), np.array([5, 0, 3])):
        assert np.array_equal(chunk.select(part).values(), chunk.values()[part])
    assert chunk.same_bytes(chunk.select(slice(None)))
    assert not chunk.same_bytes(chunk.select(np.array([1, 0, 2, 3, 4, 5])))


@pytest.mark.parametrize("kinds", [("mxfp4", "mxfp4"), ("bf16", "bf16"), ("f16", "f32"), ("bf16", "f16")])
def test_interleaving_alternates_rows_and_keeps_values(kinds: tuple[str, str]) -> None:
    even, odd = (packed() if kind == "mxfp4" else rows(kind) for kind in kinds)
    both = interleave(even, odd)
    assert both.shape == (12, 96)
    assert np.array_equal(both.values()[0::2], even.values())
    assert np.array_equal(both.values()[1::2], odd.values())


def test_chunks_of_unlike_encodings_never_have_the_same_bytes() -> None:
    zeros = np.zeros((2, 64), np.uint8)
    assert not Rows("bf16", zeros).same_bytes(Rows("f16", zeros))
    assert not Rows("bf16", zeros).same_bytes(Mxfp4(np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.uint8)))


@pytest.mark.parametrize("encoding", ["bf16", "f16", "f32"])
def test_the_first_bad_value_is_named_by_row_and_column(encoding: str) -> None:
    values = np.ones((5, 96), np.float32)
    chunk = Rows(encoding, encode_float(values, encoding).copy())
    assert chunk.first_bad() is None
    nan = {"bf16": 0x7FC0, "f16": 0x7E00, "f32": 0x7FC00000}[encoding]
    chunk.data.view("<u4" if encoding == "f32" else "<u2")[3, 70] = nan
    assert chunk.first_bad() == (3, 70)


def test_a_bad_scale_is_named_by_row_and_column() -> None:
    chunk = packed()
    chunk.scales[4, 2] = 255
    assert chunk.first_bad() == (4, 64)


def test_a_q8_0_scale_that_is_not_finite_is_bad() -> None:
    data = np.zeros((3, 2 * 34), np.uint8)
    data[:, 2:] = 1
    data[2, 34:36] = 0x00, 0x7C  # infinity
    assert Rows("q8_0", data).first_bad() == (2, 32)

"""Integer groups: errors against plain rounding, exactness, storage types, and what any input may expect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import blocks

from gptoss_convert.kernels.int_groups import Kind, Storage, int_decode, int_encode

KINDS: tuple[Kind, ...] = ("symmetric", "zero", "offset")
SHAPES = [(4, 32), (4, 64), (8, 32), (8, 2880)]


def plain(values: np.ndarray, bits: int, group: int, kind: Kind) -> np.ndarray:
    """Rounding to a scale from the extreme values alone, in float64."""
    v = values.reshape(-1, group).astype(np.float64)
    top = 2**bits - 1
    if kind == "symmetric":
        scale = np.abs(v).max(axis=1, keepdims=True) / (top / 2)
        read = np.clip(np.rint(v / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    else:
        low, high = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)
        if kind == "zero":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / top
        if kind == "zero":
            low = -scale * np.rint(-low / scale)
        read = np.clip(np.rint((v - low) / scale), 0, top) * scale + low
    return read.reshape(values.shape)


@pytest.mark.parametrize(("bits", "group"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_at_most_that_of_plain_rounding(bits: int, group: int, kind: Kind, weighted: bool) -> None:
    importance = blocks.importances(2880) if weighted else None
    for data in blocks.DATA:
        values = blocks.sample(data, 2880)
        ours = blocks.relative_rms(
            values, int_decode(int_encode(values, bits, group, kind, "f32", importance)), importance
        )
        assert ours <= blocks.relative_rms(values, plain(values, bits, group, kind), importance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mxfp4_valued_groups_come_back_exactly_in_int8(kind: Kind, storage: Storage, weighted: bool) -> None:
    importance = blocks.importances(2880) if weighted else None
    values = blocks.sample("mxfp4", 2880)
    assert np.array_equal(int_decode(int_encode(values, 8, 32, kind, storage, importance)), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("storage", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_scales_and_offsets_are_held_by_their_storage_type(kind: Kind, storage: Storage, dtype: torch.dtype) -> None:
    for factor in (1e-6, 1.0, 1e4):
        groups = int_encode(blocks.sample("heavy", 2880) * np.float32(factor), 4, 32, kind, storage)
        for held in (groups.scales, groups.offsets):
            if held is not None:
                assert np.array_equal(torch.from_numpy(held).to(dtype).float().numpy(), held)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_see_their_neighbours(kind: Kind) -> None:
    values = np.concatenate([blocks.sample(data, 2880, 2) for data in blocks.DATA])
    for bits in (4, 8):
        whole = int_encode(values, bits, 32, kind, importance=blocks.importances(2880))
        for row in range(len(values)):
            alone = int_encode(values[row : row + 1], bits, 32, kind, importance=blocks.importances(2880))
            assert np.array_equal(alone.codes[0], whole.codes[row])
            assert np.array_equal(alone.scales[0], whole.scales[row])


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float32, (2, 64), elements=st.floats(-(2.0**126), 2.0**126, width=32)),
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([2, 4, 8]),
    storage=st.sampled_from(["bf16", "f32"]),
)
def test_any_finite_values_stay_finite(values: np.ndarray, kind: Kind, bits: int, storage: Storage) -> None:
    read = int_decode(int_encode(values, bits, 32, kind, storage)).astype(np.float64)
    assert np.isfinite(read).all()
    step = 2 * np.abs(values.astype(np.float64)).reshape(-1, 32).max(axis=1) / (2**bits - 1)
    allowed = np.repeat(step * 1.6, 32).reshape(values.shape) + 1e-37
    assert (np.abs(read - values) <= allowed).all()


def test_zeros_and_constants() -> None:
    for kind in KINDS:
        for value in (0.0, 1.0, -2.5):
            values = np.full((1, 64), value, np.float32)
            assert np.abs(int_decode(int_encode(values, 8, 32, kind)) - values).max() <= abs(value) * 2**-7


def test_scales_beyond_float16_are_refused_by_place() -> None:
    values = np.ones((2, 64), np.float32)
    values[1, 40] = 1e6
    with pytest.raises(ValueError, match="at row 1, column 40"):
        int_encode(values, 4, 32, "symmetric", "f16")
    assert np.isfinite(int_decode(int_encode(values, 4, 32, "symmetric", "bf16"))).all()

"""Rows of integers: bytes against compressed-tensors' own packing, exactness from MXFP4, and what any input may expect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import block_codecs

from gptoss_convert.errors import BadInput
from gptoss_convert.kernels import int_rows, mxfp4
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.int_groups import int_decode, int_encode
from gptoss_convert.kernels.witness import decode_packed
from gptoss_convert.quant.recipe import read_recipe

PACKED = {"int4_g32": 4, "int8_g32": 8}
NAMES = (*PACKED, "int8_channel")


def random_rows(name: str, columns: int = 96, rows: int = 7) -> np.ndarray:
    """Any codes, scales between 1 and 2."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (rows, columns // 2 if name == "int4_g32" else columns), np.uint8)
    groups = 1 if name == "int8_channel" else columns // 32
    scales = rng.integers(0x3F80, 0x4000, (rows, groups), np.uint16)
    wide = (scales.astype(np.uint32) << 16) if name == "int8_channel" else scales
    return int_rows.join(name, wide.view(np.uint8), codes)


@pytest.mark.parametrize("name", PACKED)
def test_codes_are_the_words_that_compressed_tensors_packs(name: str) -> None:
    bits, rows = PACKED[name], random_rows(name)
    scales, codes = int_rows.split(name, rows)
    words = torch.from_numpy(codes.view(np.int32).copy())
    integers = unpack_from_int32(words, bits, torch.Size((7, 96)))
    assert torch.equal(pack_to_int32(integers, bits), words)
    held = torch.from_numpy(scales.view(np.int16).copy()).view(torch.bfloat16).float()
    expected = integers.float() * held.repeat_interleave(32, dim=1)
    assert np.array_equal(CODECS[name].decode(rows), expected.numpy())


@pytest.mark.parametrize("name", PACKED)
def test_the_proofs_own_decoder_reads_the_same(name: str) -> None:
    rows = random_rows(name)
    scales, codes = int_rows.split(name, rows)
    assert np.array_equal(decode_packed(codes, scales, PACKED[name]), CODECS[name].decode(rows))


def test_a_channel_is_its_scale_and_bare_codes() -> None:
    rows = random_rows("int8_channel")
    scales, codes = int_rows.split("int8_channel", rows)
    assert scales.shape == (7, 4)
    assert np.array_equal(int_rows.int8_decode(codes), codes.view(np.int8))
    assert np.array_equal(CODECS["int8_channel"].decode(rows), codes.view(np.int8) * scales.view("<f4"))


@pytest.mark.parametrize("name", NAMES)
def test_split_and_join_undo_each_other(name: str) -> None:
    rows = random_rows(name)
    parts = int_rows.split(name, rows)
    assert all(part.flags.c_contiguous for part in parts)
    assert np.array_equal(int_rows.join(name, *parts), rows)


def test_every_mxfp4_block_is_an_int8_block() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(254, 0)
    scales = np.arange(254, dtype=np.uint8)[:, None].repeat(16, 1)
    want = mxfp4.decode(codes, scales)
    finite = np.isfinite(want).all(axis=1)
    assert finite.sum() == 253
    found = CODECS["int8_g32"].decode(int_rows.int8_g32_from_mxfp4(codes, scales))
    assert np.array_equal(found[finite], want[finite])


@pytest.mark.parametrize("code", range(1, 16))
def test_the_encoder_keeps_blocks_of_a_single_mxfp4_value_at_the_least_scales(code: int) -> None:
    blocks = np.zeros((16, 1, 16), np.uint8)
    blocks[:, 0, 0] = code
    values = mxfp4.decode(blocks, np.arange(16, dtype=np.uint8)[:, None])
    assert np.array_equal(CODECS["int8_g32"].decode(int_rows.int8_g32_encode(values, None)), values)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_encoder_keeps_mxfp4_values_in_int8(weighted: bool) -> None:
    values = block_codecs.data("mxfp4", 64, 2880)
    importance = block_codecs.importance(2880) if weighted else None
    assert np.array_equal(CODECS["int8_g32"].decode(int_rows.int8_g32_encode(values, importance)), values)


@pytest.mark.parametrize("kind", block_codecs.DATA)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "bits", "group"), [("int4_g32", 4, 32), ("int8_g32", 8, 32), ("int8_channel", 8, 960)]
)
def test_encoding_is_the_search_of_int_groups(name: str, bits: int, group: int, kind: str, weighted: bool) -> None:
    values = block_codecs.data(kind, 40, 960)
    importance = block_codecs.importance(960) if weighted else None
    want = int_decode(int_encode(values, bits, group, "symmetric", "bf16", importance))
    assert np.array_equal(CODECS[name].decode(block_codecs.encode(name, values, importance)), want)


@pytest.mark.parametrize("kind", block_codecs.DATA)
def test_a_channels_bfloat16_scale_costs_nothing_against_a_float32_one(kind: str) -> None:
    values = block_codecs.data(kind, 64, 2880)
    ours = CODECS["int8_channel"].decode(int_rows.int8_channel_encode(values, None))
    finer = int_decode(int_encode(values, 8, 2880, "symmetric", "f32"))
    best = block_codecs.relative_error(values, finer, None)
    assert block_codecs.relative_error(values, ours, None) <= 1.005 * best


@pytest.mark.parametrize("name", NAMES)
def test_a_channels_and_a_groups_scale_is_a_bfloat16(name: str) -> None:
    scales, _ = int_rows.split(name, block_codecs.encode(name, block_codecs.data("heavy", 9, 320), None))
    if name == "int8_channel":
        assert not (scales.view(np.uint32) & 0xFFFF).any()
    else:
        assert scales.shape == (9, 20)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_see_each_other(name: str) -> None:
    values = block_codecs.data("outlier", 70, 320)
    whole = block_codecs.encode(name, values, block_codecs.importance(320))
    for row in (0, 1, 63, 69):
        alone = block_codecs.encode(name, values[row : row + 1], block_codecs.importance(320))
        assert np.array_equal(alone[0], whole[row])


@settings(max_examples=40, deadline=None)
@given(
    values=hnp.arrays(np.float32, (2, 64), elements=st.floats(-(2.0**120), 2.0**120, width=32)),
    name=st.sampled_from(NAMES),
)
def test_any_finite_values_stay_near_themselves(values: np.ndarray, name: str) -> None:
    read = CODECS[name].decode(block_codecs.encode(name, values, None)).astype(np.float64)
    group = 64 if name == "int8_channel" else 32
    step = 2 * np.abs(values.astype(np.float64)).reshape(-1, group).max(axis=1) / (2 ** (4 if "4" in name else 8) - 1)
    # Of a group no more than rounding to the nearest costs, half a step each, and what a scale in bfloat16 adds, 2^-9 of a value:
    # a single one of 64 may lose more, where the others gain by it.
    lost = np.sqrt(np.square(read - values).reshape(-1, group).mean(axis=1))
    assert (lost <= 0.76 * step + 2.0**-127).all()  # bfloat16 has no scale between 0 and 2^-133


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_no_gguf_recipe_may_ask_for_them(name: str) -> None:
    text = "\n".join(f'{part} = "{name}"' for part in ("gate", "up", "down", "attention", "embedding", "head"))
    with pytest.raises(BadInput, match="no GGUF has"):
        read_recipe(text, "mine.toml")

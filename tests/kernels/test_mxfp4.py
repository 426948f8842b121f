"""MXFP4: all codes at all scales in every position, against the specification, gguf-py, ggml and OpenAI's own rows."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import ggml
from support.checkpoints import dequantize, ggml_mxfp4

from gptoss_convert.kernels import mxfp4, witness

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/release_rows.json").read_text())


def every_code_at_every_scale() -> tuple[np.ndarray, np.ndarray]:
    """256 rows, one a scale; 16 groups, in which each of the 32 places holds each code once and no two rows are alike."""
    scale, group, place = np.ogrid[:256, :16, :32]
    codes = ((group + 5 * place + 3 * (place // 16) + 7 * scale) % 16).astype(np.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)


BLOCKS, SCALES = every_code_at_every_scale()
FINITE = slice(0, 255)  # consumers disagree about scale 255


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def test_every_place_sees_every_code_at_every_scale() -> None:
    codes = np.stack([BLOCKS & 15, BLOCKS >> 4], axis=-1).reshape(256, 16, 32)
    assert (np.sort(codes, axis=1) == np.arange(16)[:, None]).all()


def test_decoding_is_the_formula_for_every_code_and_scale() -> None:
    with np.errstate(over="ignore"):
        expected = mxfp4.decode_reference(BLOCKS, SCALES)
    assert np.array_equal(bits(mxfp4.decode(BLOCKS, SCALES)), bits(expected))


def test_decoding_agrees_with_the_oracle() -> None:
    expected = dequantize(torch.from_numpy(BLOCKS[FINITE]), torch.from_numpy(SCALES[FINITE])).numpy()
    assert np.array_equal(bits(mxfp4.decode(BLOCKS[FINITE], SCALES[FINITE])), bits(expected))


def test_decoding_agrees_with_ggml_and_gguf_py() -> None:
    packed = mxfp4.to_ggml(BLOCKS[FINITE], SCALES[FINITE])
    values = mxfp4.decode(BLOCKS[FINITE], SCALES[FINITE])
    assert np.array_equal(ggml.decode("mxfp4", packed, values.shape[1]), values)
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs, values)


def test_bfloat16_bits_are_the_values_with_positive_zeros() -> None:
    rows = slice(0, 253)
    values = mxfp4.decode(BLOCKS[rows], SCALES[rows]) + np.float32(0)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(expected.float().numpy(), values)  # exact
    found = mxfp4.decode_bf16(BLOCKS[rows], SCALES[rows])
    assert np.array_equal(found, expected.view(torch.uint16).numpy())
    assert 0x8000 not in found


def test_packing_for_ggml_is_the_written_rule_and_the_oracles() -> None:
    packed = mxfp4.to_ggml(BLOCKS, SCALES)
    assert np.array_equal(packed, mxfp4.to_ggml_reference(BLOCKS, SCALES))
    assert np.array_equal(packed, ggml_mxfp4(torch.from_numpy(BLOCKS), torch.from_numpy(SCALES)))


def test_packing_for_ggml_and_back_keeps_every_bit() -> None:
    blocks, scales = mxfp4.from_ggml(mxfp4.to_ggml(BLOCKS, SCALES))
    assert np.array_equal(blocks, BLOCKS)
    assert np.array_equal(scales, SCALES)


@pytest.mark.parametrize("cut", [np.s_[::2], np.s_[1::2], np.s_[200:100:-3], np.s_[:, 3:11]], ids=str)
def test_strided_arrays_give_the_same_as_copies(cut: object) -> None:
    blocks, scales = BLOCKS[cut], SCALES[cut]
    copies = blocks.copy(), scales.copy()
    assert np.array_equal(mxfp4.to_ggml(blocks, scales), mxfp4.to_ggml(*copies))
    assert np.array_equal(bits(mxfp4.decode(blocks, scales)), bits(mxfp4.decode(*copies)))
    packed = np.repeat(mxfp4.to_ggml(*copies), 2, axis=0)[::2]
    assert np.array_equal(mxfp4.from_ggml(packed)[0], copies[0])


def test_the_witness_decoders_agree_with_the_oracle() -> None:
    blocks, scales = BLOCKS[FINITE], SCALES[FINITE]
    expected = dequantize(torch.from_numpy(blocks), torch.from_numpy(scales)).numpy()
    assert np.array_equal(bits(witness.decode_release(blocks.reshape(255, -1), scales)), bits(expected))
    packed = ggml_mxfp4(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert np.array_equal(bits(witness.decode_ggml(packed)), bits(expected))


def test_the_witness_shares_nothing_with_the_codecs() -> None:
    text = Path(witness.__file__).read_text()
    assert "import mxfp4" not in text
    assert "kernels.mxfp4" not in text
    assert "q_blocks" not in text.split('"""', 2)[2]


def test_rows_of_the_release_decode_and_pack_as_published() -> None:
    for row in GOLDENS["rows"]:
        blocks = np.frombuffer(bytes.fromhex(row["blocks"]), np.uint8).reshape(1, 1, 16)
        scales = np.frombuffer(bytes.fromhex(row["scale"]), np.uint8).reshape(1, 1)
        packed = mxfp4.to_ggml(blocks, scales)
        assert packed.tobytes().hex() == row["ggml"]
        if "values" in row:
            expected = np.array(row["values"], np.float32)
            assert mxfp4.decode(blocks, scales).tobytes() == expected.tobytes()  # signs of zeros too
            assert witness.decode_release(blocks.reshape(1, 16), scales).tobytes() == expected.tobytes()
            assert witness.decode_ggml(packed).tobytes() == expected.tobytes()


def test_scales_without_finite_values_are_found_where_they_are() -> None:
    for scale in range(256):
        for code in range(16):
            with np.errstate(over="ignore"):
                value = np.float32(np.float64(mxfp4.E2M1[code]) * 2.0 ** (scale - 127))
            blocks, scales = np.zeros((3, 4, 16), np.uint8), np.full((3, 4), 120, np.uint8)
            blocks[2, 1, 7], scales[2, 1] = code << 4, scale
            expected = (2, 1) if scale == 255 or not np.isfinite(value) else None
            assert mxfp4.first_bad_scale(blocks, scales) == expected, (scale, code)


def test_encoding_brings_every_mxfp4_value_back_exactly() -> None:
    # Scale 253 with codes up to 3 is finite; larger ones are first_bad_scale's.
    values = mxfp4.decode(BLOCKS[:253], SCALES[:253])
    again = mxfp4.decode(*mxfp4.encode(values))
    assert np.array_equal(again, values)
    for largest in range(1, 8):  # blocks in which not all codes occur may come back at another scale
        codes = np.minimum(np.stack([BLOCKS & 7, BLOCKS >> 4 & 7], -1), largest)
        codes |= np.stack([BLOCKS & 8, BLOCKS >> 4 & 8], -1)
        blocks = codes[..., 0] | codes[..., 1] << 4
        values = mxfp4.decode(blocks[:253], SCALES[:253])
        assert np.array_equal(mxfp4.decode(*mxfp4.encode(values)), values), largest


def test_encoding_twice_is_encoding_once() -> None:
    values = np.random.default_rng(5).standard_normal((7, 96), np.float32) * np.float32(3e-3)
    blocks, scales = mxfp4.encode(values)
    for _ in range(2):
        again = mxfp4.encode(mxfp4.decode(blocks, scales))
        assert np.array_equal(again[0], blocks)
        assert np.array_equal(again[1], scales)


def test_a_zero_is_positive_and_a_block_of_zeros_has_scale_zero() -> None:
    values = np.zeros((2, 64), np.float32)
    values[0] = -0.0
    values[1, 40] = -3
    values[1, 41] = -1e-9
    blocks, scales = mxfp4.encode(values)
    assert scales.tolist() == [[0, 0], [0, 126]] or scales[1, 1] in (126, 127)
    assert not blocks[0].any()
    assert not np.signbit(mxfp4.decode(blocks, scales)[1, 41])


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
near = st.floats(-8, 8, width=32)
grid = st.sampled_from(
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, -0.25, -5.0]
)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, (2, 32), elements=finite | near | grid))
def test_codes_are_the_nearest_and_the_scale_the_better_of_two(values: np.ndarray) -> None:
    blocks, scales = mxfp4.encode(values)
    wide = values.astype(np.float64)
    for row in range(2):
        scale = int(scales[row, 0])
        found = np.stack([blocks[row, 0] & 15, blocks[row, 0] >> 4], axis=-1).reshape(-1)
        decoded = mxfp4.E2M1[found].astype(np.float64) * 2.0 ** (scale - 127)
        amax = np.abs(wide[row]).max()
        if amax == 0:
            assert scale == 0
            continue
        assert np.array_equal(decoded, mxfp4.nearest_reference(wide[row], scale))
        floor = max(int(np.floor(np.log2(amax))) - 2 + 127, 0)
        choices = [floor, min(floor + 1, 254)]
        errors = [float(((wide[row] - mxfp4.nearest_reference(wide[row], s)) ** 2).sum()) for s in choices]
        assert scale in choices
        mine = float(((wide[row] - decoded) ** 2).sum())
        assert mine <= min(errors) * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.uint8, (3, 2, 16)), hnp.arrays(np.uint8, (3, 2), elements=st.integers(0, 252)))
def test_whatever_mxfp4_holds_comes_back_by_value(blocks: np.ndarray, scales: np.ndarray) -> None:
    values = mxfp4.decode(blocks, scales)
    assert np.array_equal(mxfp4.decode(*mxfp4.encode(values)), values)

"""Q8_0 and Q5_0: transcoding from MXFP4 is exact or refused; decoding and rounding are ggml's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import ggml

from gptoss_convert.kernels import mxfp4, q_blocks

CODECS = {
    "q8_0": (q_blocks.q8_0_from_mxfp4, q_blocks.q8_0_decode, 127, gguf.GGMLQuantizationType.Q8_0),
    "q5_0": (q_blocks.q5_0_from_mxfp4, q_blocks.q5_0_decode, 15, gguf.GGMLQuantizationType.Q5_0),
}
TWICE = (2 * mxfp4.E2M1).astype(int)


def blocks_of(codes: np.ndarray) -> np.ndarray:
    """Codes [..., 32] → packed [..., 16]."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def kinds_of_blocks() -> np.ndarray:
    """Blocks that differ in which codes occur: one code with its negative beside zeros, all up to a code, all sixteen."""
    place = np.arange(32)
    rows = [np.where(place % 3 == 0, code, 0) | np.where(place % 6 == 3, 8, 0) for code in range(8)]
    rows += [(place * 5 + place // 16) % (code + 1) | (place % 2) * 8 for code in range(8)]
    return blocks_of(np.stack(rows))


def holdable(block: np.ndarray, scale: int, largest: int) -> bool:
    """Whether a power of two that float16 holds makes all of the block's values integers of at most `largest`."""
    m = np.abs(TWICE[np.stack([block & 15, block >> 4])]).max(initial=0)
    odd = np.bitwise_or.reduce(np.abs(TWICE[np.stack([block & 15, block >> 4])]).reshape(-1))
    if m == 0:
        return True
    for power in range(-24, 16):
        shift = scale - 128 - power
        if shift >= 0 and m * 2.0**shift <= largest:
            return True
        if shift < 0 and odd % (1 << min(-shift, 30)) == 0:
            return True
    return False


@pytest.mark.parametrize("name", CODECS)
def test_each_block_is_held_exactly_at_every_scale_that_allows_it_and_refused_at_the_others(name: str) -> None:
    convert, decode, largest, kind = CODECS[name]
    taken = 0
    for block in kinds_of_blocks():
        for scale in range(255):
            scales = np.full((1, 1), scale, np.uint8)
            data, bad = convert(block.reshape(1, 1, 16), scales)
            expected = holdable(block, scale, largest)
            assert (bad < 0) == expected, (block, scale)
            if expected:
                taken += 1
                values = mxfp4.decode(block.reshape(1, 1, 16), scales)
                assert np.array_equal(decode(data), values)
                assert np.array_equal(ggml.decode(name, data, 32), values)
                assert np.array_equal(gguf.quants.dequantize(data, kind), values)
    assert 800 < taken < 1500  # of 16 · 255, two kinds being zeros: neither all nor hardly any


@pytest.mark.parametrize("name", CODECS)
def test_the_first_block_that_does_not_fit_is_named(name: str) -> None:
    blocks = np.full((3, 5, 16), 0x21, np.uint8)
    scales = np.full((3, 5), 120, np.uint8)
    scales[1, 3] = scales[2, 0] = 200
    assert CODECS[name][0](blocks, scales)[1] == 8


@pytest.mark.parametrize("name", CODECS)
def test_a_negative_zero_becomes_zero_and_nothing_else_changes(name: str) -> None:
    convert, decode, *_ = CODECS[name]
    codes = np.resize(np.arange(16), (2, 3, 32)).astype(np.uint8)
    scales = np.array([[120, 121, 122], [118, 126, 119]], np.uint8)
    data, bad = convert(blocks_of(codes), scales)
    assert bad == -1
    expected = mxfp4.decode(blocks_of(codes), scales)
    assert np.array_equal(decode(data), expected)
    zeros = decode(data)[expected == 0]
    assert zeros.size
    assert not np.signbit(zeros).any()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_as_ggml_decodes_them(name: str, data: st.DataObject) -> None:
    size = {"q8_0": 34, "q5_0": 22}[name]
    rows = data.draw(hnp.arrays(np.uint8, (2, 3 * size)))
    heads = rows.reshape(2, 3, size)[..., 1]
    heads &= 0xFB  # a scale that is not finite is a fault of the file
    found, theirs = CODECS[name][1](rows), ggml.decode(name, rows, 96)
    assert found.tobytes() == theirs.tobytes()


AWKWARD = [
    np.float32(0.49999997) * 127,
    np.float32(0.5) * 127,
    np.nextafter(np.float32(0.5), np.float32(0)),
    np.float32(0.5),
    np.float32(-0.5),
    np.float32(1.5),
    np.float32(-2.5),
    np.float32(126.5),
    np.float32(126.49999),
    np.float32(-127),
    np.float32(0),
    np.float32(-0.0),
    np.float32(1e-30),
]


@pytest.mark.parametrize("largest", [127.0, 63.5, 1.0, 0.3, 1e-4, 3e-8, 8e6])
def test_q8_0_rounds_the_awkward_values_as_ggml_does(largest: float) -> None:
    values = np.resize(np.array(AWKWARD, np.float32), (3, 64)) / np.float32(127) * np.float32(largest)
    values[:, 0::32] = largest
    values[2] *= -1
    assert np.array_equal(q_blocks.q8_0_encode(values), ggml.encode("q8_0", values))


def test_q8_0_does_not_round_just_below_a_half_upwards() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :3] = 127, np.float32(0.49999997), -np.float32(0.49999997)
    assert q_blocks.q8_0_encode(values)[0, 2:5].tolist() == [127, 0, 0]


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, (2, 64), elements=st.floats(-8e6, 8e6, width=32, allow_subnormal=False)))
def test_q8_0_rounds_as_ggml_does(values: np.ndarray) -> None:
    values[np.abs(values) < 1e-30] = 0  # below, 1/d overflows and C leaves the result open; d is 0 there in any case
    assert np.array_equal(q_blocks.q8_0_encode(values), ggml.encode("q8_0", values))


def test_a_block_too_small_for_its_scale_decodes_to_zeros() -> None:
    values = np.full((1, 32), 1e-42, np.float32)
    assert not q_blocks.q8_0_decode(q_blocks.q8_0_encode(values)).any()

"""bfloat16, float16 and float32: rounding as torch rounds, and the place of the first value that is no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import ggml

from gptoss_convert.kernels import floats
from gptoss_convert.kernels.codecs import BY_GGML_ID, CODECS, NOT_GGML, encode_float


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    values = floats.bf16_to_f32(bits)
    assert np.array_equal(values, torch.from_numpy(bits).view(torch.bfloat16).float().numpy())
    assert np.array_equal(floats.f32_to_bf16(values), bits)


def test_rounding_to_bfloat16_is_torchs() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32)[(np.arange(1 << 16) & 0x7F80) < 0x7F00]
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):  # around the halfway point, above even and odd bits
        values = (upper << 16 | lower).astype(np.uint32).view(np.float32)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(floats.f32_to_bf16(values), expected), hex(lower)


def test_rounding_takes_arrays_of_any_order_and_shape() -> None:
    values = np.random.default_rng(1).standard_normal((5, 12, 7), np.float32)
    for array in (values, values.T, values[::2, 1::3]):
        expected = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(floats.f32_to_bf16(array), expected)


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 12286])
def test_the_first_value_that_is_not_finite_is_found(kind: str, at: int) -> None:
    dtype = np.uint32 if kind == "f32" else np.uint16
    largest = {"bf16": 0x7F7F, "f16": 0x7BFF, "f32": 0x7F7FFFFF}[kind]
    bits = np.full((3, 4096), largest, dtype)
    bits[1] |= dtype(1 << (8 * dtype().itemsize - 1))
    assert floats.first_nonfinite(bits, kind) == -1
    for bad in (largest + 1, largest + 2, largest + 1 | 1 << (8 * dtype().itemsize - 1)):  # inf, NaN, −inf
        spoiled = bits.copy()
        spoiled.reshape(-1)[at] = spoiled.reshape(-1)[-1] = bad
        assert floats.first_nonfinite(spoiled, kind) == at


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (65, 63), (1, 200), (200, 1), (130, 257)])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_transposing_is_numpys(shape: tuple[int, int], dtype: str) -> None:
    words = np.random.default_rng(2).integers(0, 1 << 16, (2 * shape[0], shape[1]), np.uint32).astype(dtype)
    for array in (words, words[::2], words[: shape[0], : shape[1] // 2 + 1]):
        found = floats.transpose(array)
        assert found.flags.c_contiguous
        assert np.array_equal(found, array.T)


def test_float16_beyond_its_range_shows_as_infinity() -> None:
    data = encode_float(np.array([[65504, 65519, 65520, -1e9]], np.float32), "f16").view("<f2")
    assert data.tolist() == [[65504, 65504, np.inf, -np.inf]]


@pytest.mark.parametrize("name", CODECS)
def test_a_codecs_sizes_are_ggmls(name: str) -> None:
    codec = CODECS[name]
    if name in ggml.TYPES:
        assert (codec.ggml_id, codec.block, codec.block_bytes) == ggml.TYPES[name]
    if codec.ggml_id == NOT_GGML:
        assert codec not in BY_GGML_ID.values()
    else:
        assert BY_GGML_ID[codec.ggml_id] is codec
    assert codec.fits(768)
    assert codec.fits(769) == (codec.block == 1)
    assert codec.row_bytes(768) == codec.head + 768 // codec.block * codec.block_bytes
    assert codec.columns(codec.row_bytes(768)) == 768

"""Signed blocks: bit for bit what ONNX Runtime's and the builder's quantizers make, exact from MXFP4, read twice the same."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_convert.kernels import int_rows, mxfp4
from gptoss_convert.kernels.chunks import Mxfp4
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.inputs import Unfit
from gptoss_convert.kernels.signed_blocks import FIXED, first_astray
from gptoss_convert.kernels.witness import decode_unsigned
from gptoss_convert.quant.encode import encode

NAMES = {"int4_mm": 4, "int8_mm": 8, "int4_moe": 4, "int8_moe": 8}


def sample(kind: str) -> F32:
    """[64, 160]: random values with zero rows, zero blocks and, in one kind, many equal magnitudes."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=(64, 160)).astype(np.float32) * np.float32(0.02)
    if kind == "bfloat16":
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    if kind == "equal magnitudes":
        values = (np.rint(values * 200) / 8).astype(np.float32)
    if kind == "tiny":
        values *= np.float32(1e-5)  # scales around the least that the builder writes, below float16's normal range
    values[3] = 0
    values[5, :32] = 0
    return values


def split(name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, codes = int_rows.split(name, rows)
    return scales.view("<f4"), codes


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "equal magnitudes", "tiny"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense_blocks_are_the_runtimes_own_bit_for_bit(bits: int, kind: str) -> None:
    state = pytest.importorskip("onnxruntime.capi._pybind_state", reason="onnxruntime is not installed")
    values = sample(kind)
    rows, groups = values.shape[0], values.shape[1] // 32
    codes = np.zeros((rows, groups, 4 * bits), np.uint8)
    scales = np.zeros((rows, groups), np.float32)
    zeros = np.zeros((rows, -(-groups * bits // 8)), np.uint8)
    quantize = getattr(state, f"quantize_matmul_{bits}bits")
    quantize(codes, np.ascontiguousarray(values.T), scales, zeros, 32, rows, values.shape[1], True)
    encoder = CODECS[f"int{bits}_mm"].encode
    assert encoder is not None
    mine = split(f"int{bits}_mm", encoder(values, None))
    assert np.array_equal(mine[0].view(np.uint32), scales.view(np.uint32))
    assert np.array_equal(mine[1], codes.reshape(rows, -1))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "equal magnitudes", "tiny"])
def test_expert_blocks_follow_the_builders_formula(kind: str) -> None:
    blocks = sample(kind).reshape(64, 5, 32)
    at = np.abs(blocks).argmax(-1)[..., None]
    scales = np.take_along_axis(blocks, at, -1) / np.float32(-8)
    scales = np.where(np.abs(scales) < np.finfo(np.float32).eps, np.finfo(np.float32).eps, scales)
    codes = (np.clip(np.rint(blocks / scales), -8, 7) + 8).astype(np.uint8).reshape(64, 160)
    encoder = CODECS["int4_moe"].encode
    assert encoder is not None
    held, packed = split("int4_moe", encoder(sample(kind), None))
    assert np.array_equal(held, scales[..., 0].astype(np.float16).astype(np.float32))
    assert np.array_equal(packed, codes[:, 0::2] | codes[:, 1::2] << 4)


def test_every_mxfp4_code_at_every_scale_is_held_exactly() -> None:
    scales = np.arange(255, dtype=np.uint8)[:, None]
    half = np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4
    blocks = np.tile(half.astype(np.uint8), (255, 2))[:, None]
    rows = encode(Mxfp4(blocks, scales), "int8_moe", "x")
    finite = scales[:, 0] < 253
    assert np.array_equal(CODECS["int8_moe"].decode(rows)[finite], mxfp4.decode(blocks, scales)[finite])


def test_values_that_mxfp4_can_hold_come_back_from_floats_too() -> None:
    rng = np.random.default_rng(3)
    values = mxfp4.decode(rng.integers(0, 256, (40, 5, 16), np.uint8), rng.integers(100, 130, (40, 5)).astype(np.uint8))
    encoder = CODECS["int8_moe"].encode
    assert encoder is not None
    values[7, 40] = 0.123456
    made = encoder(values, None)
    assert np.array_equal(np.delete(CODECS["int8_moe"].decode(made), 7, axis=0), np.delete(values, 7, axis=0))
    assert np.array_equal(CODECS["int8_moe"].decode(made)[7, :32], values[7, :32])
    packed = Mxfp4(*mxfp4.encode(values))
    assert np.array_equal(np.delete(made, 7, axis=0), np.delete(encode(packed, "int8_moe", "x"), 7, axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_the_proofs_own_decoder_reads_the_same(name: str) -> None:
    encoder = CODECS[name].encode
    assert encoder is not None
    rows = encoder(sample("float32"), None)
    scales, codes = int_rows.split(name, rows)
    assert np.array_equal(decode_unsigned(codes, scales, NAMES[name]), CODECS[name].decode(rows))


@pytest.mark.parametrize(
    ("name", "error"), [("int4_mm", 0.11), ("int8_mm", 0.007), ("int4_moe", 0.11), ("int8_moe", 0.006)]
)
def test_rounding_costs_what_such_blocks_cost(name: str, error: float) -> None:
    values = sample("float32")
    encoder = CODECS[name].encode
    assert encoder is not None
    got = CODECS[name].decode(encoder(values, None))
    assert np.linalg.norm(got - values) < error * np.linalg.norm(values)
    assert not got[3].any()


@pytest.mark.parametrize("name", NAMES)
def test_tiny_values_do_not_become_large_ones(name: str) -> None:
    encoder = CODECS[name].encode
    assert encoder is not None
    for size in (1e-38, 1e-40, 1e-44):
        values = np.full((2, 32), size, np.float32)
        values[1, 1::2] *= -1
        got = CODECS[name].decode(encoder(values, None))
        assert np.abs(got).max() <= 2 * size, size


def test_a_value_beyond_float16_scales_is_refused_with_its_place() -> None:
    values = np.zeros((2, 64), np.float32)
    values[1, 40] = 1e7
    encoder = CODECS["int4_moe"].encode
    assert encoder is not None
    with pytest.raises(Unfit) as caught:
        encoder(values, None)
    assert (caught.value.row, caught.value.column) == (1, 40)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38, 1e-37, 1e-30, 1e-8, 1e-7, 1e-6, 1e-5, 0.02, 1e4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "equal magnitudes"])
def test_what_the_encoder_made_is_never_astray(name: str, size: float, kind: str) -> None:
    encoder = CODECS[name].encode
    assert encoder is not None
    values = sample(kind) * np.float32(size)
    assert first_astray(values, name, encoder(values, None)) is None


@pytest.mark.parametrize("name", FIXED)
def test_every_other_code_is_astray_and_named_by_its_place(name: str) -> None:
    """But in float16's last digit: there a value in the middle between two codes may be held by either."""
    encoder = CODECS[name].encode
    assert encoder is not None
    values = sample("float32")[:2, :64]
    rows, block = encoder(values, None), {4: 20, 8: 36}[NAMES[name]]
    seen = total = 0
    for byte in (i for i in range(rows.shape[1]) if i % block >= 4):
        for bit in range(8):
            changed = rows.copy()
            changed[1, byte] ^= 1 << bit
            place = first_astray(values, name, changed)
            column = byte // block * 32 + (byte % block - 4) * 8 // NAMES[name] + bit // NAMES[name]
            assert place in (None, (1, column))
            seen, total = seen + (place is not None), total + 1
    assert seen > 0.99 * total

"""What is hard on an encoder, for every one of them: values that are no numbers, importance of zero, outliers and few levels,
its own output, the ends of its range."""

from __future__ import annotations

import numpy as np
import pytest
from support import blocks, ggml

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.inputs import Unfit
from gptoss_convert.kernels.int_groups import int_decode, int_encode
from gptoss_convert.kernels.signed_blocks import FIXED

NAMES = [name for name, codec in CODECS.items() if codec.encode is not None]
INTEGERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
OUTLIERS = [f"{sign}{size}" for sign in ("either", "plus", "minus") for size in (15, 30, 100, 300, 1000)]
SETS = (*OUTLIERS, "ternary", "ternary of rows", "positive", "shifted", "negative", "constant", "single")
LARGEST = {
    "q4_0": 8 * 65504, "q4_1": 65504, "q5_0": 16 * 65504, "q5_1": 65504, "q8_0": 128 * 65504, "q2_k": 15 * 65504,
    "q3_k": 128 * 65504, "q4_k": 63 * 65504, "q5_k": 63 * 65504, "q6_k": 4096 * 65504, "iq4_nl": 127 * 65504,
    "iq4_xs": 32 * 127 * 65504, "nvfp4": 2688, "q2_0": 65504, "iq2_xxs": 65504 / 8 * 31 * 43, "mxfp4": 6 * 2.0**125,
}  # fmt: skip
GGML = [name for name in NAMES if name in ggml.TYPES]
# Where float32 rounds the difference of two products that a decoder computes, what they were cannot be told, or not within
# the steps that are spent on it; in IQ4_XS, where all values of a part have one magnitude.
ROUNDED = {
    "q2_k": ("plus1000",),
    "q4_k": ("either100", "either300", "plus100", "plus300", "plus1000"),
    "q5_k": ("plus300", "plus1000"),
    "iq4_xs": ("constant",),
}
# Measured: what is lost beyond ggml's error where it is not 1.0005 of it at most.
WORSE = {("q5_1", "minus100", True): 1.006, ("q2_k", "minus1000", True): 1.006}
ROUNDING = 2.0**-11  # of a float16 scale


def make(kind: str, columns: int, rows: int = 4, seed: int = 0) -> np.ndarray:
    """A data set around 0.02. Outliers: one of every 32 values, so many standard deviations, of either or of one sign."""
    random = np.random.default_rng([seed, SETS.index(kind)])
    values = random.standard_normal((rows, columns)) * 0.02
    for sign in ("either", "plus", "minus"):
        if kind.startswith(sign):
            groups, size = values.reshape(rows, -1, 32), 0.02 * float(kind.removeprefix(sign))
            at = random.integers(0, 32, (*groups.shape[:2], 1))
            signs = np.sign(np.take_along_axis(groups, at, 2)) if sign == "either" else {"plus": 1, "minus": -1}[sign]
            np.put_along_axis(groups, at, signs * size, 2)
    if kind.startswith("ternary"):
        values = random.integers(-1, 2, values.shape) * 0.02
        if kind == "ternary of rows":
            values *= np.exp(random.standard_normal((rows, 1)))
    if kind in ("positive", "negative"):
        values = np.abs(values) * (1 if kind == "positive" else -1)
    if kind == "shifted":
        values = 0.02 + 0.1 * values
    if kind == "constant":
        values = np.repeat(random.standard_normal((rows, columns // 256 + 1)) * 2, 256, axis=1)[:, :columns]
    if kind == "single":
        values = np.where(random.random(values.shape) < 1 / 256, values, 0)
    return values.astype(np.float32)


def columns_of(name: str) -> int:
    return 3072 if CODECS[name].block == 256 else 2880


def read(name: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """There and back."""
    return CODECS[name].decode(blocks.encoded(name, values, importance))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_no_number_is_refused_by_place(name: str, bad: float, weighted: bool) -> None:
    importance = np.ones(768, np.float32) if weighted else None
    for row, column in ((0, 0), (1, 333), (2, 767)):
        values = np.ones((3, 768), np.float32)
        values[row, column] = bad
        with pytest.raises(Unfit, match=f"at row {row}, column {column} is not a finite number") as caught:
            blocks.encoded(name, values, importance)
        assert (caught.value.row, caught.value.column, caught.value.finite) == (row, column, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["symmetric", "zero", "offset"])
def test_int_groups_refuse_it_too(bad: float, kind: str) -> None:
    values = np.ones((3, 64), np.float32)
    values[2, 40] = bad
    for storage in ("f16", "bf16", "f32"):
        with pytest.raises(Unfit, match="at row 2, column 40 is not a finite number"):
            int_encode(values, 4, 32, kind, storage)  # type: ignore[arg-type]
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="importance"):
            int_encode(np.ones((1, 64), np.float32), 4, 32, importance=np.full(64, wrong, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_importance_that_is_negative_or_no_number_is_refused(name: str) -> None:
    for wrong in (-1.0, np.nan, np.inf):
        importance = np.ones(768, np.float32)
        importance[500] = wrong
        with pytest.raises(ValueError, match="importance must be finite and not negative"):
            blocks.encoded(name, np.ones((1, 768), np.float32), importance)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED])
def test_blocks_without_importance_are_encoded_as_if_all_mattered_alike(name: str) -> None:
    columns, size = columns_of(name), CODECS[name].block
    values, ones = blocks.sample("heavy", columns, 3), np.ones(columns, np.float32)
    alike = blocks.encoded(name, values, ones).reshape(3, -1, CODECS[name].block_bytes)
    none = blocks.encoded(name, values, np.zeros(columns, np.float32)).reshape(alike.shape)
    assert np.array_equal(none, alike)
    importance = blocks.importances(columns)
    importance[size : 2 * size] = 0
    some = blocks.encoded(name, values, importance).reshape(alike.shape)
    assert np.array_equal(some[:, 1], alike[:, 1])
    assert not np.array_equal(some, alike)


@pytest.mark.parametrize("kind", ["symmetric", "zero", "offset"])
def test_int_groups_without_importance_likewise(kind: str) -> None:
    values, importance = blocks.sample("heavy", 2880, 3), blocks.importances(2880)
    alike = int_encode(values, 4, 32, kind, importance=np.ones(2880, np.float32))  # type: ignore[arg-type]
    importance[64:96] = 0
    some = int_encode(values, 4, 32, kind, importance=importance)  # type: ignore[arg-type]
    assert np.array_equal(some.codes[:, 64:96], alike.codes[:, 64:96])


@pytest.mark.parametrize("name", [name for name in NAMES if CODECS[name].block == 256])
def test_a_part_without_importance_is_still_encoded_well(name: str) -> None:
    values, importance = blocks.sample("gaussian", 3072, 6), blocks.importances(3072)
    importance.reshape(-1, 32)[3::8] = 0
    part = values.reshape(6, -1, 32)[:, 3::8]
    lost = blocks.relative_rms(part, read(name, values, importance).reshape(6, -1, 32)[:, 3::8])
    alike = blocks.relative_rms(part, read(name, values, np.ones(3072, np.float32)).reshape(6, -1, 32)[:, 3::8])
    assert lost <= 1.1 * alike


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_at_most_ggmls_on_hard_data(name: str, kind: str, weighted: bool) -> None:
    columns = columns_of(name)
    values, importance = make(kind, columns), blocks.importances(columns) if weighted else None
    ours = blocks.relative_rms(values, read(name, values, importance), importance)
    theirs = blocks.relative_rms(values, ggml.decode(name, ggml.encode(name, values, importance), columns), importance)
    # Where both come to nothing but how float16 rounds their scales, that is a matter of luck.
    assert ours <= WORSE.get((name, kind, weighted), 1.0005) * theirs or ours <= ROUNDING, ours / theirs


@pytest.mark.parametrize("name", INTEGERS)
def test_nor_where_a_few_columns_have_nearly_all_importance(name: str) -> None:
    columns = columns_of(name)
    importance = blocks.importances(columns) ** 3
    for kind in ("either30", "either300", "ternary", "positive"):
        values = make(kind, columns, seed=1)
        ours = blocks.relative_rms(values, read(name, values, importance), importance)
        theirs = blocks.relative_rms(
            values, ggml.decode(name, ggml.encode(name, values, importance), columns), importance
        )
        assert ours <= 1.0005 * theirs or ours <= 2 * ROUNDING, (kind, ours / theirs)


def again(name: str, values: np.ndarray, importance: np.ndarray | None) -> float:
    """The share of blocks that do not come back as they were decoded."""
    first = read(name, values, importance)
    second = read(name, first, importance)
    return float((first != second).reshape(-1, CODECS[name].block).any(axis=1).mean())


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("weighted", [False, True])
def test_decoded_values_encode_to_themselves(name: str, weighted: bool) -> None:
    columns = columns_of(name)
    importance = blocks.importances(columns) if weighted else None
    for kind in blocks.DATA:
        assert again(name, blocks.sample(kind, columns, 24), importance) == 0, kind


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("weighted", [False, True])
def test_so_do_those_of_hard_data(name: str, weighted: bool) -> None:
    columns = columns_of(name)
    importance = blocks.importances(columns) if weighted else None
    for kind in SETS:
        if kind in ROUNDED.get(name, ()):  # still nearly: no more is lost again than was at first
            values = make(kind, columns, 12, seed=2)
            first = read(name, values, importance)
            assert blocks.relative_rms(first, read(name, first, importance)) <= 0.1 * blocks.relative_rms(values, first)
        else:
            assert again(name, make(kind, columns, 12, seed=2), importance) <= 0.001, kind


@pytest.mark.parametrize("name", INTEGERS)
def test_so_do_those_of_ggmls_blocks(name: str) -> None:
    columns = columns_of(name)
    for kind in ("gaussian", "heavy"):
        theirs = ggml.decode(name, ggml.encode(name, blocks.sample(kind, columns)), columns)
        again_ = read(name, theirs)
        assert (theirs == again_).reshape(-1, CODECS[name].block).all(axis=1).mean() >= 0.999


@pytest.mark.parametrize("name", sorted(LARGEST))
def test_values_at_the_end_of_the_range_stay_finite_and_near(name: str) -> None:
    for sign in (1, -1):
        values = np.zeros((1, 768), np.float32)
        values[0, 1::2], values[0, 5] = LARGEST[name] / 3, sign * LARGEST[name] * (1 - 2**-20)
        decoded = read(name, values).astype(np.float64)
        assert np.isfinite(decoded).all()
        assert blocks.relative_rms(values, decoded) < 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-45, 3e-42, 1e-38, 1e-30, 1e-9])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_smallest_values_stay_finite_and_lose_no_more_than_all(name: str, size: float, weighted: bool) -> None:
    values = (blocks.sample("gaussian", 768, 2) / 0.02 * size).astype(np.float32)
    decoded = read(name, values, blocks.importances(768) if weighted else None)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded).max() <= 1e-6
    if name == "mxfp4":
        assert np.abs(decoded - values).max() <= np.abs(values).max() / 4 + 2.0**-128


def test_mxfp4_values_are_still_exact_where_they_can_be() -> None:
    values = mxfp4.decode(*mxfp4.encode(blocks.sample("gaussian", 3072)))
    for name in ("q5_0", "q5_1", "q8_0", "q5_k", "q6_k", "mxfp4"):
        assert np.array_equal(read(name, values), values)
    assert np.array_equal(int_decode(int_encode(values, 8, 32)), values)

"""What every block codec is asked: data sets, errors, and the checks its tests share. The judge is ggml."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from support import ggml

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.codecs import CODECS

DATA = ("gaussian", "heavy", "outlier", "mxfp4")
F32 = NDArray[np.float32]


def columns_of(name: str) -> int:
    """A true row length: the release's 2880, or 3072 where blocks of 256 need it."""
    return 3072 if CODECS[name].block == 256 else 2880


def sample(kind: str, columns: int, rows: int = 12) -> F32:
    """A data set: Gaussian with a spread over rows, Student's t, one outlier every 32 values, MXFP4-valued."""
    random = np.random.default_rng(7)
    values = random.standard_normal((rows, columns)) * 0.02 * np.exp(0.3 * random.standard_normal((rows, 1)))
    if kind == "heavy":
        values = random.standard_t(3.5, (rows, columns)) * 0.02
    if kind == "outlier":
        values.reshape(rows, -1, 32)[:, :, 5] *= 12
    result = values.astype(np.float32)
    return mxfp4.decode(*mxfp4.encode(result)) if kind == "mxfp4" else result


def importances(columns: int) -> F32:
    """Log-normal, one a column."""
    return np.exp(np.random.default_rng(9).standard_normal(columns)).astype(np.float32)


def relative_rms(values: F32, read: F32, weight: F32 | None = None) -> float:
    """√(Σ w (x − y)² / Σ w x²)."""
    w = 1.0 if weight is None else weight.astype(np.float64)
    x = values.astype(np.float64)
    return float(np.sqrt((w * (x - read) ** 2).sum() / (w * x**2).sum()))


def encoded(name: str, values: F32, importance: F32 | None = None) -> NDArray[np.uint8]:
    """By our encoder."""
    encode = CODECS[name].encode
    assert encode is not None
    return encode(values, importance)


def check_decoder(name: str) -> None:
    """Any bytes whose values are numbers decode to the very bits that ggml's decoder gives."""
    columns = 4 * CODECS[name].block
    rows = np.random.default_rng(1).integers(0, 256, (512, ggml.row_bytes(name, columns)), np.uint8)
    with np.errstate(invalid="ignore"):
        ours = CODECS[name].decode(rows)
    theirs = ggml.decode(name, rows, columns)
    numbers = ~np.isnan(theirs)
    assert numbers.mean() > 0.9
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


def check_error(name: str, kind: str, weighted: bool, at_most: float = 1.0) -> None:
    """The error is at most so much of ggml's."""
    columns = columns_of(name)
    values, importance = sample(kind, columns), importances(columns) if weighted else None
    ours = relative_rms(values, CODECS[name].decode(encoded(name, values, importance)), importance)
    theirs = relative_rms(values, ggml.decode(name, ggml.encode(name, values, importance), columns), importance)
    assert ours <= at_most * theirs + 1e-12, (ours, theirs)


def check_independence(name: str) -> None:
    """Rows encode alike alone, in any order and among any others, with importance and without."""
    columns = columns_of(name)
    values = np.concatenate([sample(kind, columns, 3) for kind in DATA])
    order = np.random.default_rng(3).permutation(len(values))
    for importance in (None, importances(columns)):
        whole = encoded(name, values, importance)
        assert np.array_equal(encoded(name, values[order], importance), whole[order])
        for row in range(len(values)):
            assert np.array_equal(encoded(name, values[row : row + 1], importance)[0], whole[row])


def check_finite(name: str, values: F32, importance: F32 | None = None) -> None:
    """What comes back is finite, and no further from the values than all zeros are."""
    read = ggml.decode(name, encoded(name, values, importance), values.shape[1])
    assert np.isfinite(read).all()
    w = np.ones(values.shape[1]) if importance is None else importance.astype(np.float64)
    x = values.astype(np.float64)
    assert (w * (x - read) ** 2).sum() <= (w * x**2).sum() * (1 + 1e-5) + 1e-12 * values.size


def check_again(name: str, values: F32) -> None:
    """What was decoded encodes to the same values."""
    read = CODECS[name].decode(encoded(name, values))
    assert np.array_equal(CODECS[name].decode(encoded(name, read)), read)

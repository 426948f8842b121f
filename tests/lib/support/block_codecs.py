"""What every lossy block codec is held to, against ggml: the same decoding, no greater error, independence of chunks.

data("gauss", rows, columns)      # also heavy, outlier, mxfp4: f32 [rows, columns], the same on every machine
relative_error(values, decoded, importance)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from support import ggml

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.codecs import CODECS

DATA = ("gauss", "heavy", "outlier", "mxfp4")
WITHOUT_DEFAULT = ("iq2_xxs", "iq2_xs")  # ggml refuses these without importance


def data(kind: str, rows: int, columns: int, seed: int = 1) -> np.ndarray:
    """Weights: Gaussian with rows of different spread, Student t of 4 degrees, one tenfold value a block, MXFP4-valued."""
    rng = np.random.default_rng(seed)
    spread = 0.02 * np.exp(rng.normal(size=(rows, 1)) / 2)
    values = rng.normal(size=(rows, columns)) * spread
    if kind == "heavy":
        values = rng.standard_t(4, size=(rows, columns)) * spread
    if kind == "outlier":
        blocks = values.reshape(rows, -1, 32)
        place = rng.integers(0, 32, (*blocks.shape[:2], 1))
        np.put_along_axis(blocks, place, 10 * np.take_along_axis(blocks, place, 2), 2)
    values = values.astype(np.float32)
    return mxfp4.decode(*mxfp4.encode(values)) if kind == "mxfp4" else values


def importance(columns: int, seed: int = 2) -> np.ndarray:
    """Log-normal weights of columns, f32."""
    return np.exp(np.random.default_rng(seed).normal(size=columns)).astype(np.float32)


def relative_error(values: np.ndarray, decoded: np.ndarray, weights: np.ndarray | None) -> float:
    """√(Σ w (x − y)² / Σ w x²)."""
    exact, w = values.astype(np.float64), 1.0 if weights is None else weights.astype(np.float64)
    return float(np.sqrt((w * (exact - decoded) ** 2).sum() / (w * exact**2).sum()))


def encode(name: str, values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Rows by our encoder."""
    encoder = CODECS[name].encode
    assert encoder is not None
    return encoder(values, weights)


def assert_decodes_like_ggml(name: str, columns: int) -> None:
    """On random bytes with a finite d, bit for bit."""
    codec = CODECS[name]
    rows = np.random.default_rng(3).integers(0, 256, (40, codec.row_bytes(columns)), np.uint8)
    rows.reshape(40, -1, codec.block_bytes)[:, :, 1] &= 0xBF
    ours, theirs = codec.decode(rows), ggml.decode(name, rows, columns)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def error_ratio(name: str, kind: str, columns: int, weighted: bool) -> float:
    """Our error over ggml's, both decoded by ggml."""
    values, weights = data(kind, 6, columns), importance(columns) if weighted else None
    default = np.ones(columns, np.float32) if name in WITHOUT_DEFAULT else None
    theirs = ggml.encode(name, values, weights if weighted else default)
    errors = [
        relative_error(values, ggml.decode(name, rows, columns), weights)
        for rows in (encode(name, values, weights), theirs)
    ]
    return errors[0] / errors[1]


def assert_rows_stand_alone(name: str, columns: int) -> None:
    """Each row encodes to the same bytes alone, in any chunk, after any other row, and in threads."""
    values = np.concatenate([data(kind, 2, columns) for kind in DATA])
    values[3] = 0
    values[5] *= np.float32(1e-36)
    weights = importance(columns)
    whole = encode(name, values, weights)
    for size in (1, 3, 5):
        parts = [encode(name, values[at : at + size], weights) for at in range(0, len(values), size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(encode(name, values[::-1], weights)[::-1], whole)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: encode(name, values, weights), range(8)):
            np.testing.assert_array_equal(rows, whole)


def assert_sane(name: str, values: np.ndarray, weights: np.ndarray | None) -> None:
    """It encodes; what decodes is finite; encoding is repeatable; the loss is at most that of all zeros."""
    rows = encode(name, values, weights)
    decoded = CODECS[name].decode(rows)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(encode(name, values, weights), rows)
    w = np.ones(values.shape[1]) if weights is None else weights / (weights.mean(dtype=np.float64) or 1) + 1e-8
    exact = values.astype(np.float64)
    assert (w * (exact - decoded) ** 2).sum() <= 1.0001 * (w * exact**2).sum() + 1e-60

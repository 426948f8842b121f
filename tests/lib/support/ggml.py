"""ggml's own encoders and decoders, in process: the judge and the peer of every GGUF codec.

    encode("q4_K", values, importance)   # f32 [R, C], f32 [C] or None → uint8 [R, row bytes]
    decode("q4_K", rows, columns)        # uint8 [R, row bytes] → f32 [R, C]
    encode_into, decode_into             # the same into a given array, for timing

Types go by ggml's name in any case, or by id. The library is the one inside the wheel `xllamacpp`; it runs on the
calling thread.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# name: (id in ggml.h, values a block, bytes a block)
TYPES: dict[str, tuple[int, int, int]] = {
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
    "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "iq2_xxs": (16, 256, 66),
    "iq2_xs": (17, 256, 74),
    "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50),
    "iq4_nl": (20, 32, 18),
    "iq3_s": (21, 256, 110),
    "iq2_s": (22, 256, 82),
    "iq4_xs": (23, 256, 136),
    "iq1_m": (29, 256, 56),
    "mxfp4": (39, 32, 17),
    "nvfp4": (40, 64, 36),
    "q2_0": (42, 64, 18),
}


def row_bytes(name: str, columns: int) -> int:
    """Bytes of one row of `columns` values."""
    _, block, size = TYPES[name.lower()]
    return columns // block * size


def encode(name: str, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """f32 [R, C] → uint8 [R, row bytes] by ggml's own encoder, with or without importance f32 [C]."""
    out = np.empty((values.shape[0], row_bytes(name, values.shape[1])), np.uint8)
    encode_into(name, values, importance, out)
    return out


def encode_into(
    name: str, values: NDArray[np.float32], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]
) -> None:
    """The same into `out`, uint8 [R, row bytes]. The tables of the i-quants are built on the first call."""
    kind = TYPES[name.lower()][0]
    _prepare(kind)
    values = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    rows, columns = values.shape
    written = _library().ggml_quantize_chunk(kind, _pointer(values), _pointer(out), 0, rows, columns, _pointer(weights))
    if written != out.size:
        raise AssertionError(f"ggml wrote {written} bytes of {name}, not {out.size}")


def decode(name: str, rows: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """uint8 [R, row bytes] → f32 [R, columns] by ggml's own decoder."""
    out = np.empty((rows.shape[0], columns), np.float32)
    decode_into(name, rows, out)
    return out


def decode_into(name: str, rows: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """The same into `out`, f32 [R, C]."""
    if rows.shape != (out.shape[0], row_bytes(name, out.shape[1])):
        raise ValueError(f"{rows.shape} is not the shape of {name} rows of {out.shape[1]} values")
    rows = np.ascontiguousarray(rows)
    lower = name.lower()
    symbol = "dequantize_row_" + (lower[:-1] + "K" if lower.endswith("_k") else lower)
    getattr(_library(), symbol)(_pointer(rows), _pointer(out), ctypes.c_int64(out.size))


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


@cache
def _prepare(kind: int) -> None:
    _library().ggml_quantize_init(kind)


@cache
def _library() -> ctypes.CDLL:
    # Found, not imported: importing the wheel starts its Python side, of which nothing is needed here.
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ImportError("xllamacpp is not installed")
    library = ctypes.CDLL(str(Path(found.origin).parent / "xllamacpp.abi3.so"))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library

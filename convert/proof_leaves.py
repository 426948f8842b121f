"""Leaves: the up to 1024 rows at a time in which the proof compares and digests values. See proof.py for the digests' formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import encode_float
from gptoss_convert.kernels.experts import differences
from gptoss_convert.kernels.floats import F32
from gptoss_convert.kernels.signed_blocks import FIXED, first_astray


@dataclass(frozen=True)
class Leaf:
    """What came of a leaf: digests, values that differ, Σ of squared errors and of squares, the largest error.

    astray: (row, column) of a value that the codec's rule cannot have put where it is.
    """

    same_bytes: bool
    digest: bytes
    artifact_digest: bytes
    different: int
    error: float
    square: float
    largest: float
    lost: float = 0.0  # squares of what a cut file has dropped
    astray: tuple[int, int] | None = None


def values_dtype(encoding: str) -> str:
    """The type in which an encoding's values are digested: the smaller that holds them all."""
    return "bf16" if encoding in ("bf16", "mxfp4") else "f32"


def compare_leaf(a: Chunk, b: Chunk, first: int, reference: Callable[[int, F32], F32]) -> Leaf:
    """reference: (row, the source's values from it on) → what the artifact should hold of them; `first`: the leaf's row."""
    if a.same_bytes(b):
        return Leaf(True, digest := leaf_digest(a), digest, 0, 0.0, 0.0, 0.0)
    count, error, square, largest, lost = 0, 0.0, 0.0, 0.0, 0.0
    astray: tuple[int, int] | None = None
    for start in range(0, a.shape[0], ROWS_AT_ONCE):
        part = b.select(slice(start, start + ROWS_AT_ONCE))
        x, y = a.select(slice(start, start + ROWS_AT_ONCE)).values(), part.values()
        wanted = reference(first + start, x)
        if astray is None and isinstance(part, Rows) and part.encoding in FIXED:
            place = first_astray(wanted, part.encoding, part.data)
            astray = place and (first + start + place[0], place[1])
        found = differences(wanted, y)
        dropped, loss, *_ = (0, 0.0) if wanted is x else differences(wanted, x)
        count, error, square = count + found[0] + dropped, error + found[1], square + found[2]
        largest, lost = max(largest, found[3]), lost + loss
    digest = leaf_digest(a)
    return Leaf(False, digest, leaf_digest(b) if count else digest, count, error, square, largest, lost, astray)


def leaf_digest(chunk: Chunk) -> bytes:
    """BLAKE3 of a leaf's values, see proof.py."""
    hasher = blake3.blake3()
    for start in range(0, chunk.shape[0], ROWS_AT_ONCE):
        rows = chunk.select(slice(start, start + ROWS_AT_ONCE))
        if isinstance(rows, Mxfp4):
            values: Any = mxfp4.decode_bf16(rows.blocks, rows.scales)
        else:
            signed = rows.values() + np.float32(0)  # turns −0 into 0
            values = np.ascontiguousarray(encode_float(signed, values_dtype(rows.encoding)))
        hasher.update(values.view(np.uint8).data)
    return hasher.digest()


def relative(leaf: Leaf) -> float:
    """A leaf's error relative to its values; infinite where something came from nothing."""
    if not leaf.error:
        return 0.0
    return math.sqrt(leaf.error / leaf.square) if leaf.square else math.inf

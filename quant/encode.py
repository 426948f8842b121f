"""A chunk → the bytes of a row codec, exactly where it can be done exactly, by a named rule where it is rounded.

    from \\ to       mxfp4             q8_0                   q5_0                  bf16, f16, f32
    the same        the bits          the bits               the bits              the bits
    mxfp4           bits moved        transcoded, exact      transcoded, exact     decoded, rounded to nearest
    floats, q…      mxfp4.encode      exact where the row    exact or refused      rounded to nearest even
                                      is MXFP4-valued, else
                                      ggml's rounding

No case falls back to another codec: what cannot be done is Refused with the tensor and the place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gptoss_convert.errors import Refused
from gptoss_convert.kernels import mxfp4, q_blocks
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, FLOATS, encode_float
from gptoss_convert.kernels.floats import F32, U8, first_nonfinite

EXPERT_CODECS = ("mxfp4", "q8_0", "q5_0", "bf16", "f16", "f32")
DENSE_CODECS = ("bf16", "f16", "f32", "q8_0")


def fate(source: str, target: str) -> str:
    """What happens to a tensor's values on the way from one encoding to another, in a few words; for plans."""
    if source == target:
        return "bits kept"
    if source == "mxfp4" and target in ("q8_0", "q5_0"):
        return "transcoded exactly"
    widening = {("bf16", "f32"), ("f16", "f32"), ("mxfp4", "f32"), ("mxfp4", "bf16"), ("q8_0", "f32"), ("q5_0", "f32")}
    return "widened exactly" if (source, target) in widening else f"rounded to {target}"


def encode(chunk: Chunk, codec: str, tensor: str, first_row: int = 0) -> U8:
    """A chunk of R rows → uint8 [R, row bytes] of the codec. `tensor` and `first_row` name the place in errors."""
    if isinstance(chunk, Rows) and chunk.encoding == codec:
        return chunk.data
    if not CODECS[codec].fits(chunk.shape[1]):
        raise Refused(
            "the codec's blocks do not divide the rows", tensor=tensor, found=f"{chunk.shape[1]} columns",
            expected=f"a multiple of {CODECS[codec].block} for {codec}", remedy="choose bf16, f16 or f32 for this tensor",
        )  # fmt: skip
    if isinstance(chunk, Mxfp4):
        if codec == "mxfp4":
            return mxfp4.to_ggml(chunk.blocks, chunk.scales)
        if codec in ("q8_0", "q5_0"):
            return _transcode(chunk, codec, tensor, first_row)
    return _by_rows(chunk, lambda values, row: _encode_values(values, codec, tensor, first_row + row))


def encode_packed(chunk: Chunk) -> Mxfp4:
    """A chunk → MXFP4 in release order: as it is, or encoded (`mxfp4.encode`), which keeps MXFP4-valued blocks exactly."""
    if isinstance(chunk, Mxfp4):
        return chunk
    rows, columns = chunk.shape
    blocks = np.empty((rows, columns // mxfp4.BLOCK, mxfp4.CODE_BYTES), np.uint8)
    scales = np.empty((rows, columns // mxfp4.BLOCK), np.uint8)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        blocks[part], scales[part] = mxfp4.encode(chunk.select(part).values())
    return Mxfp4(blocks, scales)


def _by_rows(chunk: Chunk, convert: Callable[[F32, int], U8]) -> U8:
    """Convert some rows at a time, so that the decoded values stay in the cache."""
    rows = chunk.shape[0]
    parts = [
        convert(chunk.select(slice(start, start + ROWS_AT_ONCE)).values(), start)
        for start in range(0, rows, ROWS_AT_ONCE)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _transcode(chunk: Mxfp4, codec: str, tensor: str, first_row: int) -> U8:
    convert = q_blocks.q8_0_from_mxfp4 if codec == "q8_0" else q_blocks.q5_0_from_mxfp4
    data, bad = convert(chunk.blocks, chunk.scales)
    if bad >= 0:
        row, group = divmod(bad, chunk.scales.shape[1])
        raise Refused(
            f"a block cannot be held exactly by {codec}: its scale is outside float16's powers of two",
            tensor=tensor,
            found=f"scale byte {chunk.scales[row, group]} at row {first_row + row}, column {32 * group}",
            remedy="keep the experts as mxfp4, or write them as bf16",
        )
    return data


def _encode_values(values: F32, codec: str, tensor: str, row: int) -> U8:
    if codec in FLOATS:
        data = encode_float(values, codec)
        at = first_nonfinite(data.view(np.uint32 if codec == "f32" else np.uint16), codec)
        if at >= 0:
            r, c = divmod(at, values.shape[1])
            raise Refused(
                f"a value is too large for {codec}", tensor=tensor,
                found=f"{values[r, c]:g} at row {row + r}, column {c}", remedy="choose bf16 or f32",
            )  # fmt: skip
        return data
    if codec == "mxfp4":
        return mxfp4.to_ggml(*mxfp4.encode(values))
    if codec == "q8_0":
        return _q8_0(values, tensor, row)
    return _q5_0(values, tensor, row)


def _q8_0(values: F32, tensor: str, row: int) -> U8:
    """Rows that hold MXFP4 values only are transcoded exactly; the others rounded by ggml's rule."""
    data = q_blocks.q8_0_encode(values)
    at = first_nonfinite(np.ascontiguousarray(data.reshape(len(data), -1, 34)[:, :, :2]).view(np.uint16), "f16")
    if at >= 0:
        r, group = divmod(at, values.shape[1] // 32)
        raise Refused(
            "a value is too large for q8_0, whose scales are float16", tensor=tensor,
            found=f"a block at row {row + r}, column {32 * group}", remedy="choose bf16 or f32",
        )  # fmt: skip
    blocks, scales = mxfp4.encode(values)
    exact = np.flatnonzero((mxfp4.decode(blocks, scales) == values).all(axis=1))
    for index in exact:
        transcoded, bad = q_blocks.q8_0_from_mxfp4(blocks[index : index + 1], scales[index : index + 1])
        if bad < 0:
            data[index] = transcoded[0]
    return data


def _q5_0(values: F32, tensor: str, row: int) -> U8:
    blocks, scales = mxfp4.encode(values)
    off = np.argwhere(mxfp4.decode(blocks, scales) != values)
    if len(off):
        raise Refused(
            "q5_0 is written only where it is exact, and these values are not MXFP4's", tensor=tensor,
            found=f"{values[tuple(off[0])]:g} at row {row + off[0][0]}, column {off[0][1]}",
            remedy="choose q8_0, mxfp4 or bf16 for these experts",
        )  # fmt: skip
    return _transcode(Mxfp4(blocks, scales), "q5_0", tensor, row)

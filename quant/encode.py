"""A chunk → the bytes of a row codec, exactly where it can be done exactly, by a named rule where it is rounded.

    from \\ to       mxfp4             q8_0, q5_0, nvfp4,       bf16, f16, f32               every other codec
                                      int8_g32, int8_moe
    the same        the bits          the bits                 the bits                     the bits
    mxfp4           bits moved        transcoded, exact        decoded, rounded to even     its encoder
    floats, q…      its encoder       its encoder, which is    rounded to even              its encoder
                                      exact on MXFP4 values

NVFP4's scales reach from 2^-9 to 448, and llama.cpp's graph of gpt-oss reads no scale of a whole tensor beside them (it loads one
and leaves it out). An MXFP4 block outside that range is refused, as by the others; so are values of other sources that are so
small that NVFP4 would lose more of them than rounding to four bits ever does.

An encoder takes the importance of the columns: padding of a widened model has none, so it cannot cost the model's own values
any precision. No case falls back to another codec: what cannot be done is Refused with the tensor and the place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.kernels import gain, int_rows, mxfp4, nvfp4, q_blocks, signed_blocks
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, FLOATS, encode_float
from gptoss_convert.kernels.floats import F32, U8, first_nonfinite
from gptoss_convert.kernels.inputs import Unfit, require_finite

EXPERT_CODECS = ("mxfp4", "q8_0", "q5_0", "bf16", "f16", "f32")
DENSE_CODECS = ("bf16", "f16", "f32", "q8_0")
FOUR_BITS_LOSE_AT_MOST = 0.3  # relative, of some rows; rounding to four bits with fitting scales costs a third of that
# Four-bit codecs whose scales end where values of a model may go on: what is said, the least scale, what to do.
_FAINT = {
    "nvfp4": (
        "the values are too small for NVFP4 without a scale of the whole tensor, which llama.cpp's gpt-oss does not read",
        "2^-9",
        "choose mxfp4, q8_0 or bf16 for this tensor",
    ),
    "int4_moe": (
        "the values are too small for int4_moe, whose scales are float16",
        "2^-23",
        "choose mxfp4 or int8 for the experts",
    ),
}


def fate(source: str, target: str) -> str:
    """What happens to a tensor's values on the way from one encoding to another, in a few words; for plans."""
    if source == target:
        return "bits kept"
    if source == "mxfp4" and target in ("q8_0", "q5_0", "nvfp4", "int8_g32", "int8_moe"):
        return "transcoded exactly"
    widening = {("bf16", "f32"), ("f16", "f32"), ("mxfp4", "f32"), ("mxfp4", "bf16"), ("q8_0", "f32"), ("q5_0", "f32")}
    return "widened exactly" if (source, target) in widening else f"rounded to {target}"


def encode(
    chunk: Chunk,
    codec: str,
    tensor: str,
    first_row: int = 0,
    importance: F32 | None = None,
    keep_gain: bool = False,
) -> U8:
    """A chunk of R rows → uint8 [R, row bytes] of the codec. `tensor` and `first_row` name the place in errors.

    importance: f32 [C], how much an error in each column matters; None: all alike. keep_gain: give each rounded row its gain back
    (kernels/gain.py), which only calibrated rounding does.
    """
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
        if codec == "int8_g32":
            return int_rows.int8_g32_from_mxfp4(chunk.blocks, chunk.scales)
        if codec == "int8_moe":
            return signed_blocks.int8_moe_from_mxfp4(chunk.blocks, chunk.scales)
        if codec == "nvfp4":
            return _transcode_nvfp4(chunk, tensor, first_row, importance)

    def rows_of(values: F32, row: int) -> U8:
        data = _encode_values(values, codec, tensor, first_row + row, importance)
        if not keep_gain or importance is None:
            return data
        return gain.restore_by_importance(data, codec, values, importance)

    data = _by_rows(chunk, rows_of)
    if codec in _FAINT:
        _refuse_faint(chunk, data, codec, tensor, first_row)
    return data


def encode_packed(chunk: Chunk, importance: F32 | None = None) -> Mxfp4:
    """A chunk → MXFP4 in release order: as it is, or encoded (`mxfp4.encode`), which keeps MXFP4-valued blocks exactly."""
    if isinstance(chunk, Mxfp4):
        return chunk
    rows, columns = chunk.shape
    blocks = np.empty((rows, columns // mxfp4.BLOCK, mxfp4.CODE_BYTES), np.uint8)
    scales = np.empty((rows, columns // mxfp4.BLOCK), np.uint8)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        blocks[part], scales[part] = mxfp4.encode(chunk.select(part).values(), importance)
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


def _transcode_nvfp4(chunk: Mxfp4, tensor: str, first_row: int, importance: F32 | None) -> U8:
    """Exact by nvfp4's own encoder, which tries a scale that holds the block wherever there is one."""
    data = np.empty((chunk.shape[0], CODECS["nvfp4"].row_bytes(chunk.shape[1])), np.uint8)
    for start in range(0, chunk.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        values = chunk.select(part).values()
        held = np.abs(values) <= nvfp4.LARGEST
        if held.all():
            data[part] = nvfp4.nvfp4_encode(values, importance)
            held = nvfp4.nvfp4_decode(data[part]) == values
        if not held.all():
            row, column = (int(i) for i in np.argwhere(~held)[0])
            exponent = int(chunk.scales[start + row, column // mxfp4.BLOCK]) - 127
            side = "below" if exponent < 0 else "above"
            raise Refused(
                f"a block's scale is {side} what NVFP4 holds without a scale of the whole tensor, "
                "which llama.cpp's gpt-oss does not read",
                tensor=tensor,
                found=f"scale 2^{exponent} at row {first_row + start + row}, column {column // mxfp4.BLOCK * mxfp4.BLOCK}",
                expected="scales from 2^-9 to 2^8, or codes that such a scale can hold",
                remedy="keep the experts as mxfp4",
            )
    return data


def _refuse_faint(chunk: Chunk, data: U8, codec: str, tensor: str, first_row: int) -> None:
    """Refuse rows that lost too much in a codec of _FAINT, which only values below its scales do."""
    error = total = 0.0
    for start in range(0, chunk.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        values = chunk.select(part).values()
        error += float(np.square(CODECS[codec].decode(data[part]) - values, dtype=np.float64).sum())
        total += float(np.square(values, dtype=np.float64).sum())
    if error > FOUR_BITS_LOSE_AT_MOST**2 * total:
        what, least, remedy = _FAINT[codec]
        raise Refused(
            what,
            tensor=tensor,
            found=f"a relative error of {(error / total) ** 0.5:.2g} in the {chunk.shape[0]} rows from row {first_row}",
            expected=f"at most {FOUR_BITS_LOSE_AT_MOST}; the smallest scale is {least}",
            remedy=remedy,
        )


def _encode_values(values: F32, codec: str, tensor: str, row: int, importance: F32 | None) -> U8:
    if codec in FLOATS:
        return _round_float(values, codec, tensor, row)
    encoder = CODECS[codec].encode
    if encoder is None:
        raise Refused("a codec that is only read", tensor=tensor, found=codec)
    try:
        return encoder(values, importance)
    except Unfit as error:
        if not error.finite:
            raise _not_finite(error, tensor, row) from error
        raise Refused(
            f"a value is too large for {codec}, whose scales are {'E4M3' if codec == 'nvfp4' else 'float16'}", tensor=tensor,
            found=f"{error.value:g} at row {row + error.row}, column {error.column}",
            remedy="choose mxfp4 or int8 for the experts" if codec == "int4_moe" else "choose mxfp4, bf16 or f32 for this tensor",
        ) from error  # fmt: skip


def _not_finite(error: Unfit, tensor: str, row: int) -> BadInput:
    return BadInput(
        "a value is not a finite number", tensor=tensor,
        found=f"{error.value:g} at row {row + error.row}, column {error.column}",
        remedy="the source, or what computed these values, is at fault",
    )  # fmt: skip


def _round_float(values: F32, codec: str, tensor: str, row: int) -> U8:
    try:
        require_finite(values)
    except Unfit as error:
        raise _not_finite(error, tensor, row) from error
    data = encode_float(values, codec)
    at = first_nonfinite(data.view(np.uint32 if codec == "f32" else np.uint16), codec)
    if at >= 0:
        r, c = divmod(at, values.shape[1])
        raise Refused(
            f"a value is too large for {codec}", tensor=tensor,
            found=f"{values[r, c]:g} at row {row + r}, column {c}", remedy="choose bf16 or f32",
        )  # fmt: skip
    return data

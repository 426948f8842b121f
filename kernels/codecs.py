"""The codecs by name: how many bytes a row takes, rows of bytes → values, and values → rows where the codec rounds.

A *row codec* stores each row of a matrix by itself, so any range of rows can be read, permuted or written alone. The ids
are ggml's; what is not ggml's (`int_rows`, `signed_blocks`) has NOT_GGML and cannot stand in a GGUF. MXFP4 here is ggml's
block order; the release's two-tensor order is `Mxfp4` in `kernels.chunks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptoss_convert.kernels import (
    int_rows,
    iq2,
    iq3,
    iq4,
    k_blocks,
    legacy_blocks,
    mxfp4,
    nvfp4,
    q2_0,
    q_blocks,
    signed_blocks,
)
from gptoss_convert.kernels.floats import F32, U8, bf16_to_f32, f32_to_bf16

NOT_GGML = -1


@dataclass(frozen=True)
class Codec:
    """A row codec. `fields`: the bytes of one block, part by part; `block`: the values it holds; `head`: bytes before a
    row's first block.

    `encode`: values f32 [R, C] and the importance of their columns, f32 [C] or None, → rows; ValueError where a value is
    beyond the codec's range.
    """

    name: str
    ggml_id: int
    block: int
    fields: tuple[int, ...]
    decode: Callable[[U8], F32]
    encode: Callable[[F32, F32 | None], U8] | None = None
    head: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(self.fields)

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` values divide into blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; `columns` must fit."""
        return self.head + columns // self.block * self.block_bytes

    def field_bytes(self, columns: int) -> tuple[int, int]:
        """Of a codec that files keep in two tensors: bytes of a row's scales and of its codes."""
        scales = self.head or columns // self.block * self.fields[0]
        return scales, self.row_bytes(columns) - scales

    def columns(self, row_bytes: int) -> int:
        """Values of a row of that many bytes."""
        return (row_bytes - self.head) // self.block_bytes * self.block


def _decode_f32(rows: U8) -> F32:
    return np.ascontiguousarray(rows).view("<f4")


def _decode_f16(rows: U8) -> F32:
    return np.ascontiguousarray(rows).view("<f2").astype(np.float32)


def _decode_bf16(rows: U8) -> F32:
    return bf16_to_f32(np.ascontiguousarray(rows).view("<u2"))


def _decode_mxfp4(rows: U8) -> F32:
    return mxfp4.decode(*mxfp4.from_ggml(rows))


def _encode_mxfp4(values: F32, importance: F32 | None) -> U8:
    return mxfp4.to_ggml(*mxfp4.encode(values, importance))


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("f32", 0, 1, (4,), _decode_f32),
        Codec("f16", 1, 1, (2,), _decode_f16),
        Codec("q4_0", 2, 32, (2, 16), legacy_blocks.q4_0_decode, legacy_blocks.q4_0_encode),
        Codec("q4_1", 3, 32, (2, 2, 16), legacy_blocks.q4_1_decode, legacy_blocks.q4_1_encode),
        Codec("q5_0", 6, 32, (2, 4, 16), q_blocks.q5_0_decode, legacy_blocks.q5_0_encode),
        Codec("q5_1", 7, 32, (2, 2, 4, 16), legacy_blocks.q5_1_decode, legacy_blocks.q5_1_encode),
        Codec("q8_0", 8, 32, (2, 32), q_blocks.q8_0_decode, legacy_blocks.q8_0_encode),
        Codec("q2_k", 10, 256, (16, 64, 2, 2), k_blocks.q2_k_decode, k_blocks.q2_k_encode),
        Codec("q3_k", 11, 256, (32, 64, 12, 2), k_blocks.q3_k_decode, k_blocks.q3_k_encode),
        Codec("q4_k", 12, 256, (2, 2, 12, 128), k_blocks.q4_k_decode, k_blocks.q4_k_encode),
        Codec("q5_k", 13, 256, (2, 2, 12, 32, 128), k_blocks.q5_k_decode, k_blocks.q5_k_encode),
        Codec("q6_k", 14, 256, (128, 64, 16, 2), k_blocks.q6_k_decode, k_blocks.q6_k_encode),
        Codec("iq2_xxs", 16, 256, iq2.XXS_FIELDS, iq2.iq2_xxs_decode, iq2.iq2_xxs_encode),
        Codec("iq2_xs", 17, 256, iq2.XS_FIELDS, iq2.iq2_xs_decode, iq2.iq2_xs_encode),
        Codec("iq3_xxs", 18, 256, iq3.XXS_FIELDS, iq3.iq3_xxs_decode, iq3.iq3_xxs_encode),
        Codec("iq4_nl", 20, 32, iq4.NL_FIELDS, iq4.iq4_nl_decode, iq4.iq4_nl_encode),
        Codec("iq3_s", 21, 256, iq3.S_FIELDS, iq3.iq3_s_decode, iq3.iq3_s_encode),
        Codec("iq2_s", 22, 256, iq2.S_FIELDS, iq2.iq2_s_decode, iq2.iq2_s_encode),
        Codec("iq4_xs", 23, 256, iq4.XS_FIELDS, iq4.iq4_xs_decode, iq4.iq4_xs_encode),
        Codec("bf16", 30, 1, (2,), _decode_bf16),
        Codec("mxfp4", 39, 32, (1, 16), _decode_mxfp4, _encode_mxfp4),
        Codec("nvfp4", 40, 64, (4, 32), nvfp4.nvfp4_decode, nvfp4.nvfp4_encode),
        Codec("q2_0", 42, 64, (2, 16), q2_0.q2_0_decode, q2_0.q2_0_encode),
        Codec("int4_g32", NOT_GGML, 32, int_rows.INT4_G32, int_rows.int4_g32_decode, int_rows.int4_g32_encode),
        Codec("int8_g32", NOT_GGML, 32, int_rows.INT8_G32, int_rows.int8_g32_decode, int_rows.int8_g32_encode),
        Codec(
            "int8_channel", NOT_GGML, 1, (1,), int_rows.int8_channel_decode, int_rows.int8_channel_encode,
            head=int_rows.CHANNEL_SCALE,
        ),
        Codec("int8", NOT_GGML, 1, (1,), int_rows.int8_decode),
        Codec("int4_mm", NOT_GGML, 32, signed_blocks.INT4, signed_blocks.int4_decode, signed_blocks.int4_mm_encode),
        Codec("int8_mm", NOT_GGML, 32, signed_blocks.INT8, signed_blocks.int8_decode, signed_blocks.int8_mm_encode),
        Codec("int4_moe", NOT_GGML, 32, signed_blocks.INT4, signed_blocks.int4_decode, signed_blocks.int4_moe_encode),
        Codec("int8_moe", NOT_GGML, 32, signed_blocks.INT8, signed_blocks.int8_decode, signed_blocks.int8_moe_encode),
    )
}  # fmt: skip
BY_GGML_ID: dict[int, Codec] = {codec.ggml_id: codec for codec in CODECS.values() if codec.ggml_id != NOT_GGML}
FLOATS = ("bf16", "f16", "f32")


def encode_float(values: F32, name: str) -> U8:
    """f32 [R, C] → rows of bytes in bf16, f16 or f32, rounded to nearest even; f16 overflows to infinity (callers check)."""
    if name == "bf16":
        return f32_to_bf16(values).view(np.uint8)
    if name == "f16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").view(np.uint8)
    return np.ascontiguousarray(values, "<f4").view(np.uint8)

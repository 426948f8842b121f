"""ggml's IQ3_XXS and IQ3_S: super-blocks of 256 values; groups of 4 magnitudes are points of a lattice with 8 levels.

    IQ3_XXS, 98 bytes: d (f16), 64 numbers of points, 8 words;    value = ± d/4 · (2·scale + 1) · point
          word: 4 × 7 bits for the signs of 8 values each (the eighth makes the number of negative ones even), 4 bits scale
    IQ3_S, 110 bytes: d (f16), 64 lower bytes of numbers, 8 bytes of ninth bits, 32 bytes signs, 4 bytes scales;
          value = ± d · (2·scale + 1) · point;   two scales a byte, the even one low

A scale is shared by 32 values. How an encoder chooses them: `lattice_fit`.
"""

from __future__ import annotations

import numpy as np

from gptoss_convert.kernels import lattice
from gptoss_convert.kernels import lattice_bits as bits
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.lattice_bits import Packed, Rule
from gptoss_convert.kernels.lattice_fit import fit

XXS_FIELDS = (2, 64, 32)  # d, numbers, signs and scales
S_FIELDS = (2, 64, 8, 32, 4)  # d, numbers, their ninth bits, signs, scales
_PART = 32
_XXS_STEP, _S_STEP = 0.25, 1.0


def iq3_xxs_decode(rows: U8) -> F32:
    """uint8 [R, B·98] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq3_xxs."""
    d, blocks = bits.heads(rows, sum(XXS_FIELDS))
    scales, signs = bits.from_sign_words(blocks[:, :, 66:].reshape(*d.shape, 8, 4))
    packed = Packed(d, scales, blocks[:, :, 2:66].astype(np.uint16), signs)
    return bits.expand(packed, lattice.points("iq3_xxs"), _XXS_STEP)


def iq3_xxs_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·98]; ValueError as `fit` says."""
    return _encode("iq3_xxs", values, importance)


def _xxs_pack(packed: Packed) -> U8:
    words = bits.sign_words(packed.scales, packed.signs).reshape(*packed.d.shape, 32)
    return bits.join(packed.d, packed.ids.astype(np.uint8), words)


def iq3_s_decode(rows: U8) -> F32:
    """uint8 [R, B·110] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq3_s."""
    d, blocks = bits.heads(rows, sum(S_FIELDS))
    ninth = np.unpackbits(blocks[:, :, 66:74], axis=2, bitorder="little").astype(np.uint16)
    ids = (blocks[:, :, 2:66] | ninth << 8).astype(np.uint16)
    packed = Packed(d, bits.from_nibbles(blocks[:, :, 106:]), ids, np.ascontiguousarray(blocks[:, :, 74:106]))
    return bits.expand(packed, lattice.points("iq3_s"), _S_STEP)


def iq3_s_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·110]; ValueError as `fit` says."""
    return _encode("iq3_s", values, importance)


def _s_pack(packed: Packed) -> U8:
    ninth = np.packbits((packed.ids >> 8).astype(np.uint8), axis=2, bitorder="little")
    lower = packed.ids.astype(np.uint8)
    return bits.join(packed.d, lower, ninth, packed.signs, bits.nibbles(packed.scales))


RULES = {"iq3_xxs": Rule(_PART, True, _XXS_STEP, _xxs_pack), "iq3_s": Rule(_PART, False, _S_STEP, _s_pack)}


def _encode(name: str, values: F32, importance: F32 | None) -> U8:
    rule = RULES[name]
    return rule.pack(fit(values, importance, lattice.grid(name), rule.part, rule.even, rule.step))

"""ggml's IQ2_XXS, IQ2_XS and IQ2_S: super-blocks of 256 values; groups of 8 magnitudes are points of a lattice with 3 levels.

    IQ2_XXS, 66 bytes: d (f16), 8 × 8 bytes: 4 numbers of points, then 4 × 7 bits signs and 4 bits scale, of 32 values
    IQ2_XS, 74 bytes: d (f16), 32 words: 9 bits number, 7 bits signs; 8 bytes scales of 16 values, the even ones low
    IQ2_S, 82 bytes: d (f16), 32 lower bytes of numbers, 32 bytes signs, 8 bytes of their 2 upper bits (the first group's
          lowest), 8 bytes scales of 16 values
    value = ± d/8 · (2·scale + 1) · point

7 bits stand for the signs of 8 values of which an even number is negative. How an encoder chooses them: `lattice_fit`.
"""

from __future__ import annotations

import numpy as np

from gptoss_convert.kernels import lattice
from gptoss_convert.kernels import lattice_bits as bits
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.lattice_bits import EVEN_SIGNS, Packed, Rule
from gptoss_convert.kernels.lattice_fit import fit

XXS_FIELDS = (2, 64)  # d, numbers with signs and scales
XS_FIELDS = (2, 64, 8)  # d, numbers with signs, scales
S_FIELDS = (2, 32, 32, 8, 8)  # d, numbers, signs, the numbers' upper bits, scales
_STEP = 0.125
_UPPER = np.array([0, 2, 4, 6], np.uint8)


def iq2_xxs_decode(rows: U8) -> F32:
    """uint8 [R, B·66] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq2_xxs."""
    d, blocks = bits.heads(rows, sum(XXS_FIELDS))
    pairs = blocks[:, :, 2:].reshape(*d.shape, 8, 8)
    scales, signs = bits.from_sign_words(pairs[..., 4:])
    ids = pairs[..., :4].reshape(*d.shape, 32).astype(np.uint16)
    return bits.expand(Packed(d, scales, ids, signs), lattice.points("iq2_xxs"), _STEP)


def iq2_xxs_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·66]; ValueError as `fit` says."""
    return _encode("iq2_xxs", values, importance)


def _xxs_pack(packed: Packed) -> U8:
    ids = packed.ids.astype(np.uint8).reshape(*packed.d.shape, 8, 4)
    pairs = np.concatenate([ids, bits.sign_words(packed.scales, packed.signs)], axis=3)
    return bits.join(packed.d, pairs.reshape(*packed.d.shape, 64))


def iq2_xs_decode(rows: U8) -> F32:
    """uint8 [R, B·74] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq2_xs."""
    d, blocks = bits.heads(rows, sum(XS_FIELDS))
    words = np.ascontiguousarray(blocks[:, :, 2:66]).view("<u2")
    packed = Packed(d, bits.from_nibbles(blocks[:, :, 66:]), words & np.uint16(511), EVEN_SIGNS[words >> 9])
    return bits.expand(packed, lattice.points("iq2_xs"), _STEP)


def iq2_xs_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·74]; ValueError as `fit` says."""
    return _encode("iq2_xs", values, importance)


def _xs_pack(packed: Packed) -> U8:
    words = packed.ids | (packed.signs & 127).astype(np.uint16) << 9
    return bits.join(packed.d, words.astype("<u2").view(np.uint8), bits.nibbles(packed.scales))


def iq2_s_decode(rows: U8) -> F32:
    """uint8 [R, B·82] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq2_s."""
    d, blocks = bits.heads(rows, sum(S_FIELDS))
    upper = (blocks[:, :, 66:74, None] >> _UPPER & 3).reshape(*d.shape, 32).astype(np.uint16)
    ids = (blocks[:, :, 2:34] | upper << 8).astype(np.uint16)
    packed = Packed(d, bits.from_nibbles(blocks[:, :, 74:]), ids, np.ascontiguousarray(blocks[:, :, 34:66]))
    return bits.expand(packed, lattice.points("iq2_s"), _STEP)


def iq2_s_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·82]; ValueError as `fit` says."""
    return _encode("iq2_s", values, importance)


def _s_pack(packed: Packed) -> U8:
    parts = (packed.ids >> 8).astype(np.uint8).reshape(*packed.d.shape, 8, 4) << _UPPER
    upper = np.bitwise_or.reduce(parts, axis=3)
    return bits.join(packed.d, packed.ids.astype(np.uint8), packed.signs, upper, bits.nibbles(packed.scales))


RULES = {
    "iq2_xxs": Rule(32, True, _STEP, _xxs_pack),
    "iq2_xs": Rule(16, True, _STEP, _xs_pack),
    "iq2_s": Rule(16, False, _STEP, _s_pack),
}


def _encode(name: str, values: F32, importance: F32 | None) -> U8:
    rule = RULES[name]
    return rule.pack(fit(values, importance, lattice.grid(name), rule.part, rule.even, rule.step))

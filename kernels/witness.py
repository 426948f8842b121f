"""Decoders for the proof, written apart from the codecs: one misreading must not be made twice in the same way.

Each follows the words of its format and shares no table, no helper and no loop with `mxfp4.py` or `q_blocks.py`:

    release  byte j of a block: element 2j in the low four bits, 2j+1 in the high four
    ggml     17 bytes: scale, then byte j: element j in the low four bits, j+16 in the high four
    E2M1     bit 3 sign, bits 2-1 exponent e, bit 0 mantissa m: e = 0: m/2, else 2^(e−1)·(1 + m/2)
    E8M0     2^(byte − 127)
    unsigned one integer a byte or two, the even element in the low four bits; minus 2^(b−1); a float32 scale for 32
    packed   int32 words, element i of a row in bits b·i … b·i + b − 1 of the row's bits, lowest first, plus 2^(b−1)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.floats import F32, U8


def _powers() -> F32:
    values = [2.0 ** (byte - 127) for byte in range(255)]
    return np.array([*values, np.nan], np.float32)


def _codes() -> F32:
    values = []
    for code in range(16):
        sign, exponent, mantissa = (-1.0 if code & 8 else 1.0), (code >> 1) & 3, code & 1
        values.append(sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)))
    return np.array(values, np.float32)


_POWER, _VALUE = _powers(), _codes()


@njit(cache=True, nogil=True)
def _release(blocks: Any, scales: Any, power: Any, value: Any, out: Any) -> None:
    for row in range(blocks.shape[0]):
        for block in range(scales.shape[1]):
            scale = power[scales[row, block]]
            for j in range(16):
                byte = blocks[row, 16 * block + j]
                out[row, 32 * block + 2 * j] = value[byte & 0x0F] * scale
                out[row, 32 * block + 2 * j + 1] = value[byte >> 4] * scale


@njit(cache=True, nogil=True)
def _ggml(rows: Any, power: Any, value: Any, out: Any) -> None:
    for row in range(rows.shape[0]):
        for block in range(rows.shape[1] // 17):
            scale = power[rows[row, 17 * block]]
            for j in range(16):
                byte = rows[row, 17 * block + 1 + j]
                out[row, 32 * block + j] = value[byte & 0x0F] * scale
                out[row, 32 * block + 16 + j] = value[byte >> 4] * scale


def decode_release(blocks: U8, scales: U8) -> F32:
    """blocks uint8 [R, bytes of a row], scales uint8 [R, blocks of a row] → f32 [R, C]."""
    out = np.empty((blocks.shape[0], 2 * blocks.shape[1]), np.float32)
    _release(blocks, scales, _POWER, _VALUE, out)
    return out


def decode_ggml(rows: U8) -> F32:
    """rows uint8 [R, 17 · blocks] → f32 [R, C]."""
    out = np.empty((rows.shape[0], rows.shape[1] // 17 * 32), np.float32)
    _ggml(rows, _POWER, _VALUE, out)
    return out


@njit(cache=True, nogil=True)
def _packed(words: Any, scales: Any, bits: Any, out: Any) -> None:
    per_word = 32 // bits
    mask, zero = (1 << bits) - 1, 1 << (bits - 1)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            rest = np.int64(words[row, word])
            for i in range(per_word):
                column = per_word * word + i
                out[row, column] = np.float32((rest & mask) - zero) * scales[row, column // 32]
                rest >>= bits


def decode_packed(words: U8, scales: U8, bits: int) -> F32:
    """words uint8 [R, bytes of a row], scales uint8 [R, 2 · groups of 32], bfloat16 → f32 [R, C]."""
    uppers = np.zeros((scales.shape[0], scales.shape[1] // 2, 2), "<u2")
    uppers[..., 1] = np.ascontiguousarray(scales).view("<u2")  # a bfloat16 is a float32 without its lower half
    out = np.empty((words.shape[0], words.shape[1] * 8 // bits), np.float32)
    _packed(np.ascontiguousarray(words).view("<u4"), uppers.reshape(len(scales), -1).view("<f4"), bits, out)
    return out


@njit(cache=True, nogil=True)
def _unsigned(codes: Any, scales: Any, bits: Any, out: Any) -> None:
    zero = 1 << (bits - 1)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            if bits == 8:
                code = np.int64(codes[row, column])
            else:
                byte = codes[row, column // 2]
                code = np.int64(byte // 16 if column % 2 else byte % 16)
            out[row, column] = np.float32(code - zero) * scales[row, column // 32]


def decode_unsigned(codes: U8, scales: U8, bits: int) -> F32:
    """codes uint8 [R, bytes of a row], scales uint8 [R, 4 · groups of 32], float32 → f32 [R, C]."""
    out = np.empty((codes.shape[0], codes.shape[1] * 8 // bits), np.float32)
    _unsigned(codes, np.ascontiguousarray(scales).view("<f4"), bits, out)
    return out

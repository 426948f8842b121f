"""The bytes of a super-block, for `k_blocks`, which documents their layouts: codes and integer scales ↔ bytes.

The type is known by its size: 84, 110, 144, 176 or 210 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lanes import KERNEL


@njit(**KERNEL)
def pack(q: Any, a: Any, b: Any, d: Any, dmin: Any, out: Any) -> None:
    """Codes uint8 [N, parts] from 0, integer scales a and mins b f32 [parts], bits of d and dmin → `out`, one super-block."""
    size = out.shape[0]
    code = np.empty(256, np.uint8)
    for p in range(q.shape[1]):
        for j in range(q.shape[0]):
            code[p * q.shape[0] + j] = q[j, p]
    if size == 84:
        for p in range(16):
            out[p] = np.uint8(a[p]) | np.uint8(np.uint8(b[p]) << np.uint8(4))
        _put_pairs(code, np.uint8(0), out[16:80])
    elif size == 110:
        _put_high_bits(code, np.uint8(2), out[:32])
        _put_pairs(code, np.uint8(0), out[32:96])
        _put_scales(a, out[96:108])
    elif size == 210:
        for h in range(2):
            for i in range(64):
                low, high = code[128 * h + i], code[128 * h + 64 + i]
                out[64 * h + i] = (low & np.uint8(15)) | np.uint8(high << np.uint8(4))
        _put_pairs(code, np.uint8(4), out[128:192])
        for p in range(16):
            out[192 + p] = np.uint8(np.int32(a[p]) & 255)
    else:
        _put_scales_mins(a, b, out[4:16])
        if size == 176:
            _put_high_bits(code, np.uint8(4), out[16:48])
        codes = out[size - 128 :]
        for c in range(4):
            for i in range(32):
                low, high = code[64 * c + i], code[64 * c + 32 + i]
                codes[32 * c + i] = (low & np.uint8(15)) | np.uint8(high << np.uint8(4))
    at = 80 if size == 84 else 0 if size in (144, 176) else size - 2
    out[at], out[at + 1] = d & np.uint16(255), d >> np.uint16(8)
    if size in (84, 144, 176):
        out[at + 2], out[at + 3] = dmin & np.uint16(255), dmin >> np.uint16(8)


@njit(**KERNEL)
def _put_pairs(code: Any, shift: Any, out: Any) -> None:
    """Two bits of each code, from bit `shift` on, four to a byte."""
    for h in range(2):
        for i in range(32):
            byte = np.uint8(0)
            for t in range(4):
                byte |= np.uint8(((code[128 * h + 32 * t + i] >> shift) & np.uint8(3)) << np.uint8(2 * t))
            out[32 * h + i] = byte


@njit(**KERNEL)
def _put_high_bits(code: Any, shift: Any, out: Any) -> None:
    for i in range(32):
        byte = np.uint8(0)
        for t in range(8):
            byte |= np.uint8(((code[32 * t + i] >> shift) & np.uint8(1)) << np.uint8(t))
        out[i] = byte


@njit(**KERNEL)
def _put_scales(a: Any, out: Any) -> None:
    out[:] = 0
    for p in range(16):
        scale = np.uint8(a[p] + np.float32(32))
        out[p % 8] |= np.uint8((scale & np.uint8(15)) << np.uint8(4 * (p // 8)))
        out[8 + p % 4] |= np.uint8((scale >> np.uint8(4)) << np.uint8(2 * (p // 4)))


@njit(**KERNEL)
def _put_scales_mins(a: Any, b: Any, out: Any) -> None:
    for p in range(4):
        late, least = np.uint8(a[p + 4]), np.uint8(b[p + 4])
        out[p] = np.uint8(a[p]) | np.uint8((late >> np.uint8(4)) << np.uint8(6))
        out[4 + p] = np.uint8(b[p]) | np.uint8((least >> np.uint8(4)) << np.uint8(6))
        out[8 + p] = (late & np.uint8(15)) | np.uint8((least & np.uint8(15)) << np.uint8(4))


@njit(**KERNEL)
def unpack(blocks: Any, d: Any, dmin: Any, out: Any) -> None:
    """blocks uint8 [S, size], d and dmin f32 [S] → values f32 [S, 256]."""
    scale, minimum = np.empty(16, np.float32), np.zeros(16, np.float32)
    size = blocks.shape[1]
    part = 32 if size in (144, 176) else 16
    zero = 4 if size == 110 else 32 if size == 210 else 0
    for s in range(blocks.shape[0]):
        _scales(blocks[s], d[s], dmin[s], scale, minimum)
        if size in (84, 110):
            _get_pairs(blocks[s, size - 68 if size == 84 else 32 :], out[s])
            if size == 110:
                _add_high_bits(blocks[s, :32], 4, out[s])
        elif size == 210:
            _get_six(blocks[s], out[s])
        else:
            _get_nibbles(blocks[s, size - 128 :], out[s])
            if size == 176:
                _add_high_bits(blocks[s, 16:48], 16, out[s])
        for p in range(256 // part):
            for j in range(p * part, (p + 1) * part):
                out[s, j] = scale[p] * (out[s, j] - np.float32(zero)) - minimum[p]


@njit(**KERNEL)
def _scales(block: Any, d: Any, dmin: Any, scale: Any, minimum: Any) -> None:
    size = block.shape[0]
    if size == 84:
        for p in range(16):
            scale[p] = d * np.float32(block[p] & 15)
            minimum[p] = dmin * np.float32(block[p] >> 4)
    elif size == 110:
        for p in range(16):
            low = (block[96 + p % 8] >> (4 * (p // 8))) & 15
            high = (block[104 + p % 4] >> (2 * (p // 4))) & 3
            scale[p] = d * np.float32(np.int32(low | (high << 4)) - 32)
    elif size == 210:
        for p in range(16):
            scale[p] = d * np.float32(np.int8(block[192 + p]))
    else:
        for p in range(4):
            scale[p] = d * np.float32(block[4 + p] & 63)
            minimum[p] = dmin * np.float32(block[8 + p] & 63)
            scale[p + 4] = d * np.float32((block[12 + p] & 15) | ((block[4 + p] >> 6) << 4))
            minimum[p + 4] = dmin * np.float32((block[12 + p] >> 4) | ((block[8 + p] >> 6) << 4))


@njit(**KERNEL)
def _get_pairs(codes: Any, out: Any) -> None:
    for h in range(2):
        for t in range(4):
            for i in range(32):
                out[128 * h + 32 * t + i] = np.float32((codes[32 * h + i] >> (2 * t)) & 3)


@njit(**KERNEL)
def _add_high_bits(bits: Any, worth: Any, out: Any) -> None:
    for t in range(8):
        for i in range(32):
            out[32 * t + i] += np.float32(worth * ((bits[i] >> t) & 1))


@njit(**KERNEL)
def _get_nibbles(codes: Any, out: Any) -> None:
    for c in range(4):
        for i in range(32):
            out[64 * c + i] = np.float32(codes[32 * c + i] & 15)
            out[64 * c + 32 + i] = np.float32(codes[32 * c + i] >> 4)


@njit(**KERNEL)
def _get_six(block: Any, out: Any) -> None:
    for h in range(2):
        for i in range(128):
            low = (block[64 * h + i % 64] >> (4 * (i // 64))) & 15
            high = (block[128 + 32 * h + i % 32] >> (2 * (i // 32))) & 3
            out[128 * h + i] = np.float32(low | (high << 4))

"""The bytes of a block of 32 after its scale, for `legacy_blocks`, which documents them: codes ↔ nibbles, fifth bits, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lanes import F0, KERNEL, LANES


@njit(**KERNEL)
def pack(q: Any, bits: Any, head: Any, first: Any, count: Any, out: Any) -> None:
    """Codes uint8 [32, 64] → the bytes after the head of `count` blocks; nibbles and fifth bits are folded in place."""
    at = head
    if bits == 8:
        for k in range(count):
            for j in range(32):
                out[first + k, at + j] = q[j, k]
        return
    fifth = np.empty(LANES, np.uint8)
    if bits == 5:
        for i in range(4):
            fifth[:] = 0
            for j in range(8):
                for k in range(LANES):
                    fifth[k] |= (q[8 * i + j, k] >> np.uint8(4)) << np.uint8(j)
            for k in range(count):
                out[first + k, at + i] = fifth[k]
        at += 4
    for j in range(16):
        for k in range(LANES):
            q[j, k] = (q[j, k] & np.uint8(15)) | (q[j + 16, k] << np.uint8(4))
    for k in range(count):
        for j in range(16):
            out[first + k, at + j] = q[j, k]


@njit(**KERNEL)
def unpack(codes: Any, heads: Any, bits: Any, zero: Any, out: Any) -> None:
    """4- or 5-bit codes uint8 [B, bytes] → values f32 [B, 32]: (q + zero) · heads[0], plus heads[1] where there is one."""
    at = 4 if bits == 5 else 0
    for b in range(codes.shape[0]):
        base = heads[b, 1] if heads.shape[1] == 2 else F0
        for j in range(16):
            out[b, j] = np.float32(codes[b, at + j] & 15)
            out[b, j + 16] = np.float32(codes[b, at + j] >> 4)
        if bits == 5:
            for j in range(32):
                out[b, j] += np.float32(16 * ((codes[b, j >> 3] >> (j & 7)) & 1))
        for j in range(32):
            value = (out[b, j] + zero) * heads[b, 0]
            out[b, j] = value + base if heads.shape[1] == 2 else value

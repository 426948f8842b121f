"""Sizes as people write them: 4GB, 512MiB."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """A number of bytes with a decimal (4GB) or binary (4GiB) unit; ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]I?)?B?", text.upper())
    count = int(Fraction(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not 0 < count < 1 << 63:
        raise ValueError(f"{text[:40]!r} is not a size such as 4GB or 512MiB")
    return count

"""JSON has no number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping


def strict(value: object) -> object:
    """The same for JSON, which has no number that is not finite: null stands in its place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value

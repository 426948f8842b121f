"""How long work tells of itself: a label and a total, then amounts done, from any thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Advance = Callable[[int], None]
"""Called with what was done since the last call."""

ShowProgress = Callable[[str, int], AbstractContextManager[Advance]]
"""Called with a label and the total; gives what to call."""

"""How long work tells of itself: a label and a total, then amounts done, from any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Called with what was done since the last call."""

ShowProgress = Callable[[str, int], AbstractContextManager[Advance]]
"""Called with a label and the total; gives what to call."""


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Advance]:
    """A ShowProgress that shows nothing."""
    yield lambda _: None

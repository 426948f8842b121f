"""Where the tables and keys of a TOML text begin: good enough to name the line of a mistake."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"\s*(?P<array>\[)?\[(?P<name>[^\[\]]+)\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*(?P<key>[A-Za-z0-9_.\"'-]+)\s*=")


class Lines:
    """Lines of a text by the place of what begins there: names of tables and keys, numbers in arrays of tables."""

    def __init__(self, text: str) -> None:
        self._at: dict[tuple[str | int, ...], int] = {}
        counts: dict[tuple[str | int, ...], int] = {}  # arrays of tables: the number of the one that is open
        here: tuple[str | int, ...] = ()
        for number, line in enumerate(text.split("\n"), 1):
            header = _HEADER.match(line)
            if header:
                here = ()
                for part in header["name"].split("."):
                    here = (*here, counts[here]) if here in counts else here
                    here = (*here, part.strip().strip("\"'"))
                if header["array"]:
                    counts[here] = counts.get(here, -1) + 1
                    here = (*here, counts[here])
                self._at.setdefault(here, number)
            elif key := _KEY.match(line):
                parts = [part.strip("\"'") for part in key["key"].split(".")]
                self._at.setdefault((*here, *parts), number)

    def find(self, place: Sequence[str | int]) -> int:
        """The line of the deepest part of a path that has one."""
        for length in range(len(place), 0, -1):
            if tuple(place[:length]) in self._at:
                return self._at[tuple(place[:length])]
        return 1

"""Small pieces of Markdown: paragraphs at one width, tables, sizes."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence

from gptoss_convert.errors import printable

WIDTH = 110


def paragraph(text: str) -> str:
    """A paragraph, its lines broken."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A table. align: a letter a column, l or r; the rest are l."""
    marks = ["---:" if side == "r" else "---" for side in align.ljust(len(head), "l")]
    lines = [head, marks, *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def size(count: int) -> str:
    """Bytes in GB or MB of 10⁹ and 10⁶."""
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.2f} MB"


def code(text: str) -> str:
    """Text from a file in code font, also within a table: backticks and bars kept, control characters escaped."""
    safe = printable(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", safe)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{safe}{space}{fence}"


def shell_word(name: str, folder: str = "") -> str:
    """A file's name as one word of a command on one line. folder: what it lies in, with its slash."""
    return shlex.quote(f"{folder}{name}")

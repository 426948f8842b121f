"""What a verb prints: one JSON document or a table on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptoss_convert.convert.strict_json import strict

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call; safe from any thread."""

PLAIN_LINE_SECONDS = 10.0
PIPE_COLUMNS = 1000


def emit(result: dict[str, Any], as_json: bool, render: Callable[[Console], None]) -> None:
    """Print the result: the JSON document, or what `render` draws for people."""
    if as_json:
        _print_document(result)
        return
    from rich.console import Console

    # Into a file or a pipe nothing is cut to a width that nobody has.
    terminal = sys.stdout.isatty()
    render(Console(highlight=False, soft_wrap=not terminal, width=None if terminal else PIPE_COLUMNS))


class _Documents:
    """Whether the command's result has gone to stdout already: no error document may follow it."""

    printed = False
    lines = False


def expect_document(*, lines: bool = False) -> None:
    """A command begins: none of its documents is printed yet. lines: it prints events, one object a line, and an error is one."""
    _Documents.printed, _Documents.lines = False, lines


def print_error(document: Mapping[str, object]) -> None:
    """Print an error as the command's one JSON document, unless its result stands there already; or as its last event."""
    if _Documents.lines:
        print_event({"event": "error", **document})
    elif not _Documents.printed:
        _print_document(document)


def print_event(event: Mapping[str, object]) -> None:
    """Print one JSON object on a line of its own, at once."""
    print(json.dumps(strict(event), ensure_ascii=True, allow_nan=False), flush=True)


def _print_document(document: Mapping[str, object]) -> None:
    text = json.dumps(strict(document), indent=2, ensure_ascii=True, allow_nan=False)
    _Documents.printed = True
    print(text)


LAYERWISE = ("calibrate", "gptq", "compare")  # labels of work that is counted in layers, not in bytes


def human_amount(label: str, count: float) -> str:
    """How much of some work is done, in its unit."""
    return f"{count:.0f} layers" if label in LAYERWISE else human_bytes(count)


def human_bytes(count: float) -> str:
    """A size for people, in decimal units: 12.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


@contextmanager
def progress(label: str, total_bytes: int, enabled: bool = True) -> Iterator[Advance]:
    """A progress bar in bytes on a terminal's stderr; elsewhere a plain line now and then; nothing when disabled."""
    if not enabled:
        yield lambda _: None
    elif sys.stderr.isatty():
        yield from _bar(label, total_bytes)
    else:
        yield _lines(label, total_bytes)


def _bar(label: str, total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (MofNCompleteColumn(),) if label in LAYERWISE else (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *amount)
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total_bytes: int) -> Advance:
    done = 0
    next_line = time.monotonic() + PLAIN_LINE_SECONDS
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done, next_line
        with lock:
            done += count
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + PLAIN_LINE_SECONDS
                share = 100 * done / total_bytes if total_bytes else 100.0
                amount = f"{human_amount(label, done)} of {human_amount(label, total_bytes)}"
                print(f"{label}: {amount} ({share:.0f} %)", file=sys.stderr)

    return advance

"""What a command may not write over: what it reads, and what stands there already. Asked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptoss_convert.convert.companions import ReadOnce
from gptoss_convert.convert.source import Source
from gptoss_convert.errors import CannotWrite, TargetExists, UsageError
from gptoss_convert.formats.tree import source_root, walk

PAGE = ".html"  # no reader of ours looks at a page: a report may stand, and be replaced, in the folder of a model


def protect_inputs(target: Path, read_paths: Iterable[Path]) -> None:
    """Refuse a target that is, or holds, anything that is read."""
    place = _real(target)
    taken = next((path for path in read_paths if _real(path).is_relative_to(place)), None)
    if taken is not None:
        raise UsageError(
            "the output would take the place of what it is made from",
            found=taken,
            expected=f"something outside {target}",
        )


def files_read(*sources: Source | None) -> Iterator[Path]:
    """The files that open sources are read from: weights, and the small files beside them. Of None: nothing."""
    for source in sources:
        if source is None:
            continue
        yield from (file.path for file in source.files)
        yield from (c.path for c in source.companions.values() if isinstance(c, ReadOnce))


def files_given(*paths: Path | None) -> Iterator[Path]:
    """What an existing path stands for: itself, and of a folder every file but pages; None and what is not there: nothing."""
    for path in paths:
        if path is None or not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where it may not look
            continue
        yield path
        if path.is_dir():
            yield from (entry.path for entry in walk(source_root(path)) if not entry.name.endswith(PAGE))


def require_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a file's name that is taken, that only --overwrite frees, or where nothing can be written."""
    if os.path.lexists(path):
        if not overwrite:
            raise TargetExists("the target exists", file=path, remedy="choose another name, or give --overwrite")
        if path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a special file"
            raise TargetExists(
                "something else stands in the target's place", file=path, found=kind, expected="a file",
                remedy="remove it yourself, or choose another name",
            )  # fmt: skip
    probe = path.parent / f".{path.name}.{os.getpid()}.partial"  # as `write_atomically` will write it
    try:
        probe.unlink(missing_ok=True)
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise CannotWrite(
            "cannot write", file=path, found=error.strerror, remedy="check that the folder exists and may be written"
        ) from error


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike resolve, no error where links go in circles

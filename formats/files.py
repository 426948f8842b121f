"""Reading files that somebody else wrote: regular files only, explicit ranges only, and still the same file at the end.

A file is opened once and read with `pread`; nothing is mapped, because a mapped file that shrinks kills the process with
SIGBUS. Every range is checked against the size before a buffer is allocated. The identity taken at the opening (device,
inode, size, modification time) is compared again at the end, so that a file which changes under a run is an error and
never a mixture of two versions.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gptoss_convert.errors import BadInput, InputChanged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 64 << 20
_SURROGATE_ESCAPE, _SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Identity:
    """What tells one state of a file from another without reading it. Sizes in bytes, time in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class SourceFile:
    """A regular file opened for reading by range; usable from several threads at once.

    `name`: what the source calls it, which in a hub cache is not the name of the file that the link leads to.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        try:
            # O_NONBLOCK: opening a FIFO must not hang; it has no effect on regular files.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BadInput("cannot open the file", file=path, found=error.strerror) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise BadInput("not a regular file", file=path, found=_kind(status.st_mode), expected="a regular file")
        self.identity = _identity(status)

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self.identity.size

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Exactly `nbytes` bytes from `offset`, or an error."""
        buffer = bytearray(self._checked(offset, nbytes))
        self.read_into(offset, buffer)
        return buffer

    def read_array(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """The same as an array, without first filling it with zeros: for tensor data."""
        import numpy

        buffer = numpy.empty(self._checked(offset, nbytes), numpy.uint8)
        self.read_into(offset, buffer)
        return buffer

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer from `offset`."""
        view = memoryview(buffer).cast("B")
        self._checked(offset, len(view))
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise BadInput("reading failed", file=self.path, found=error.strerror) from error
            if got == 0:
                raise InputChanged("the file became shorter while it was read", file=self.path, expected=self.size)
            done += got

    def _checked(self, offset: int, nbytes: int) -> int:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise BadInput(
                "a range lies outside the file",
                file=self.path,
                found=f"bytes {offset} to {offset + nbytes}",
                expected=f"at most {self.size} bytes",
                remedy="the file is truncated or its header lies; download it again and run verify",
            )
        return nbytes

    def check_unchanged(self) -> None:
        """Raise InputChanged unless the file, and what its name points to, is what was opened."""
        try:
            now = [_identity(os.fstat(self._fd)), _identity(self.path.stat())]
        except OSError as error:
            raise InputChanged("the file vanished while it was read", file=self.path) from error
        for identity in now:
            if identity != self.identity:
                raise InputChanged(
                    "the file changed while it was read",
                    file=self.path,
                    found=f"{identity.size} bytes, modified at {identity.mtime_ns} ns",
                    expected=f"{self.size} bytes, modified at {self.identity.mtime_ns} ns",
                    remedy="let the download or copy finish, then run again",
                )

    def close(self) -> None:
        """Close the descriptor; further reads fail."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _kind(mode: int) -> str:
    tests = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a device": stat.S_ISCHR}
    return next((name for name, test in tests.items() if test(mode)), "a special file")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from an untrusted file: bounded size and depth, no duplicate keys, UTF-8 only.

    No number is NaN or infinite, and every string can be encoded again.
    """
    with SourceFile(path) as file:
        if file.size > limit:
            raise BadInput("the JSON file is too large", file=path, found=file.size, expected=f"at most {limit} bytes")
        text = bytes(file.read(0, file.size))
    return parse_json(text, path)


def parse_json(text: bytes, path: object) -> dict[str, Any]:
    """A JSON object from untrusted bytes; `path` is named in errors. See `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadInput("a key appears twice in a JSON object", file=path, found=twice)
        return result

    def real(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise BadInput("a number in the JSON is too large", file=path, found=digits, expected="at most 1.8e308")
        return number

    def constant(name: str) -> NoReturn:
        raise BadInput("a number that JSON does not have", file=path, found=name)

    if text.startswith(LFS_POINTER_PREFIX):
        raise BadInput(
            "a git-LFS pointer stands where the file should be", file=path, remedy="fetch the real file: git lfs pull"
        )
    collecting = gc.isenabled()
    gc.disable()  # the half million lists of a tokenizer would set the collector off again and again, for nothing
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_float=real, parse_constant=constant)
    except RecursionError as error:
        raise BadInput("the JSON is nested too deeply", file=path, expected="at most a few hundred levels") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput("not valid JSON", file=path, found=error) from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(value, dict):
        raise BadInput("the JSON is not an object", file=path, found=type(value).__name__, expected="an object")
    if _SURROGATE_ESCAPE.search(text) and (broken := _not_encodable(value)) is not None:
        raise BadInput("a string in the JSON is not Unicode text", file=path, found=broken, expected="whole characters")
    return value


def _not_encodable(value: object) -> str | None:
    """A key or string with half of a surrogate pair, which JSON can escape and no file or terminal can hold."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.keys()
            todo += item.values()
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, str) and _SURROGATE.search(item):
            return item
    return None

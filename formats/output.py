"""Writing an output that is never half there: everything grows in a hidden folder beside it and takes its name at the end.

    OUT's folder/
        .OUT.partial/           while a run is under way, or was killed
            journal             what is finished: a line of JSON a step, the plan's digest first
            <files>             full-sized from the start: the space is reserved before the first byte
        OUT                     appears by one rename, after fsync

A killed run leaves the hidden folder; the next run of the same plan takes up every step whose bytes on disk have the digest
that the journal names, and redoes the rest. Bytes are never trusted for being there. A run of another plan starts clean. A
lock on the journal keeps two runs apart; it dies with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from gptoss_convert.errors import CannotWrite, TargetExists

JOURNAL = "journal"
_WRITTEN = (".safetensors", ".gguf", ".json", ".jinja", "README.md", "LICENSE", "USAGE_POLICY")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Output:
    """The unfinished form of one artifact: a file, or a folder of files."""

    def __init__(
        self, target: Path, *, folder: bool, overwrite: bool = False, marker: str = "gptoss-certificate.json"
    ) -> None:
        self.target = target
        self.marker = marker  # the file by which a folder of ours is known
        self.is_folder = folder
        self.overwrite = overwrite
        self.partial = target.parent / f".{target.name}.partial"
        self._descriptors: dict[str, int] = {}
        self._created: list[Path] = []
        self._journal = -1
        self.journalled: list[dict[str, Any]] = []  # what an earlier run of this plan has recorded
        self._lock = Lock()
        try:
            self._recover()
        except OSError as error:
            raise _cannot(error, target) from error
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target) or self._is_empty_folder():
            return
        if not self.overwrite:
            raise TargetExists("the target exists", file=self.target, remedy="choose another name, or give --overwrite")
        if self.target.is_symlink() or self.target.is_dir() != self.is_folder:
            kind = "a link" if self.target.is_symlink() else "a folder" if self.target.is_dir() else "a file"
            raise TargetExists(
                "something else stands in the target's place", file=self.target, found=kind,
                expected="a folder" if self.is_folder else "a file",
            )  # fmt: skip
        if self.is_folder and not (self.target / self.marker).is_file():
            raise TargetExists(
                "--overwrite replaces whole folders, and only those that this tool wrote",
                file=self.target, expected=f"a folder with {self.marker}", remedy="remove it yourself, or choose another name",
            )  # fmt: skip

    def _is_empty_folder(self) -> bool:
        return self.is_folder and self.target.is_dir() and not any(self.target.iterdir())

    def open(self, plan_digest: str, files: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        """Lock, reserve the space of every (name, bytes), and return what an earlier run of this plan has journalled."""
        try:
            self._make_partial()
            self._journal = os.open(
                self.partial / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
            )
        except OSError as error:
            raise _cannot(error, self.partial) from error
        if not self._lock_journal():
            os.close(self._journal)
            self._journal = -1
            raise TargetExists("another run is writing this target", file=self.target)
        try:
            done = self.journalled = self._earlier(plan_digest)
            if not done:
                self._start_clean(plan_digest)
            for name, size in files:
                self._reserve(name, size)
        except OSError as error:
            self.discard()
            raise _cannot(error, self.target) from error
        return done

    def _lock_journal(self) -> bool:
        """Whether the journal is ours now, and still the one in the folder: a run that ends may just have removed it."""
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._journal), (self.partial / JOURNAL).stat())
        except OSError:
            return False

    def _make_partial(self) -> None:
        """The hidden folder: new, or one that an earlier run of ours left; nobody else's is touched."""
        for parent in reversed(self.target.parents):
            if not parent.exists():
                parent.mkdir()
                self._created.append(parent)
        try:
            self.partial.mkdir()
            return
        except FileExistsError:
            pass
        if self.partial.is_symlink() or not self.partial.is_dir() or not _is_ours(self.partial):
            raise TargetExists(
                "the place for unfinished output is taken by something that this tool did not write",
                file=self.partial, remedy="look at it, remove it yourself, and run again",
            )  # fmt: skip

    @property
    def _replaced(self) -> Path:
        return self.target.parent / f".{self.target.name}.replaced"

    def _recover(self) -> None:
        """A run killed in the moment of publishing a folder: take up from where it was."""
        if not self.is_folder or self.target.is_symlink() or self._replaced.is_symlink():
            return
        if not os.path.lexists(self.partial) and _begins_as_a_journal(self.target / JOURNAL):
            self.target.rename(self.partial)  # it had its name, but was not done: its journal is still there
        if (self._replaced / self.marker).is_file():
            if os.path.lexists(self.target):
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.target)

    def _earlier(self, plan_digest: str) -> list[dict[str, Any]]:
        records, sound = [], 0
        for line in (self.partial / JOURNAL).read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # torn by the kill
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            records.append(record)
            sound += len(line)
        if not records or records[0] != {"plan": plan_digest}:
            return []
        os.ftruncate(self._journal, sound)  # what is appended must not join a torn line
        return [record for record in records[1:] if isinstance(record, dict)]

    def _start_clean(self, plan_digest: str) -> None:
        for entry in self.partial.iterdir():
            if entry.name != JOURNAL:
                _remove(entry)
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        self._append({"plan": plan_digest})

    def _reserve(self, name: str, size: int) -> None:
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._descriptors[name] = fd
        if os.fstat(fd).st_size > size:
            os.ftruncate(fd, size)
        if size:
            _allocate(fd, size)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write bytes at an offset; ranges of different steps never overlap, so threads need no lock."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptors[name], view[done:], offset + done)
        except OSError as error:
            raise _cannot(error, self.partial / name) from error

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Bytes as they lie in the unfinished file."""
        try:
            return os.pread(self._descriptors[name], nbytes, offset)
        except OSError as error:
            raise _cannot(error, self.partial / name) from error

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """The same into a buffer; returns how many bytes were read."""
        try:
            got = os.preadv(self._descriptors[name], [buffer], offset)
        except OSError as error:
            raise _cannot(error, self.partial / name) from error
        if not got and buffer:
            raise CannotWrite("the unfinished file became shorter", file=self.partial / name)
        return got

    def record(self, entry: dict[str, Any]) -> None:
        """Journal a finished step."""
        with self._lock:
            self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            os.lseek(self._journal, 0, os.SEEK_END)
            os.write(self._journal, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise _cannot(error, self.partial / JOURNAL) from error

    def write_small(self, name: str, data: bytes | memoryview, *, executable: bool = False) -> None:
        """Write a whole file that no space was reserved for."""
        path = self.partial / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if executable:
                path.chmod(0o755)
            _sync(path)
        except OSError as error:
            raise _cannot(error, path) from error

    def path(self, name: str) -> Path:
        """Where a file lies until it is published."""
        return self.partial / name

    def publish(self, beside: dict[str, bytes] | None = None) -> None:
        """Give the finished artifact its name. `beside`: small files that go next to a single-file artifact.

        A certificate alone proves nothing and is replaced by the next run; so it is put in place first, and the artifact never
        stands without it.
        """
        placed: list[Path] = []
        try:
            for fd in self._descriptors.values():
                os.fsync(fd)
            self._refuse_existing()
            parent = self.target.parent
            if self.is_folder:
                self._publish_folder()
            else:
                (single,) = self._descriptors
                for name, data in (beside or {}).items():
                    self.write_small(name, data)
                    (self.partial / name).replace(parent / name)
                    placed.append(parent / name)
                (self.partial / single).replace(self.target)
                placed = []
                self._created = []
                self.discard()
            _sync(parent)
        except OSError as error:
            for path in placed:
                path.unlink(missing_ok=True)
            raise _cannot(error, self.target) from error
        self._created = []
        self.close()

    def _publish_folder(self) -> None:
        _sync(self.partial)
        if os.path.lexists(self.target):
            if self._is_empty_folder():
                self.target.rmdir()
            else:
                self.target.rename(self._replaced)
        self.partial.rename(self.target)
        # Only now: a run killed before the renames still finds its journal, and one killed here leaves a file too many.
        (self.target / JOURNAL).unlink()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def discard(self) -> None:
        """Remove everything unfinished, if it is ours: another run, or a killed one that may be taken up, keeps its own."""
        if self._journal >= 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.partial.rmdir()  # empty: we were stopped before we had a journal
        self.close()

    def close(self) -> None:
        """Close the files and give the lock back; what is unfinished stays for a later run."""
        for fd in self._descriptors.values():
            os.close(fd)
        self._descriptors = {}
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An interruption keeps the work for the next run; any other failure leaves nothing behind.
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        elif self._journal >= 0 or not issubclass(kind, TargetExists):  # else the unfinished output is another run's
            self.discard()


def write_atomically(path: Path, data: bytes) -> None:
    """A whole file under its name at once, or not at all."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        temporary.unlink(missing_ok=True)  # of a killed run that had our process id
        with temporary.open("xb") as file:  # never through somebody's link of this name
            file.write(data)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _begins_as_a_journal(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(200).startswith(b'{"plan"')


def _is_ours(folder: Path) -> bool:
    """Whether a hidden folder is one that a run of ours left: empty, with a journal that begins as ours do, or, where a crash
    spoilt the journal, with nothing beside it but files of the kinds that we write.
    """
    entries = list(folder.rglob("*"))
    journal = folder / JOURNAL
    if not entries:
        return True
    if (
        any(entry.is_symlink() or not (entry.is_file() or entry.is_dir()) for entry in entries)
        or journal not in entries
    ):
        return False
    if _begins_as_a_journal(journal):
        return True
    known = (entry.name == JOURNAL or entry.suffix in _WRITTEN or entry.name in _WRITTEN for entry in entries)
    return all(known) and all(entry.is_file() for entry in entries)


def reserve(fd: int, size: int, path: Path) -> None:
    """Reserve a file's blocks, or CannotWrite: a mapped file on a full disk would end the process."""
    try:
        _allocate(fd, size)
    except OSError as error:
        raise _cannot(error, path) from error


def _allocate(fd: int, size: int) -> None:
    """Reserve the blocks, so that a full disk shows now. Where the system cannot, at least look whether they are free."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    space = os.fstatvfs(fd)
    if space.f_bavail * space.f_frsize < size - os.fstat(fd).st_blocks * 512:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, size)


def _remove(path: Path) -> None:
    """A file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot(error: OSError, path: Path) -> CannotWrite:
    full = error.errno in _NO_SPACE
    return CannotWrite(
        "not enough space on the target's disk" if full else "cannot write",
        file=path,
        found=error.strerror,
        remedy="free some space, or choose another disk" if full else "check that the folder exists and may be written",
    )

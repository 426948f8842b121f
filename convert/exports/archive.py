"""A .tar.gz that is the same bytes every time, written as a stream: a Package's third kind of content, beside bytes and paths.

Regular files only, sorted by name, of nobody (uid and gid 0, no names), at time 0, mode 644. gzip's blocks are *stored*, not
compressed: weights hardly shrink, each zlib packs otherwise, and a size that is known beforehand can be reserved on the disk.
"""

from __future__ import annotations

import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Read = Callable[[Path, int], Iterator[bytes]]

_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # deflate, no name, time 0, no hint, unknown system
_STORED = 0xFFFF  # most bytes of a stored block
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True)
class Archive:
    """A .tar.gz of these files: name within → its bytes, or the path that they are read from."""

    files: Mapping[str, bytes | Path]

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        return [data for data in self.files.values() if isinstance(data, Path)]

    def size(self) -> int:
        """Bytes of the whole."""
        return _gzip_size(_tar_size({name: _size(data) for name, data in self.files.items()}))

    def blocks(self, read: Read) -> Iterator[bytes]:
        """The whole in order. read: a file's bytes by path and size, in blocks."""
        return _gzip(self._tar(read))

    def _tar(self, read: Read) -> Iterator[bytes]:
        total = 0
        for name, data in sorted(self.files.items()):
            size = _size(data)
            head = header(name, size)
            yield head
            yield from [data] if isinstance(data, bytes) else read(data, size)
            yield bytes(-size % _BLOCK)
            total += len(head) + size + -size % _BLOCK
        yield bytes(_end(total))


def header(name: str, size: int) -> bytes:
    """A member's header: GNU's form, which knows files over 8 GiB without a second header."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _size(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _tar_size(sizes: Mapping[str, int]) -> int:
    total = sum(len(header(name, size)) + size + -size % _BLOCK for name, size in sizes.items())
    return total + _end(total)


def _end(total: int) -> int:
    """Zeros after the last member: two blocks, and on to a whole record."""
    return 2 * _BLOCK + -(total + 2 * _BLOCK) % _RECORD


def _gzip_size(size: int) -> int:
    return len(_HEAD) + size + 5 * (-(-size // _STORED)) + 5 + 8


def _gzip(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Stored blocks of 65535 bytes however the parts are cut, an empty last one, and the trailer."""
    yield _HEAD
    checksum = size = 0
    kept = b""
    for part in parts:
        checksum = zlib.crc32(part, checksum)
        size += len(part)
        view = memoryview(kept + part if kept else part)
        whole = len(view) // _STORED * _STORED
        out = bytearray()
        for at in range(0, whole, _STORED):
            out += _stored(view[at : at + _STORED], last=False)
        if out:
            yield bytes(out)
        kept = bytes(view[whole:])
    rest = _stored(memoryview(kept), last=False) if kept else b""
    yield rest + _stored(memoryview(b""), last=True) + struct.pack("<II", checksum, size & 0xFFFFFFFF)


def _stored(data: memoryview, *, last: bool) -> bytes:
    return struct.pack("<BHH", last, len(data), len(data) ^ 0xFFFF) + data

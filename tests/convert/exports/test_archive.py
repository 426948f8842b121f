"""The archive: what tar and gzip make of it, the same bytes every time, a size known beforehand, and bounded memory."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_convert.convert.exports.archive import Archive, header


def read(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1000):
            yield block


def written(archive: Archive) -> bytes:
    return b"".join(archive.blocks(read))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    files: dict[str, bytes | Path] = {"b.json": b"{}\n", "a/empty": b"", "c" * 120: b"long"}
    for name, size in (("weights", 300_001), ("exact", 512), ("block", 0xFFFF * 2)):
        (tmp_path / name).write_bytes(bytes(i % 251 for i in range(size)))
        files[name] = tmp_path / name
    return Archive(files)


def test_tar_and_gzip_read_it_and_find_regular_files_of_nobody_at_time_zero(archive: Archive) -> None:
    with tarfile.open(fileobj=io.BytesIO(written(archive)), mode="r:gz") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == sorted(archive.files)
        for member in members:
            data = archive.files[member.name]
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == (data if isinstance(data, bytes) else data.read_bytes())
            assert member.isreg()
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert (member.mtime, member.mode) == (0, 0o644)


def test_it_is_the_same_bytes_in_any_order_and_at_any_time(archive: Archive) -> None:
    first = written(archive)
    for path in archive.paths:
        path.touch()
    assert written(Archive(dict(reversed(list(archive.files.items()))))) == first
    assert first[4:8] == bytes(4)  # gzip's own time


def test_its_size_is_known_beforehand(archive: Archive) -> None:
    assert archive.size() == len(written(archive))
    for size in (0, 1, 0xFFFF - 1536, 0xFFFF, 3 * 0xFFFF, 10240):
        one = Archive({"f": bytes(size)})
        assert one.size() == len(written(one))
        assert len(gzip.decompress(written(one))) % tarfile.RECORDSIZE == 0


def test_a_file_beyond_8_gib_keeps_its_size_in_the_header() -> None:
    info = tarfile.TarInfo.frombuf(header("model.safetensors", 12 << 30), "utf-8", "strict")
    assert info.size == 12 << 30


def test_writing_it_takes_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 << 20)

    def blocks(path: Path, size: int) -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    tracemalloc.start()
    total = sum(map(len, Archive({"large": tmp_path / "large"}).blocks(blocks)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 64 << 20
    assert peak < 12 << 20

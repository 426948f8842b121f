"""Digests and the lists that promise them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from gptoss_convert.errors import BadInput, InputChanged
from gptoss_convert.formats import digests
from gptoss_convert.formats.digests import (
    GIT_SHA1,
    SHA256,
    Expected,
    format_sums,
    hash_file,
    hash_files,
    manifest_files,
    parse_sums,
    read_manifest,
    read_sums,
    read_tree_record,
)

A, B = "a" * 64, "b" * 64


def test_a_file_larger_than_a_block_gets_its_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK", 1000)
    content = os.urandom(4321)
    (tmp_path / "f").write_bytes(content)
    seen: list[int] = []
    digest = hash_file(tmp_path / "f", progress=seen.append)
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert (sum(seen), len(seen), digest.git_sha1) == (4321, 5, None)


def test_an_empty_file_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    digest = hash_file(tmp_path / "f", git_sha1=True)
    assert digest.sha256 == hashlib.sha256().hexdigest()
    assert digest.git_sha1 == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_git_digest_is_the_one_git_computes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello\n")
    git = subprocess.run(["git", "hash-object", "f"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert hash_file(tmp_path / "f", git_sha1=True).get(GIT_SHA1) == git.stdout.strip()


def test_a_file_that_grows_while_it_is_hashed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK", 10)
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    grown = threading.Event()

    def grow(_: int) -> None:
        if not grown.is_set():
            grown.set()
            with path.open("ab") as file:
                file.write(b"y")

    with pytest.raises(InputChanged):
        hash_file(path, progress=grow)


def test_several_files_are_hashed_and_every_byte_is_reported(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(7)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (i * 1000))
    seen: list[int] = []
    found = hash_files(paths, threads=3, git_sha1=frozenset(paths[:1]), progress=seen.append)
    assert {path: d.sha256 for path, d in found.items()} == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert sum(seen) == 21_000
    assert [found[path].git_sha1 is not None for path in paths[:2]] == [True, False]


def test_one_unreadable_file_ends_the_hashing_of_all(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(BadInput, match="cannot open"):
        hash_files([tmp_path / "there", tmp_path / "gone"], threads=2)


def test_every_form_of_sha256sums_line_is_read() -> None:
    text = f"# a comment\n{A}  text.txt\n{B} *sub/binary.bin\r\n\nSHA256 (tag ged) = {A.upper()}\n{A}  ./dotted\n"
    assert parse_sums(text, "sums") == {
        "text.txt": Expected(None, SHA256, A),
        "sub/binary.bin": Expected(None, SHA256, B),
        "tag ged": Expected(None, SHA256, A),
        "dotted": Expected(None, SHA256, A),
    }


def test_a_name_with_a_line_feed_survives_writing_and_reading() -> None:
    assert parse_sums(format_sums({"line\nfeed": A, "plain": B}), "sums").keys() == {"line\nfeed", "plain"}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_what_is_written_and_the_reverse(tmp_path: Path) -> None:
    for name in ("plain", "with space", "line\nfeed"):
        (tmp_path / name).write_bytes(name.encode())
    found = {name: hash_file(tmp_path / name).sha256 for name in ("plain", "with space", "line\nfeed")}
    sums = tmp_path / "SUMS"
    sums.write_text(format_sums(found))
    subprocess.run(["sha256sum", "--check", "--strict", "SUMS"], cwd=tmp_path, check=True, capture_output=True)
    theirs = subprocess.run(["sha256sum", "--", *found], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert {name: e.digest for name, e in parse_sums(theirs.stdout, "sums").items()} == found


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a/../../b", "C:evil", "..\\out", "a//b", "a/./b", "nul\0name", "sub/"]
)
def test_a_list_that_names_a_file_outside_its_folder_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="outside its folder"):
        parse_sums(f"{A}  {name}\n", "sums")


@pytest.mark.parametrize("line", ["not a digest", f"{A[:-1]}  short", f"{A} one-space", f"{A}"])
def test_a_line_that_is_none_is_named_with_its_number(line: str) -> None:
    with pytest.raises(BadInput, match="line 2"):
        parse_sums(f"{A}  f\n{line}\n", "sums")


def test_two_digests_for_one_file_are_refused() -> None:
    assert len(parse_sums(f"{A}  f\n{A}  f\n", "sums")) == 1
    with pytest.raises(BadInput, match="two different digests"):
        parse_sums(f"{A}  f\n{B}  ./f\n", "sums")


def test_sums_that_are_not_text_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read_sums(tmp_path / "sums")
    monkeypatch.setattr(digests, "MAX_SUMS_BYTES", 2)
    with pytest.raises(BadInput, match="too large"):
        read_sums(tmp_path / "sums")


def test_a_tree_record_gives_sha256_for_lfs_files_and_git_sha1_for_others(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    files = {
        "config.json": {"size": 5, "blob_id": "c" * 40},
        "original/model.safetensors": {"size": 7, "blob_id": "d" * 40, "lfs_sha256": A, "lfs_size": 7, "xet_hash": B},
    }
    path.write_text(json.dumps({"format_version": 1, "files": files}))
    assert read_tree_record(path) == {
        "config.json": Expected(5, GIT_SHA1, "c" * 40),
        "original/model.safetensors": Expected(7, SHA256, A),
    }


def test_the_hub_client_itself_writes_what_is_read(tmp_path: Path) -> None:
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache")
    entry = tree_cache.TreeCacheEntry(size=3, blob_id="c" * 40, lfs_sha256=A, lfs_size=3)
    tree_cache.write_tree_cache(str(tmp_path), "e" * 40, {"a/b.bin": entry})
    assert read_tree_record(tmp_path / "trees" / f"{'e' * 40}.json") == {"a/b.bin": Expected(3, SHA256, A)}


@pytest.mark.parametrize(
    "document",
    [
        {"format_version": 2, "files": {}},
        {"format_version": 1},
        {"format_version": 1, "files": {"f": 1}},
        {"format_version": 1, "files": {"f": {"size": 1, "blob_id": "xyz"}}},
        {"format_version": 1, "files": {"f": {"size": -1, "blob_id": "c" * 40}}},
        {"format_version": 1, "files": {"f": {"size": True, "blob_id": "c" * 40}}},
        {"format_version": 1, "files": {"../f": {"size": 1, "blob_id": "c" * 40}}},
    ],
)
def test_a_malformed_tree_record_is_refused(tmp_path: Path, document: object) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput):
        read_tree_record(path)


def test_a_manifest_and_a_certificate_give_the_same_files(tmp_path: Path) -> None:
    files = [{"name": "m.gguf", "size": 3, "sha256": A}]
    for document in (
        {"schema": digests.MANIFEST_SCHEMA, "files": files},
        {"schema": digests.CERTIFICATE_SCHEMA, "artifact": {"files": files, "kind": "gguf"}, "source": {}},
    ):
        (tmp_path / "m.json").write_text(json.dumps(document))
        assert read_manifest(tmp_path / "m.json") == {"m.gguf": Expected(3, SHA256, A)}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": "other/1", "files": []},
        {"schema": digests.MANIFEST_SCHEMA, "files": {}},
        {"schema": digests.CERTIFICATE_SCHEMA, "files": []},
        {"schema": digests.MANIFEST_SCHEMA, "files": [{"size": 1}]},
        {"schema": digests.MANIFEST_SCHEMA, "files": [{"name": "../f", "size": 1, "sha256": A}]},
        {"schema": digests.MANIFEST_SCHEMA, "files": [{"name": "f", "size": 1, "sha256": A}] * 2},
        {"schema": digests.MANIFEST_SCHEMA, "files": [{"name": "f", "size": 1, "sha256": "A" * 64}]},
        {"schema": digests.MANIFEST_SCHEMA, "files": [{"name": "f", "size": "1", "sha256": A}]},
    ],
)
def test_a_malformed_manifest_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        manifest_files(document, "manifest")

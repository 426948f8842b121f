"""Which files a source consists of, and which links may be followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptoss_convert.errors import BadInput
from gptoss_convert.formats import tree
from gptoss_convert.formats.tree import HubPlace, hub_place, resolve_inside, source_root, walk

COMMIT = "6" * 40
XET = "ab" + "0" * 62


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot in a hub cache: one file as a blob, one in the shared store, one in a subfolder."""
    repo = tmp_path / "hub" / "models--openai--gpt-oss-20b"
    blobs, root = repo / "blobs", repo / "snapshots" / COMMIT
    store = tmp_path / "hub" / "blobs"
    for folder in (blobs, root / "original", store / "ab"):
        folder.mkdir(parents=True)
    (store / tree.SHARED_STORE_MARKER).write_text("1\n")
    (store / "ab" / XET).write_bytes(b"shared")
    (blobs / "e1").write_bytes(b"config")
    (blobs / "e2").symlink_to(f"../../blobs/ab/{XET}")
    (root / "config.json").symlink_to("../../blobs/e1")
    (root / "model.safetensors").symlink_to("../../blobs/e2")
    (root / "original" / "config.json").symlink_to("../../../blobs/e1")
    return root


def test_a_folder_is_listed_with_posix_names_and_without_bookkeeping(tmp_path: Path) -> None:
    for name in (
        "b",
        "sub/a",
        ".git/config",
        ".cache/huggingface/x",
        ".cache/gptoss-convert/y",
        ".cache/other",
        "sub/.git/z",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert [(file.name, file.size) for file in walk(tmp_path)] == [
        (".cache/other", 12),
        ("b", 1),
        ("sub/.git/z", 10),
        ("sub/a", 5),
    ]


def test_a_single_file_is_listed_under_its_own_name_even_through_a_link_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"12")
    (tmp_path / "link.gguf").symlink_to("real")
    (file,) = walk(tmp_path / "link.gguf")
    assert (file.name, file.path, file.size) == ("link.gguf", (tmp_path / "real").resolve(), 2)


def test_a_link_that_stays_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"12")
    (tmp_path / "link").symlink_to("real")
    assert [(file.name, file.size) for file in walk(tmp_path)] == [("link", 2), ("real", 2)]


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "nowhere", "link", "../../../../../../etc/passwd"])
def test_a_link_that_leads_out_of_a_folder_or_nowhere_is_refused_with_its_target(tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    root = tmp_path / "model"
    root.mkdir()
    (root / "link").symlink_to(target)
    with pytest.raises(BadInput, match="link") as caught:
        walk(root)
    assert caught.value.file == str(root / "link")
    assert caught.value.found == f"-> {target}"


@pytest.mark.parametrize("target", ["..", "sub"])
def test_a_link_to_a_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(BadInput, match="link to a folder"):
        walk(tmp_path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="not a regular file"):
        walk(tmp_path)
    with pytest.raises(BadInput, match="not a regular file"):
        resolve_inside(tmp_path, "model.safetensors")
    with pytest.raises(BadInput, match="neither"):
        walk(tmp_path / "model.safetensors")


def test_a_folder_with_absurdly_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_FILES", 3)
    for i in range(4):
        (tmp_path / str(i)).touch()
    with pytest.raises(BadInput, match="too many files"):
        walk(tmp_path)


def test_a_hub_snapshot_is_read_through_its_blobs_and_the_shared_store(snapshot: Path) -> None:
    assert [(file.name, file.path.read_bytes()) for file in walk(snapshot)] == [
        ("config.json", b"config"),
        ("model.safetensors", b"shared"),
        ("original/config.json", b"config"),
    ]
    assert [file.name for file in walk(snapshot / "original")] == ["config.json"]


def test_a_snapshot_reached_through_a_link_is_still_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(snapshot)
    assert len(walk(tmp_path / "alias")) == 3


@pytest.mark.parametrize(
    "target",
    [
        "../../../../outside",  # out of the cache
        "../../refs/main",  # in the repository, but no blob
        "../../../models--other--model/blobs/e",  # another repository's blob
        "../../../blobs/ab/short",  # in the shared store, but not named like a blob
    ],
)
def test_a_snapshots_link_to_anything_but_a_blob_is_refused(snapshot: Path, target: str) -> None:
    path = snapshot / "evil.json"
    path.symlink_to(target)
    path.parent.joinpath(target).resolve().parent.mkdir(parents=True, exist_ok=True)
    path.parent.joinpath(target).resolve().write_bytes(b"secret")
    with pytest.raises(BadInput, match="leads out"):
        walk(snapshot)
    with pytest.raises(BadInput, match="leads out"):
        resolve_inside(snapshot, "evil.json")


def test_a_folder_that_merely_has_the_shape_of_a_shared_store_is_none(snapshot: Path) -> None:
    (snapshot.parents[2] / "blobs" / tree.SHARED_STORE_MARKER).unlink()
    with pytest.raises(BadInput, match="leads out"):
        walk(snapshot)


def test_a_blob_that_is_itself_a_link_out_of_the_cache_is_refused(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    blob = snapshot.parents[1] / "blobs" / "e1"
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="leads out"):
        walk(snapshot)


def test_the_place_of_a_snapshot_names_repository_commit_and_subfolder(snapshot: Path, tmp_path: Path) -> None:
    repo = snapshot.parents[1].resolve()
    assert hub_place(snapshot) == HubPlace(repo, "openai/gpt-oss-20b", COMMIT, "")
    assert hub_place(snapshot / "original") == HubPlace(repo, "openai/gpt-oss-20b", COMMIT, "original/")
    assert hub_place(tmp_path) is None
    assert hub_place(snapshot.parent) is None


def test_a_whole_cached_repository_stands_for_its_only_snapshot(snapshot: Path) -> None:
    repo = snapshot.parents[1]
    assert source_root(repo) == snapshot
    (repo / "snapshots" / ("7" * 40)).mkdir()
    with pytest.raises(BadInput, match="exactly one snapshot"):
        source_root(repo)
    with pytest.raises(BadInput, match="no such file"):
        source_root(repo / "gone")


@pytest.mark.parametrize("name", ["../x", "sub/x", "/etc/passwd", "..", ".", "", "a\\b", "C:x", "c:", "x\0y", "\0"])
def test_an_index_may_name_plain_files_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="not a plain name"):
        resolve_inside(tmp_path, name)


def test_a_plain_name_in_an_index_is_found(tmp_path: Path) -> None:
    (tmp_path / "model-00000.safetensors").write_bytes(b"x")
    assert resolve_inside(tmp_path, "model-00000.safetensors").read_bytes() == b"x"
    with pytest.raises(BadInput, match="not there"):
        resolve_inside(tmp_path, "model-00001.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BadInput, match="not a regular file"):
        resolve_inside(tmp_path, "folder.safetensors")

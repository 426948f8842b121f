"""The files of a source: a folder, a single file, or a snapshot in the hub client's cache.

A symbolic link is followed only where its target stays inside the folder, or, for a snapshot in the hub's cache, in
that repository's `blobs/` or in the cache's shared blob store. Every other link is refused: it would let a download
make this tool read, and copy into its output, a file that never belonged to the model.

Layout of the hub's cache:

    <cache>/models--OWNER--NAME/snapshots/<commit>/FILE -> ../../blobs/<digest>
    <cache>/models--OWNER--NAME/blobs/<digest>              the bytes, or a link to the shared store
    <cache>/models--OWNER--NAME/trees/<commit>.json         the tree record
    <cache>/blobs/<xx>/<64 hex digits>                      the shared store, with a marker file in blobs/
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.errors import BadInput

# Bookkeeping of git, of the hub client and of this tool's own fetch; never part of a model.
SKIPPED = frozenset({".git", ".cache/huggingface", ".cache/gptoss-convert"})
MAX_FILES = 100_000
SHARED_STORE_MARKER = ".huggingface-shared-blobs"
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_BAD_IN_NAME = re.compile(r"[/\\\0]|^[A-Za-z]:|^\.{0,2}$")


@dataclass(frozen=True)
class TreeFile:
    """One regular file: its name relative to the source with "/", the path to open (links resolved), size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class HubPlace:
    """Where a folder lies in the hub's cache: repository, commit, and its place in the snapshot ("" or "original/")."""

    repo_folder: Path
    repo: str
    revision: str
    prefix: str


def hub_place(root: Path) -> HubPlace | None:
    """The hub snapshot that this folder is or lies in, or None."""
    resolved = root.resolve()
    parts = resolved.parts
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] == "snapshots" and parts[i - 1].startswith("models--"):
            inside = parts[i + 2 :]
            return HubPlace(
                repo_folder=Path(*parts[:i]),
                repo=parts[i - 1].removeprefix("models--").replace("--", "/"),
                revision=parts[i + 1],
                prefix="".join(f"{part}/" for part in inside),
            )
    return None


def source_root(source: Path) -> Path:
    """The folder or file to read: `source` itself, or the only snapshot where it is a repository in the hub's cache."""
    if not source.exists():
        raise BadInput("no such file or folder", file=source)
    snapshots = source / "snapshots"
    if not (source.name.startswith("models--") and snapshots.is_dir()):
        return source
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        raise BadInput(
            "this is a whole repository of the hub's cache and it does not hold exactly one snapshot",
            file=source,
            found=", ".join(path.name for path in found) or "no snapshot",
            remedy="name one of the folders in snapshots/",
        )
    return found[0]


def walk(root: Path) -> list[TreeFile]:
    """Every file below `root`, sorted by name; for a single file, that file under its own name."""
    if root.is_file():
        # A link that the user names is the user's choice; only links found inside a download are suspect.
        return [TreeFile(root.name, root.resolve(), root.stat().st_size)]
    if not root.is_dir():
        raise BadInput("neither a regular file nor a folder", file=root)
    files: list[TreeFile] = []
    for path in _paths(root):
        if len(files) >= MAX_FILES:
            raise BadInput("too many files for a model", file=root, expected=f"at most {MAX_FILES}")
        files.append(_tree_file(root, path))
    return sorted(files, key=lambda file: file.name)


def resolve_inside(root: Path, name: str) -> Path:
    """The file that a checkpoint's index calls `name`: a plain name, a regular file, links only as in `walk`."""
    if _BAD_IN_NAME.search(name):
        raise BadInput(
            "a file name in the index is not a plain name",
            file=root,
            found=name,
            expected="a name without folders, drive letters or NUL",
            remedy="do not use this checkpoint: its index points out of its folder",
        )
    path = root / name
    if not os.path.lexists(path):
        raise BadInput("the index names a file that is not there", file=path, remedy="download the missing file")
    return _tree_file(root, path).path


def _paths(root: Path) -> Iterator[Path]:
    """Everything below root that is not a folder; no folder link is entered."""

    def refuse(error: OSError) -> None:
        raise BadInput("cannot list the folder", file=error.filename, found=error.strerror) from error

    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=False):
        here = Path(folder)
        relative = here.relative_to(root).as_posix()
        subfolders[:] = [name for name in subfolders if f"{relative}/{name}".removeprefix("./") not in SKIPPED]
        for name in subfolders:
            if (here / name).is_symlink():
                raise _refused_link(here / name, "a link to a folder")
        yield from (here / name for name in names)


def _tree_file(root: Path, path: Path) -> TreeFile:
    """The entry of one path below root, its link followed if it may be."""
    target = path
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise _refused_link(path, "a link that leads nowhere") from error
        if not _may_lead_to(root, target):
            raise _refused_link(path, "a link that leads out of the folder")
    status = target.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput("not a regular file", file=path, found=stat.filemode(status.st_mode), expected="a regular file")
    return TreeFile(path.relative_to(root).as_posix(), target, status.st_size)


def _may_lead_to(root: Path, target: Path) -> bool:
    """Whether a link below root may lead to this target, which is fully resolved."""
    if target.is_relative_to(root.resolve()):
        return True
    place = hub_place(root)
    if place is None:
        return False
    if target.is_relative_to(place.repo_folder / "blobs"):
        return True
    store = place.repo_folder.parent / "blobs"
    if not target.is_relative_to(store) or _SHARED_BLOB.fullmatch(target.relative_to(store).as_posix()) is None:
        return False
    marker = store / SHARED_STORE_MARKER
    return marker.is_file() and not marker.is_symlink()


def _refused_link(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{what} is not followed",
        file=path,
        found=f"-> {path.readlink()}",
        expected="regular files, or links that stay inside the folder or the hub cache's blobs",
        remedy="copy the file itself to this place if you trust it",
    )

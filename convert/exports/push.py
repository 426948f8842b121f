"""An export to the hub: the repository made if it is new, the folder uploaded in one commit, every file asked for again.

The token is the hub client's own: HF_TOKEN, or what `hf auth login` has left.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.convert.exports.huggingface import PLATFORM, require_repository
from gptoss_convert.convert.fetch_hub import RemoteFile, as_network_errors, ask_hub
from gptoss_convert.errors import DigestMismatch, UsageError
from gptoss_convert.formats.tree import walk

BLOCK = 16 << 20


@dataclass(frozen=True)
class Pushed:
    """Where it went. others: what lay in the repository before and is not of this export."""

    repo: str
    commit: str
    url: str
    others: tuple[str, ...] = ()


def require_pushable(platform: str, name: str | None) -> str:
    """The repository, before any work is done; UsageError where there is nothing to push to."""
    if platform != PLATFORM:
        raise UsageError("--push means nothing here", found=f"--for {platform}", expected=f"--for {PLATFORM}")
    if name is None:
        raise UsageError("--push needs the repository's name", expected="--name OWNER/NAME")
    return require_repository(name, "a repository")


def push(folder: Path, repo: str, *, endpoint: str | None = None, token: str | None = None) -> Pushed:
    """Upload a folder; a new repository is private. Files that the hub has already are not sent again."""
    from huggingface_hub import HfApi

    with as_network_errors(
        repo, deed="upload", kept="files that the hub has are not sent again (export needs --overwrite)"
    ):
        api = HfApi(endpoint=endpoint, token=token)
        url = api.create_repo(repo, private=True, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by gptoss-convert export")
        commit, arrived = ask_hub(repo, made.oid, endpoint, token)
    _require_arrived(folder, repo, {file.name: file for file in arrived})
    ours = {str(entry.name) for entry in walk(folder)} | {".gitattributes"}  # the hub's own
    return Pushed(repo, commit, str(url), tuple(file.name for file in arrived if file.name not in ours))


def _require_arrived(folder: Path, repo: str, arrived: dict[str, RemoteFile]) -> None:
    """What the hub lists for the commit must be what lies here, file by file."""
    for entry in walk(folder):
        name, size = str(entry.name), entry.path.stat().st_size
        remote = arrived.get(name)
        expected = None if remote is None else remote.lfs_sha256 or remote.blob_id
        found = _digest(entry.path, size, lfs=remote is not None and remote.lfs_sha256 is not None)
        if remote is None or remote.size != size or expected != found:
            raise DigestMismatch(
                "the hub does not have the file that was sent", file=f"{repo}/{name}", found=expected, expected=found,
                remedy="run the same command again",
            )  # fmt: skip


def _digest(path: Path, size: int, *, lfs: bool) -> str:
    hasher = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    return hasher.hexdigest()

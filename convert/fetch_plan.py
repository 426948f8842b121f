"""What a fetch will download: a commit, a choice among its files, and the digests that they must have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gptoss_convert.convert import official
from gptoss_convert.convert.fetch_hub import COMMIT, RemoteFile, as_network_errors, ask_hub
from gptoss_convert.convert.official import Table
from gptoss_convert.errors import DigestMismatch, UsageError
from gptoss_convert.formats.digests import FileDigest

LAYOUTS = ("hf", "original", "metal", "all")
_REPO_ID = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")


@dataclass(frozen=True)
class Plan:
    """What a fetch will download where; nothing is written yet. `resolved_from` is the branch or tag, if allowed."""

    repo: str
    revision: str
    resolved_from: str | None
    target: Path
    listing: tuple[RemoteFile, ...]
    selected: tuple[RemoteFile, ...]
    endpoint: str | None
    token: str | bool | None
    table: Table

    @property
    def total_bytes(self) -> int:
        """Bytes of all selected files."""
        return sum(file.size for file in self.selected)


def plan(
    repo: str,
    target: Path,
    *,
    revision: str | None = None,
    layout: str = "hf",
    include: Sequence[str] = (),
    allow_moving: bool = False,
    endpoint: str | None = None,
    token: str | bool | None = None,
    table: Table | None = None,
) -> Plan:
    """Ask the hub for the commit's files and choose among them.

    revision: 40 hex digits; by default the pinned one of a pinned repository; a branch or tag only with `allow_moving`.
    layout: "hf" (the root), "original", "metal" or "all"; include: patterns of further file names. endpoint: by default
    HF_ENDPOINT. token: by default what the hub client uses.
    """
    table = table or official.load()
    if _REPO_ID.fullmatch(repo) is None:
        raise UsageError("not the name of a repository", found=repo, expected="OWNER/NAME")
    if layout not in LAYOUTS:
        raise UsageError("no such layout", found=layout, expected=", ".join(LAYOUTS))
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    wanted = _wanted_revision(repo, revision, allow_moving, table)
    with as_network_errors(repo):
        commit, listing = ask_hub(repo, wanted, endpoint, token)
    selected = tuple(file for file in listing if _is_selected(file.name, layout, include))
    if not selected:
        raise UsageError("the selection fits no file of the repository", file=repo, found=f"--layout {layout}")
    ready = Plan(
        repo=repo,
        revision=commit,
        resolved_from=None if wanted == commit else wanted,
        target=target,
        listing=listing,
        selected=selected,
        endpoint=endpoint,
        token=token,
        table=table,
    )
    _refuse_other_files(ready)
    return ready


def _wanted_revision(repo: str, revision: str | None, allow_moving: bool, table: Table) -> str:
    if revision is None and repo in table.repos:
        return table.repos[repo].revision
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if revision is None or not allow_moving:
        raise UsageError(
            "a commit must be named: a branch or tag can mean other files tomorrow",
            file=repo,
            found=revision or "no revision",
            expected="40 hex digits",
            remedy=f"git ls-remote https://huggingface.co/{repo} shows the commits; pass one as --revision, "
            "or pass --allow-moving to resolve the name once and have the commit reported",
        )
    return revision


def _is_selected(name: str, layout: str, include: Sequence[str]) -> bool:
    wanted = {"hf": "", "original": "original", "metal": "metal"}.get(layout)
    return wanted in (None, official.layout_of(name)) or any(fnmatchcase(name, pattern) for pattern in include)


def _refuse_other_files(ready: Plan) -> None:
    """Stop before gigabytes are downloaded if the hub offers something else than what is pinned."""
    for file in ready.selected:
        pinned = pinned_digests(ready, file)
        if file.lfs_sha256 is not None and pinned and file.lfs_sha256 not in pinned:
            raise DigestMismatch(
                "the hub offers another file than the official one; nothing was downloaded",
                file=f"{ready.repo}/{file.name}",
                found=file.lfs_sha256,
                expected=" or ".join(sorted(pinned)),
                remedy="check the endpoint and the revision; do not use this source",
            )


def pinned_digests(ready: Plan, file: RemoteFile) -> frozenset[str]:
    """The digests that the pins allow for a file; empty where they do not bind it (see `verify`)."""
    repo = ready.table.repos.get(ready.repo)
    if repo is None or file.name in official.REWORDED:
        return frozenset()
    pins = repo.pins(file.name)
    if not repo.knows_revision(ready.revision) and not any(pin.is_weights for pin in pins):
        return frozenset()
    return frozenset(pin.sha256 for pin in pins if pin.sha256 is not None)


def is_right(ready: Plan, file: RemoteFile, digest: FileDigest) -> bool:
    """Whether contents are the promised ones: by the pins where they bind the file, else by the hub's listing."""
    pinned = pinned_digests(ready, file)
    if pinned:
        return digest.sha256 in pinned
    return digest.identity.size == file.size and digest.get(file.expected.algorithm) == file.expected.digest

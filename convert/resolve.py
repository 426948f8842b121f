"""SRC as the user gives it: a path, or a hub repository at a pinned commit that is fetched and verified first.

A path that exists always wins. `OWNER/NAME@<40 hex digits>`, or an official repository by its name alone (at the commit pinned
in the package), is downloaded into `$GPTOSS_CONVERT_CACHE` (default: the user's cache folder) under its repository and commit;
what is there and right is not downloaded again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.errors import BadInput, DigestMismatch, ExitCode, UsageError

_REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[0-9a-f]{40}))?")


def resolve_source(text: str, show: ShowProgress, layout: str = "hf") -> Path:
    """The folder or file to read for what the user called SRC."""
    if not text:
        raise UsageError("SRC is empty", expected="a path, or OWNER/NAME@<40 hex digits of a commit>")
    path = Path(text)
    if os.path.lexists(path):
        return path
    match = _REPO.fullmatch(text)
    if match is None:
        raise BadInput(
            "no such file or folder, and not a repository at a commit",
            file=text,
            expected="a path, or OWNER/NAME@<40 hex digits of a commit>",
        )
    return _fetched(match["repo"], match["revision"], layout, show)


def cache_folder() -> Path:
    """Where fetched sources are kept."""
    own = os.environ.get("GPTOSS_CONVERT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss-convert"


def fetched_folder(repo: str, commit: str) -> Path:
    """Where a repository at a commit is put when it is fetched."""
    return cache_folder() / repo.replace("/", "--") / commit


def _fetched(repo: str, revision: str | None, layout: str, show: ShowProgress) -> Path:
    from gptoss_convert.convert import fetch, fetch_plan, official

    pinned = official.load().repos.get(repo)
    if revision is None and pinned is None:
        raise BadInput(
            "no such file or folder; and if a repository is meant, it needs a commit",
            file=repo,
            expected="a path, or OWNER/NAME@<40 hex digits of a commit>",
            remedy=f"mend the path; or say {repo}@<40 hex digits>, so that the same command always reads the same bytes",
        )
    commit = revision or (pinned.revision if pinned else "")
    target = fetched_folder(repo, commit)
    target.mkdir(parents=True, exist_ok=True)
    ready = fetch_plan.plan(repo, target, revision=revision, layout=layout)
    with show("fetch", ready.total_bytes) as advance:
        report = fetch.run(ready, repair=True, progress=advance)  # the folder is ours, and nobody else's to mend
    if report.exit_code() is ExitCode.MISMATCH:
        raise DigestMismatch(
            "what was fetched is not what was promised", file=target, remedy="run fetch for the details"
        )
    return target

"""Download a pinned revision from the hub; no file gets its final name before its digest was checked.

The hub client compares sizes only, and takes a file that is already there for the right one. Hence every file is
downloaded into a private folder below the target, hashed there, compared with the pinned digest or else with the
commit's listing, and only then moved to its name. A corrupt download is deleted; a rerun keeps what is complete and
fetches the rest. The hub's cache of the user is not read, because a corrupt blob in it would come back at every rerun.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gptoss_convert.convert.fetch_download import download_all
from gptoss_convert.convert.fetch_hub import RemoteFile
from gptoss_convert.convert.fetch_plan import Plan, is_right, pinned_digests, plan
from gptoss_convert.convert.official import Table
from gptoss_convert.convert.verify import DEFAULT_THREADS, verify
from gptoss_convert.convert.verify_report import FileResult, Report, Status
from gptoss_convert.errors import CannotWrite, TargetExists
from gptoss_convert.formats.digests import HUB_TREE_FORMAT, SHA256, FileDigest, Progress, hash_files
from gptoss_convert.formats.output import write_atomically

__all__ = ["Plan", "fetch", "plan", "run"]

DEFAULT_WORKERS = 4
PRIVATE = Path(".cache/gptoss-convert")


def fetch(
    repo: str,
    target: Path,
    *,
    revision: str | None = None,
    layout: str = "hf",
    include: Sequence[str] = (),
    allow_moving: bool = False,
    repair: bool = False,
    progress: Progress | None = None,
    table: Table | None = None,
) -> Report:
    """Download and verify in one call; see `plan` and `run`."""
    ready = plan(
        repo, target, revision=revision, layout=layout, include=include, allow_moving=allow_moving, table=table
    )
    return run(ready, repair=repair, progress=progress)


def run(
    ready: Plan,
    *,
    repair: bool = False,
    workers: int = DEFAULT_WORKERS,
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan and report on the files it selected.

    repair: replace files of the target that have one of the names but other contents. progress: bytes downloaded.
    """
    tell = progress or (lambda _: None)
    with _locked(ready.target) as private:
        known = _present_files(ready, repair, threads, tell)
        todo = [file for file in ready.selected if file.name not in known]
        _check_space(ready, todo)
        _write_tree_record(ready)
        right, corrupt = download_all(ready, todo, private / "fetch", workers=workers, tell=tell)
        shutil.rmtree(private / "fetch", ignore_errors=True)
        known |= right
        report = Report(str(ready.target), ready.repo, ready.revision, quick=False, results=())
        if known:
            report = verify(
                ready.target,
                repo=ready.repo,
                revision=ready.revision,
                threads=threads,
                table=ready.table,
                known={ready.target / name: digest for name, digest in known.items()},
            )
    return _report_on(ready, report, corrupt)


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """The private folder below the target, held by this run alone."""
    private = target / PRIVATE
    try:
        private.mkdir(parents=True, exist_ok=True)
        lock = os.open(private / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CannotWrite("cannot create the target", file=target, found=error.strerror) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise TargetExists(
            "another run fetches into this folder", file=target, remedy="wait for it, or choose another folder"
        ) from error
    try:
        yield private
    finally:
        os.close(lock)


def _present_files(ready: Plan, repair: bool, threads: int, tell: Progress) -> dict[str, FileDigest]:
    """The selected files that are already in the target and right; TargetExists for wrong ones, unless `repair`."""
    there = {ready.target / file.name: file for file in ready.selected if (ready.target / file.name).is_file()}
    same_size = {path: file for path, file in there.items() if path.stat().st_size == file.size}
    digests = hash_files(same_size, threads=threads, git_sha1=frozenset(same_size))
    right = {path for path, digest in digests.items() if is_right(ready, there[path], digest)}
    wrong = sorted(file.name for path, file in there.items() if path not in right)
    if wrong and not repair:
        raise TargetExists(
            "the target holds files of these names with other contents",
            file=ready.target,
            found=", ".join(wrong[:5]),
            remedy="choose another folder, or pass --repair to have them replaced once the right ones are here",
        )
    for path in right:
        tell(there[path].size)
    return {there[path].name: digests[path] for path in right}


def _check_space(ready: Plan, todo: Sequence[RemoteFile]) -> None:
    needed, free = sum(file.size for file in todo), shutil.disk_usage(ready.target).free
    if needed > free:
        raise CannotWrite(
            "not enough space on the disk",
            file=ready.target,
            found=f"{free} bytes free",
            expected=f"{needed} bytes for {len(todo)} files",
        )


def _write_tree_record(ready: Plan) -> None:
    """The commit's listing in the form and place in which the hub client notes it, for later offline verification."""
    folder = ready.target / ".cache" / "huggingface" / "trees"
    files: dict[str, dict[str, object]] = {}
    for file in ready.listing:
        files[file.name] = {"size": file.size, "blob_id": file.blob_id}
        if file.lfs_sha256 is not None:
            files[file.name] |= {"lfs_sha256": file.lfs_sha256, "lfs_size": file.size}
    document = {"format_version": HUB_TREE_FORMAT, "files": files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite("cannot create the folder", file=folder, found=error.strerror) from error
    write_atomically(folder / f"{ready.revision}.json", json.dumps(document, indent=1).encode())


def _report_on(ready: Plan, report: Report, corrupt: Mapping[str, FileDigest]) -> Report:
    """The report, confined to the selected files, the corrupt downloads among them."""
    results = {result.name: result for result in report.results}
    chosen: list[FileResult] = []
    for file in ready.selected:
        if file.name not in corrupt:
            if file.name in results:
                chosen.append(results[file.name])
            continue
        digest, pinned = corrupt[file.name], sorted(pinned_digests(ready, file))
        algorithm = SHA256 if pinned else file.expected.algorithm
        chosen.append(
            FileResult(
                file.name,
                digest.identity.size,
                Status.MISMATCHED,
                "the download was corrupt and was deleted; run again",
                "digest",
                authority=f"official {ready.repo}" if pinned else f"hub listing @{ready.revision[:8]}",
                algorithm=algorithm,
                expected=pinned[0] if pinned else file.expected.digest,
                found=digest.get(algorithm),
            )
        )
    notes = list(report.notes)
    if ready.resolved_from is not None:
        notes.append(f"{ready.resolved_from} was {ready.revision} at the time; pin it: --revision {ready.revision}")
    return replace(report, results=tuple(chosen), notes=tuple(notes))

"""Download a pinned revision from the hub; no file gets its final name before its digest was checked.

The hub client compares sizes only, and takes a file that is already there for the right one. Hence every file is
downloaded into a private folder below the target, hashed there, compared with the pinned digest or else with the
commit's listing, and only then moved to its name. A corrupt download is deleted; a rerun keeps what is complete and
fetches the rest. The hub's cache of the user is not read, because a corrupt blob in it would come back at every rerun.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gptoss_convert.convert import official
from gptoss_convert.convert.official import Table
from gptoss_convert.convert.verify import DEFAULT_THREADS, FileResult, Report, Status, verify, write_atomically
from gptoss_convert.errors import CannotWrite, DigestMismatch, GptOssError, NetworkError, TargetExists, UsageError
from gptoss_convert.formats.digests import (
    GIT_SHA1,
    HUB_TREE_FORMAT,
    SHA256,
    Expected,
    FileDigest,
    Progress,
    hash_file,
    hash_files,
    safe_name,
)

LAYOUTS = ("hf", "original", "metal", "all")
DEFAULT_WORKERS = 4
CHUNK = 1 << 18
PRIVATE = Path(".cache/gptoss-convert")
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit as the hub lists it: size in bytes, git's blob id, and the SHA-256 of git-LFS files."""

    name: str
    size: int
    blob_id: str
    lfs_sha256: str | None

    @property
    def expected(self) -> Expected:
        """What the listing promises of the file's contents."""
        if self.lfs_sha256 is not None:
            return Expected(self.size, SHA256, self.lfs_sha256)
        return Expected(self.size, GIT_SHA1, self.blob_id)


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
    with _as_network_errors(repo):
        commit, listing = _ask_hub(repo, wanted, endpoint, token)
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
        right, corrupt = _download_all(ready, todo, private / "fetch", workers=workers, tell=tell)
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


# --- what the hub has ------------------------------------------------------------------------------------------------


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


def _ask_hub(
    repo: str, wanted: str, endpoint: str | None, token: str | bool | None
) -> tuple[str, tuple[RemoteFile, ...]]:
    """The commit and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, token=token)
    commit = wanted if COMMIT.fullmatch(wanted) else api.repo_info(repo, revision=wanted).sha
    if commit is None or COMMIT.fullmatch(commit) is None:
        raise NetworkError("the hub named no commit", file=repo, found=commit, expected="40 hex digits")
    files: dict[str, RemoteFile] = {}
    for item in api.list_repo_tree(repo, recursive=True, revision=commit):
        if not isinstance(item, RepoFile):
            continue
        name = safe_name(item.path, f"the listing of {repo}")
        size = item.lfs.size if item.lfs is not None else item.size
        files[name] = RemoteFile(name, size, item.blob_id, item.lfs.sha256 if item.lfs is not None else None)
    return commit, tuple(files[name] for name in sorted(files))


def _is_selected(name: str, layout: str, include: Sequence[str]) -> bool:
    wanted = {"hf": "", "original": "original", "metal": "metal"}.get(layout)
    return wanted in (None, official.layout_of(name)) or any(fnmatchcase(name, pattern) for pattern in include)


def _refuse_other_files(ready: Plan) -> None:
    """Stop before gigabytes are downloaded if the hub offers something else than what is pinned."""
    for file in ready.selected:
        pinned = _pinned_digests(ready, file)
        if file.lfs_sha256 is not None and pinned and file.lfs_sha256 not in pinned:
            raise DigestMismatch(
                "the hub offers another file than the official one; nothing was downloaded",
                file=f"{ready.repo}/{file.name}",
                found=file.lfs_sha256,
                expected=" or ".join(sorted(pinned)),
                remedy="check the endpoint and the revision; do not use this source",
            )


def _pinned_digests(ready: Plan, file: RemoteFile) -> frozenset[str]:
    """The digests that the pins allow for a file; empty where they do not bind it (see `verify`)."""
    repo = ready.table.repos.get(ready.repo)
    if repo is None or file.name in official.REWORDED:
        return frozenset()
    pins = repo.pins(file.name)
    if not repo.knows_revision(ready.revision) and not any(pin.is_weights for pin in pins):
        return frozenset()
    return frozenset(pin.sha256 for pin in pins if pin.sha256 is not None)


def _is_right(ready: Plan, file: RemoteFile, digest: FileDigest) -> bool:
    """Whether contents are the promised ones: by the pins where they bind the file, else by the hub's listing."""
    pinned = _pinned_digests(ready, file)
    if pinned:
        return digest.sha256 in pinned
    return digest.identity.size == file.size and digest.get(file.expected.algorithm) == file.expected.digest


# --- the target ------------------------------------------------------------------------------------------------------


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
    right = {path for path, digest in digests.items() if _is_right(ready, there[path], digest)}
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


# --- the download ----------------------------------------------------------------------------------------------------


def _download_all(
    ready: Plan,
    todo: Sequence[RemoteFile],
    staging: Path,
    *,
    workers: int,
    tell: Progress,
) -> tuple[dict[str, FileDigest], dict[str, FileDigest]]:
    """Download the files and keep the right ones; the digests of those, and of the corrupt ones."""
    _sweep(staging)
    right: dict[str, FileDigest] = {}
    corrupt: dict[str, FileDigest] = {}
    stop = threading.Event()

    def one(file: RemoteFile) -> None:
        digest = _download(ready, file, staging, tell, stop)
        (right if _is_right(ready, file, digest) else corrupt)[file.name] = digest

    with ThreadPoolExecutor(max(1, workers)) as pool:
        # Smallest first: what is wrong with the access or the network shows before gigabytes have passed.
        jobs = [pool.submit(one, file) for file in sorted(todo, key=lambda file: file.size)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
            # Files under way are completed and kept; none is begun once one has failed.
            pool.shutdown(wait=True, cancel_futures=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    errors = [job.exception() for job in jobs if not job.cancelled() and job.exception() is not None]
    for error in errors:
        assert error is not None
        raise error
    return right, corrupt


def _sweep(staging: Path) -> None:
    """Remove what a killed run left half downloaded: the client never takes up such a file again."""
    for path in staging.rglob("*.incomplete"):
        path.unlink(missing_ok=True)


def _download(ready: Plan, file: RemoteFile, staging: Path, tell: Progress, stop: threading.Event) -> FileDigest:
    """Bring one file into the staging folder, hash it, and move it to its name if it is right, else delete it."""
    from huggingface_hub import constants, hf_hub_download

    # The client hands over bytes only when a whole block is there; with its own 10 MB, Ctrl-C and the progress bar of a
    # slow line would lag by many seconds.
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = _silent_bar(tell, stop)
    with _as_network_errors(f"{ready.repo}/{file.name}"):
        staged = Path(
            hf_hub_download(
                ready.repo,
                file.name,
                revision=ready.revision,
                local_dir=staging,
                cache_dir=staging / "no-cache",
                endpoint=ready.endpoint,
                token=ready.token,
                **options,
            )
        )
    digest = hash_file(staged, git_sha1=True, stop=stop)
    if not _is_right(ready, file, digest):
        staged.unlink()
        return digest
    final = ready.target / file.name
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("rb+") as opened:
            os.fsync(opened.fileno())
        staged.replace(final)
    except OSError as error:
        raise CannotWrite("cannot move the file to its place", file=final, found=error.strerror) from error
    return digest


def _silent_bar(tell: Progress, stop: threading.Event) -> type:
    """What the hub client takes for a progress bar: it passes the byte counts on, and ends a download on Ctrl-C."""

    class Bar:
        n = 0
        total: int | None = 0

        def __init__(self, *_: object, **__: object) -> None:
            self.format_dict: Mapping[str, object] = {}

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def update(self, count: float | None = 1) -> None:
            if stop.is_set():
                raise CancelledError
            tell(int(count or 0))

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar


@contextmanager
def _as_network_errors(what: str) -> Iterator[None]:
    """Turn whatever the hub client raises into one of this tool's errors."""
    from huggingface_hub import errors

    # The base class of every transport error of the HTTP library that this version of the client uses.
    http_error: Any = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except (GptOssError, CancelledError):
        raise
    except errors.RepositoryNotFoundError as error:  # also GatedRepoError
        remedy = "check the name; for a private or gated repository log in with `hf auth login` or set HF_TOKEN"
        raise NetworkError("no such repository, or no access to it", file=what, remedy=remedy) from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        remedy = "check --revision; the commit may have been removed from the repository"
        raise NetworkError("the hub does not have this commit or file", file=what, remedy=remedy) from error
    except (OSError, http_error, errors.XetDownloadError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise CannotWrite("cannot write the download", file=what, found=error.strerror) from error
        remedy = "run the same command again: files that are complete and verified are kept"
        if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
            remedy = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network; unset it to download"
        raise NetworkError("the download failed", file=what, found=_first_line(error), remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        remedy = "check HF_ENDPOINT, proxy and login page of your network"
        raise NetworkError(
            "the answer is not one of a hub", file=what, found=_first_line(error), remedy=remedy
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _report_on(ready: Plan, report: Report, corrupt: Mapping[str, FileDigest]) -> Report:
    """The report, confined to the selected files, the corrupt downloads among them."""
    results = {result.name: result for result in report.results}
    chosen: list[FileResult] = []
    for file in ready.selected:
        if file.name not in corrupt:
            if file.name in results:
                chosen.append(results[file.name])
            continue
        digest, pinned = corrupt[file.name], sorted(_pinned_digests(ready, file))
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

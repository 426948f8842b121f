"""The download: into a private folder, hashed there, and only what is right gets its name."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from gptoss_convert.convert.fetch_hub import RemoteFile, as_network_errors
from gptoss_convert.convert.fetch_plan import Plan, is_right
from gptoss_convert.errors import CannotWrite
from gptoss_convert.formats.digests import FileDigest, Progress, hash_file

CHUNK = 1 << 18


def download_all(
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
        (right if is_right(ready, file, digest) else corrupt)[file.name] = digest

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
    with as_network_errors(f"{ready.repo}/{file.name}"):
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
    if not is_right(ready, file, digest):
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

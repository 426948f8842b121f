"""Talking to the hub: the files of a commit, and every failure of its client as an error of this tool."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptoss_convert.errors import CannotWrite, GptOssError, NetworkError
from gptoss_convert.formats.digests import GIT_SHA1, SHA256, Expected, safe_name

COMMIT = re.compile(r"[0-9a-f]{40}")
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


def ask_hub(
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


@contextmanager
def as_network_errors(
    what: str, *, deed: str = "download", kept: str = "files that are complete and verified are kept"
) -> Iterator[None]:
    """Turn whatever the hub client raises into one of this tool's errors. kept: what a second try need not do again."""
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
            raise CannotWrite(f"cannot write for the {deed}", file=what, found=error.strerror) from error
        remedy = f"run the same command again: {kept}"
        if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
            remedy = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network; unset it"
        raise NetworkError(f"the {deed} failed", file=what, found=_first_line(error), remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        remedy = "check HF_ENDPOINT, proxy and login page of your network"
        raise NetworkError(
            "the answer is not one of a hub", file=what, found=_first_line(error), remedy=remedy
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

"""Digests of files, and the lists that promise them: SHA256SUMS, the hub client's tree record, this tool's manifests.

A list is read into {name: Expected}. Names are relative, with "/" between their parts, and never leave the folder.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import Identity, SourceFile, read_json

Progress = Callable[[int], None]

SHA256 = "sha256"
GIT_SHA1 = "git-sha1"
MANIFEST_SCHEMA = "gptoss-convert/manifest/1"
CERTIFICATE_SCHEMA = "gptoss-convert/certificate/1"

# Large enough that the calls cost nothing, small enough that several threads' blocks stay in the processor's cache.
BLOCK = 4 << 20
MAX_SUMS_BYTES = 16 << 20
HUB_TREE_FORMAT = 1

_HEX = {SHA256: re.compile(r"[0-9a-f]{64}"), GIT_SHA1: re.compile(r"[0-9a-f]{40}")}
_SUMS_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9A-Fa-f]{64}) [ *](?P<name>.+)")
_TAG_LINE = re.compile(r"(?P<escaped>\\?)SHA256 \((?P<name>.+)\) = (?P<digest>[0-9A-Fa-f]{64})")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


@dataclass(frozen=True)
class FileDigest:
    """What one file is: its identity when it was read, SHA-256 and, where asked for, git's blob SHA-1, both in hex."""

    identity: Identity
    sha256: str
    git_sha1: str | None = None

    def get(self, algorithm: str) -> str | None:
        """The digest by that algorithm, or None if it was not computed."""
        return self.sha256 if algorithm == SHA256 else self.git_sha1


@dataclass(frozen=True)
class Expected:
    """What a list promises of one file. `size` in bytes, None where the list does not say."""

    size: int | None
    algorithm: str
    digest: str


def hash_file(
    path: Path, *, git_sha1: bool = False, progress: Progress | None = None, stop: threading.Event | None = None
) -> FileDigest:
    """Digest of a whole file that did not change meanwhile (else InputChanged); `progress` gets the bytes done."""
    with SourceFile(path) as file:
        sha256 = hashlib.sha256()
        # Not for security here: git and the hub name small files by it, and nothing stronger is on record for them.
        sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git_sha1 else None
        block = memoryview(bytearray(min(BLOCK, max(file.size, 1))))
        for offset in range(0, file.size, len(block)):
            if stop is not None and stop.is_set():
                raise CancelledError
            part = block[: min(len(block), file.size - offset)]
            file.read_into(offset, part)
            sha256.update(part)
            if sha1 is not None:
                sha1.update(part)
            if progress is not None:
                progress(len(part))
        file.check_unchanged()
        return FileDigest(file.identity, sha256.hexdigest(), sha1.hexdigest() if sha1 is not None else None)


def hash_files(
    paths: Iterable[Path], *, threads: int, git_sha1: frozenset[Path] = frozenset(), progress: Progress | None = None
) -> dict[Path, FileDigest]:
    """Digests of several files at once; the paths in `git_sha1` get that one too. The first error ends all."""
    # Largest first, so that no thread is left alone with a large file at the end.
    queue = sorted(set(paths), key=lambda path: (-_size(path), str(path)))
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        jobs = [
            (path, pool.submit(hash_file, path, git_sha1=path in git_sha1, progress=progress, stop=stop))
            for path in queue
        ]
        try:
            return {path: job.result() for path, job in jobs}
        except BaseException:
            # A thread in the middle of a file of 13 GB would otherwise hold up the error, or Ctrl-C, for long.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def safe_name(name: str, path: object) -> str:
    """A file name out of a list, as relative POSIX name; BadInput if it could point out of the folder."""
    plain = name.removeprefix("./")
    parts = plain.split("/")
    if "\\" in plain or "\0" in plain or re.match(r"[A-Za-z]:", plain) or any(p in ("", ".", "..") for p in parts):
        raise BadInput(
            "a list of digests names a file outside its folder",
            file=path,
            found=name,
            expected='a relative name with "/" and without ".."',
        )
    return plain


def parse_sums(text: str, path: object) -> dict[str, Expected]:
    """The lines of a SHA256SUMS file as GNU `sha256sum` (also with `--tag`) and `shasum` write them."""
    result: dict[str, Expected] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SUMS_LINE.fullmatch(line) or _TAG_LINE.fullmatch(line)
        if match is None:
            raise BadInput("not a line of SHA256SUMS", file=path, found=f"line {number}: {line[:80]}")
        name = match["name"]
        if match["escaped"]:
            name = re.sub(r"\\[\\nr]", lambda found: _ESCAPES[found[0]], name)
        name = safe_name(name, path)
        expected = Expected(None, SHA256, match["digest"].lower())
        if result.setdefault(name, expected) != expected:
            raise BadInput("two different digests for one file", file=path, found=name)
    return result


def read_sums(path: Path) -> dict[str, Expected]:
    """A SHA256SUMS file; BadInput says what is wrong with it."""
    with SourceFile(path) as file:
        if file.size > MAX_SUMS_BYTES:
            raise BadInput("the list of digests is too large", file=path, found=file.size, expected=MAX_SUMS_BYTES)
        content = bytes(file.read(0, file.size))
    try:
        return parse_sums(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise BadInput("the list of digests is not UTF-8 text", file=path, found=error) from error


def format_sums(digests: Mapping[str, str]) -> str:
    """{name: sha256} as text that `sha256sum -c` reads."""
    lines = []
    for name, digest in digests.items():
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "" if escaped == name else "\\"
        lines.append(f"{mark}{digest}  {escaped}\n")
    return "".join(lines)


def read_tree_record(path: Path) -> dict[str, Expected]:
    """The hub client's note on a commit (`trees/<commit>.json`): git-LFS files by SHA-256, others by git's SHA-1."""
    document = read_json(path)
    files = document.get("files")
    if document.get("format_version") != HUB_TREE_FORMAT or not isinstance(files, dict):
        raise BadInput("not a tree record of the hub client", file=path, expected=f"format_version {HUB_TREE_FORMAT}")
    return {safe_name(name, path): _tree_entry(name, fields, path) for name, fields in files.items()}


def _tree_entry(name: str, fields: Any, path: Path) -> Expected:
    if not isinstance(fields, dict):
        raise BadInput("a file's entry in the tree record is not an object", file=path, found=name)
    if fields.get("lfs_sha256") is not None:
        return _expected(fields.get("lfs_size", fields.get("size")), SHA256, fields["lfs_sha256"], name, path)
    return _expected(fields.get("size"), GIT_SHA1, fields.get("blob_id"), name, path)


def _expected(size: Any, algorithm: str, digest: Any, name: str, path: object) -> Expected:
    """An entry of a list, its types and the digest's form checked."""
    if not isinstance(digest, str) or _HEX[algorithm].fullmatch(digest) is None:
        raise BadInput(f"not a {algorithm} digest in hex", file=path, found=f"{name}: {digest}")
    if size is not None and (type(size) is not int or size < 0):
        raise BadInput("not a file size", file=path, found=f"{name}: {size}")
    return Expected(size, algorithm, digest)


def is_manifest(document: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a manifest or a certificate of this tool."""
    return document.get("schema") in (MANIFEST_SCHEMA, CERTIFICATE_SCHEMA)


def manifest_files(document: Mapping[str, Any], path: object) -> dict[str, Expected]:
    """The files that a manifest of this tool lists, or that a certificate of the converter vouches for."""
    schema = document.get("schema")
    holder = document.get("artifact") if schema == CERTIFICATE_SCHEMA else document
    files = holder.get("files") if isinstance(holder, dict) and is_manifest(document) else None
    if not isinstance(files, list):
        expected = f'"schema": "{MANIFEST_SCHEMA}" with "files", or "{CERTIFICATE_SCHEMA}" with "artifact": {{"files"}}'
        raise BadInput("not a manifest of gptoss-convert", file=path, found=schema, expected=expected)
    result: dict[str, Expected] = {}
    for item in files:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise BadInput("a manifest's entry has no name", file=path, found=item)
        name = safe_name(item["name"], path)
        if name in result:
            raise BadInput("a file stands twice in the manifest", file=path, found=name)
        result[name] = _expected(item.get("size"), SHA256, item.get("sha256"), name, path)
    return result


def read_manifest(path: Path) -> dict[str, Expected]:
    """A manifest or certificate of this tool; BadInput says what is wrong with it."""
    return manifest_files(read_json(path), path)

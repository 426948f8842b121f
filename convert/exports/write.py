"""An export as a folder: weights copied and hashed on the way, small files written, a manifest, then its name.

    DIR/gptoss-export.json    platform, what the artifact is, every file with its size and SHA-256
    DIR/SHA256SUMS            the same for sha256sum -c

A copy whose digest is not the one in the artifact's certificate is refused. Killed, it goes on after the files that are whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from gptoss_convert import __version__
from gptoss_convert.convert.exports.archive import Archive
from gptoss_convert.convert.exports.artifact import MANIFEST, SUMS, Artifact, as_json, open_artifact
from gptoss_convert.convert.exports.package import Package, Request
from gptoss_convert.convert.exports.platforms import PLATFORMS
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.protect import files_read, protect_inputs
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.output import Output

SCHEMA = "gptoss-convert/export/1"
BLOCK = 16 << 20


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `document` is its manifest."""

    target: Path
    document: dict[str, Any]
    first_steps: list[str]


def export(
    path: Path, target: Path, platform: str, request: Request, *, overwrite: bool = False, show: ShowProgress
) -> Exported:
    """Write the folder that `platform` deploys."""
    if platform not in PLATFORMS:
        raise UsageError("no such platform", found=platform, expected=", ".join(PLATFORMS))
    request.only(platform, PLATFORMS[platform].options)
    target = target.absolute()
    with Output(target, folder=True, overwrite=overwrite, marker=MANIFEST) as output, open_artifact(path) as artifact:
        protect_inputs(target, [path, *files_read(artifact.source), *artifact.files.values()])
        _require_outside(target, path)
        package = PLATFORMS[platform].package(artifact, request)
        _require_listable(package, path)
        digests = _write(package, artifact, output, platform, show)
        document = _manifest(package, artifact, platform, digests)
        output.write_small(MANIFEST, as_json(document))
        listed = {**{name: found["sha256"] for name, found in digests.items()}, MANIFEST: _sha256(as_json(document))}
        output.write_small(SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items())).encode())
        output.publish()
    return Exported(target, document, package.first_steps)


def _require_outside(target: Path, path: Path) -> None:
    """Within the artifact's folder an export would be a part of the artifact, and its unfinished files of the next one."""
    if path.is_dir() and Path(os.path.realpath(target)).is_relative_to(path.resolve()):
        raise UsageError(
            "the export would lie within the artifact", found=target, expected=f"a folder outside {path}",
            remedy="choose another --out",
        )  # fmt: skip


def _require_listable(package: Package, path: Path) -> None:
    """A name that SHA256SUMS or JSON cannot hold on one line, or that is not UTF-8, is refused."""
    for name, data in package.files.items():
        for listed in (name, *(data.files if isinstance(data, Archive) else ())):
            if not listed.isprintable():
                raise BadInput(
                    "a file's name cannot stand in a list of digests", file=path, found=listed.encode("unicode_escape").decode(),
                    expected="printable characters", remedy="rename or remove the file",
                )  # fmt: skip


def _write(
    package: Package, artifact: Artifact, output: Output, platform: str, show: ShowProgress
) -> dict[str, dict[str, Any]]:
    streamed = {name: data for name, data in package.files.items() if not isinstance(data, bytes)}
    sizes = {name: data.size() if isinstance(data, Archive) else data.stat().st_size for name, data in streamed.items()}
    whole = {record.get("file"): record for record in output.open(_digest(package, platform), list(sizes.items()))}
    found: dict[str, dict[str, Any]] = {}
    with show("export", sum(sizes.values())) as advance:
        for name, data in streamed.items():
            done = whole.get(name)
            if done is None or _sha256_of(_blocks_written(output, name, sizes[name])) != done["sha256"]:
                hasher, at = hashlib.sha256(), 0
                for block in _content(data, sizes[name], artifact):
                    output.write(name, at, block)
                    hasher.update(block)
                    at += len(block)
                    advance(len(block))
                done = {"file": name, "sha256": hasher.hexdigest()}
                if isinstance(data, Path):
                    _require_digest(artifact, data, done["sha256"])
                output.record(done)
            else:
                advance(sizes[name])
            found[name] = {"bytes": sizes[name], "sha256": done["sha256"]}
    for name, small in package.files.items():
        if isinstance(small, bytes):
            output.write_small(name, small, executable=name in package.executable)
            found[name] = {"bytes": len(small), "sha256": _sha256(small)}
    return found


def _content(data: Path | Archive, size: int, artifact: Artifact) -> Iterator[bytes]:
    """What is written, block by block. Of an archive, each file on the way must be what the certificate says."""

    def read(path: Path, size: int) -> Iterator[bytes]:
        hasher = hashlib.sha256()
        for _, block in _blocks(path, size):
            hasher.update(block)
            yield block
        _require_digest(artifact, path, hasher.hexdigest())

    return data.blocks(read) if isinstance(data, Archive) else (block for _, block in _blocks(data, size))


def _require_digest(artifact: Artifact, path: Path, sha256: str) -> None:
    name = next((name for name, place in artifact.files.items() if place == path), None)
    if name is not None:
        artifact.require_digest(name, sha256)


def _manifest(
    package: Package, artifact: Artifact, platform: str, digests: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    made = artifact.certificate
    return {
        "schema": SCHEMA,
        "tool": {"name": "gptoss-convert", "version": __version__},
        "platform": platform,
        "artifact": {
            "name": artifact.path.resolve().name, "kind": artifact.kind, "model": artifact.model,
            "weight_bytes": artifact.weight_bytes, "certificate": artifact.certificate_name,
            "official_source": None if made is None else made["source"]["official_weights"],
            "lost": None if made is None else made["lost"],
        },
        "notes": package.notes,
        "first_steps": package.first_steps,
        "files": [{"name": name, **found} for name, found in sorted(digests.items())],
    }  # fmt: skip


def _digest(package: Package, platform: str) -> str:
    hasher = blake3.blake3(repr((platform, __version__)).encode())
    for name, data in sorted(package.files.items()):
        members = sorted(data.files.items()) if isinstance(data, Archive) else [(None, data)]
        hasher.update(repr((name, [(member, _identity(content)) for member, content in members])).encode())
    return hasher.hexdigest()


def _identity(data: bytes | Path) -> object:
    return blake3.blake3(data).hexdigest() if isinstance(data, bytes) else (str(data), data.stat().st_mtime_ns)


def _blocks(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    with SourceFile(path) as file:
        for at in range(0, size, BLOCK):
            yield at, bytes(file.read(at, min(BLOCK, size - at)))
        file.check_unchanged()


def _blocks_written(output: Output, name: str, size: int) -> Iterator[bytes]:
    for at in range(0, size, BLOCK):
        yield output.read(name, at, min(BLOCK, size - at))


def _sha256_of(blocks: Iterator[bytes]) -> str:
    hasher = hashlib.sha256()
    for block in blocks:
        hasher.update(block)
    return hasher.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

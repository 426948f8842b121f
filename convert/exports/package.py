"""What an export consists of, what may be asked of one, and the words in which an artifact is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.convert.exports.archive import Archive
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.source import Source
from gptoss_convert.errors import Refused, UsageError

if TYPE_CHECKING:
    from gptoss_convert.convert.conversion import Options


@dataclass(frozen=True)
class Request:
    """What was asked for; None is the platform's own default. Each platform says which of these it knows."""

    name: str | None = None  # of the deployment, or of the repository
    instance: str | None = None  # machine type
    image: str | None = None  # container
    engine: str | None = None  # which of a platform's servers or forms
    bucket: str | None = None  # s3://bucket/prefix
    role: str | None = None  # ARN
    region: str | None = None
    context: int | None = None  # tokens
    archive: bool = False
    base_model: str | None = None  # hub id of what the artifact was made from
    quality: Path | None = None  # a document of compare --json

    def only(self, platform: str, known: Collection[str]) -> None:
        """UsageError for what this platform has no use for, and for an empty value: it would pass for none given."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        for name in given:
            if name not in known:
                raise UsageError(
                    f"--{name.replace('_', '-')} means nothing for --for {platform}", found=str(getattr(self, name)),
                    expected=", ".join(f"--{n.replace('_', '-')}" for n in sorted(known)) or "no further option",
                )  # fmt: skip
            if getattr(self, name) == "":
                raise UsageError(
                    f"--{name.replace('_', '-')} is empty", found="''", expected="a value",
                    remedy="leave the option out for the platform's own",
                )  # fmt: skip


@dataclass
class Package:
    """files: name, with folders → its bytes, the path of a file to be copied, or an archive to be written.

    first_steps: what the person does with it.
    """

    files: dict[str, bytes | Path | Archive] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    first_steps: list[str] = field(default_factory=list)
    executable: set[str] = field(default_factory=set)

    def copy(self, artifact: Artifact, into: str = "", without: Collection[str] = ()) -> None:
        """All files of an artifact, into a folder of the package."""
        for name, path in artifact.files.items():
            if name not in without:
                self.files[f"{into}{name}"] = path


Export = Callable[[Artifact, Request], Package]
Foresee = Callable[[str, Source, "Options", Request], None]
"""The kind that a source becomes by a conversion → Refused or UsageError where the export of the result would be refused."""


@dataclass(frozen=True)
class Platform:
    """What turns an artifact and a request into a package, the request's fields that it knows, the kinds of artifact it takes.

    named: UsageError for what is no name there.
    """

    package: Export
    options: frozenset[str]
    kinds: tuple[str, ...]
    named: Callable[[str], object] = str
    foresee: Foresee | None = None


def require_kind(artifact: Artifact, platform: str, served: Collection[str], remedy: str, why: str = "") -> None:
    """Refuse a kind that a platform cannot serve; remedy: the command that makes one that it can."""
    if artifact.kind not in served:
        raise Refused(
            f"{platform} cannot serve this artifact" + (f": {why}" if why else ""), file=artifact.path, found=artifact.kind,
            expected=" or ".join(served), remedy=remedy,
        )  # fmt: skip


def require_name(name: str, pattern: str, what: str, most: int) -> str:
    """A name that the platform takes, or UsageError."""
    if len(name) > most or not re.fullmatch(pattern, name, re.ASCII):
        raise UsageError(f"not a name for {what}", found=name, expected=f"{pattern}, at most {most} characters")
    return name

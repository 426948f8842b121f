"""The pinned official digests: what OpenAI (and a few well-known republishers) released, and how sure each digest is.

A pin is compared, never guessed: a digest known only by its first digits is a `Prefix`, which can name a file and never
verify it, and a file whose digest nobody has published has a pin without one.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gptoss_convert.errors import BadInput

SCHEMA = "gptoss-convert/official/1"
OPENAI = "OpenAI"

# Read by people, not by loaders: their absence does not make a download incomplete.
DOCUMENTS = frozenset({".gitattributes", "LICENSE", "README.md", "USAGE_POLICY"})
# Of these, the ones that are reworded from one revision to the next: another text is unknown, not wrong.
REWORDED = frozenset({".gitattributes", "README.md"})
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")
LAYOUTS = {"": "HF layout", "original": "original/", "metal": "metal/"}


@dataclass(frozen=True)
class Pin:
    """One file of one release. `revision` says where it was seen; `current` is false for an older version of it."""

    repo: str
    name: str
    publisher: str
    revision: str
    current: bool
    size: int | None
    sha256: str | None
    grade: str | None
    evidence: str
    header_sha256: str | None = None
    header_published: bool = False

    @property
    def layout(self) -> str:
        """The layout this file belongs to: "" (repository root), "original" or "metal"."""
        return layout_of(self.name)

    @property
    def is_weights(self) -> bool:
        """Whether the file holds tensors."""
        return self.name.endswith(WEIGHT_SUFFIXES)

    @property
    def authority(self) -> str:
        """The sentence under which a file that equals this pin is reported."""
        if self.publisher != OPENAI:
            return (
                f"published by {self.publisher}: {self.repo}"
                if self.repo != self.publisher
                else f"published by {self.repo}"
            )
        if self.current:
            return f"official {self.repo} @{self.revision[:8]}"
        return f"official, older revision, {self.repo} {self.revision}"


@dataclass(frozen=True)
class Prefix:
    """The first hex digits of a digest: enough to recognise a file, not to verify it."""

    name: str
    size: int | None
    digits: str
    seen: str


@dataclass(frozen=True)
class Repo:
    """One published repository: its pinned revision, the ones before it that carry the same weights, and its files."""

    repo: str
    publisher: str
    revision: str
    earlier: tuple[str, ...]
    files: Mapping[str, Pin]
    older: tuple[Pin, ...]
    prefixes: tuple[Prefix, ...]

    def pins(self, name: str) -> tuple[Pin, ...]:
        """Every known version of a file, the current one first."""
        current = self.files.get(name)
        return (*((current,) if current else ()), *(pin for pin in self.older if pin.name == name))

    def knows_revision(self, revision: str | None) -> bool:
        """Whether the pins were taken at this commit; None (not told) counts as known."""
        return revision is None or revision in (self.revision, *self.earlier)


@dataclass(frozen=True)
class Candidate:
    """A repository that a folder could be, `prefix` being the folder's place in it; matches counts sizes that agree."""

    repo: str
    prefix: str
    matches: int


@dataclass(frozen=True)
class Table:
    """All pins. The package's own table is `load()`; another can be given to `verify` and `fetch`."""

    repos: Mapping[str, Repo]
    other: tuple[Pin, ...] = ()

    def by_digest(self, sha256: str) -> tuple[Pin, ...]:
        """Every pin with this digest, OpenAI's and current ones first."""
        found = [pin for pin in self._all() if pin.sha256 == sha256]
        return tuple(sorted(found, key=lambda pin: (pin.publisher != OPENAI, not pin.current)))

    def by_size(self, size: int) -> tuple[Pin, ...]:
        """Every pin of a file of this size."""
        return tuple(pin for pin in self._all() if pin.size == size)

    def recognise(self, files: Mapping[str, int]) -> list[Candidate]:
        """Which repositories these files (name -> size) could be, the likeliest first.

        It takes one file of weights, or two other files, whose name and size no other repository shares.
        """
        found = []
        for repo in self.repos.values():
            for prefix in sorted({name.rpartition("/")[0] for name in repo.files}):
                start = f"{prefix}/" if prefix else ""
                matches = [name for name, size in files.items() if self._matches(repo, start + name, size)]
                telling = [name for name in matches if self._is_distinctive(repo, start + name)]
                if len(telling) >= 2 or any(name.endswith(WEIGHT_SUFFIXES) for name in telling):
                    found.append(Candidate(repo.repo, start, len(matches)))
        return sorted(found, key=lambda candidate: -candidate.matches)

    def _all(self) -> list[Pin]:
        return [pin for repo in self.repos.values() for pin in (*repo.files.values(), *repo.older)] + list(self.other)

    @staticmethod
    def _matches(repo: Repo, name: str, size: int) -> bool:
        return any(pin.size == size for pin in repo.pins(name))

    def _is_distinctive(self, repo: Repo, name: str) -> bool:
        """Whether no other repository has a file of this name and one of its sizes."""
        if name in DOCUMENTS:
            return False
        sizes = {pin.size for pin in repo.pins(name)}
        others = (other for other in self.repos.values() if other.repo != repo.repo)
        return not any(pin.size in sizes for other in others for pin in other.pins(name))


def layout_of(name: str) -> str:
    """The layout that a repository's file belongs to: its top folder, "" for the root."""
    return name.partition("/")[0] if "/" in name else ""


def layout_title(layout: str, repo: Repo) -> str:
    """A layout's name for people."""
    if not layout and repo.publisher != OPENAI:
        return "all files"
    return LAYOUTS.get(layout, f"{layout}/")


@cache
def load() -> Table:
    """The table that comes with the package."""
    text = importlib.resources.files("gptoss_convert").joinpath("data/official-digests.json").read_text("utf-8")
    return table_from(json.loads(text))


def table_from(document: Mapping[str, Any]) -> Table:
    """A table from a document of the schema `gptoss-convert/official/1`."""
    if document.get("schema") != SCHEMA:
        raise BadInput("not a table of official digests", found=document.get("schema"), expected=SCHEMA)
    repos = {name: _repo(name, fields) for name, fields in document["repos"].items()}
    other = tuple(_other_pin(item) for item in document.get("other", ()))
    return Table(repos, other)


def _repo(name: str, fields: Mapping[str, Any]) -> Repo:
    publisher, revision = fields["publisher"], fields["revision"]
    files = {
        file: _pin(item, repo=name, name=file, publisher=publisher, revision=revision)
        for file, item in fields["files"].items()
    }
    older = tuple(
        _pin(item, repo=name, name=item["name"], publisher=publisher, revision=item["seen"], current=False)
        for item in fields.get("older", ())
    )
    prefixes = tuple(
        Prefix(item["name"], item["size"], item["sha256_prefix"], item["seen"]) for item in fields.get("prefixes", ())
    )
    return Repo(name, publisher, revision, tuple(fields["earlier_revisions"]), files, older, prefixes)


def _other_pin(item: Mapping[str, Any]) -> Pin:
    """A file that was published outside the hub's repositories."""
    return _pin(item, repo=item["published_by"], name=item["name"], publisher=item["published_by"], revision="")


def _pin(item: Mapping[str, Any], *, repo: str, name: str, publisher: str, revision: str, current: bool = True) -> Pin:
    return Pin(
        repo=repo,
        name=name,
        publisher=publisher,
        revision=revision,
        current=current,
        size=item["size"],
        sha256=item["sha256"],
        grade=item.get("grade"),
        evidence=item["evidence"],
        header_sha256=item.get("header_sha256"),
        header_published=item.get("header_grade") == "published",
    )


def official_name_of(sha256: str) -> str | None:
    """What a digest is the official digest of, for example "chat_template.jinja of openai/gpt-oss-20b", or None."""
    pins = [pin for pin in load().by_digest(sha256) if pin.publisher == OPENAI]
    if not pins:
        return None
    pin = pins[0]
    repos = dict.fromkeys(other.repo for other in pins if (other.name, other.current) == (pin.name, pin.current))
    when = "" if pin.current else f", older revision ({pin.revision})"
    return f"{pin.name} of {' and '.join(repos)}{when}"

"""The answer of `verify`: a result for every file, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from gptoss_convert.convert import official
from gptoss_convert.errors import ExitCode

SCHEMA = "gptoss-convert/verify/1"

MODEL_SUFFIXES = (*official.WEIGHT_SUFFIXES, ".json", ".jinja", ".tiktoken", ".model", ".onnx")
# What programs that load a model folder may pick up by itself; a stray one can change what the model does.
LOADED_SUFFIXES = (*MODEL_SUFFIXES, ".py", ".so", ".pt", ".pth", ".pkl", ".ckpt", ".h5")


class Status(StrEnum):
    """The four answers about one file."""

    VERIFIED = "verified"
    MISMATCHED = "mismatched"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class FileResult:
    """The answer about one file. `stage` is the last check that was made: "size", "header" or "digest"."""

    name: str
    size: int | None
    status: Status
    reason: str
    stage: str
    authority: str | None = None
    official: bool = False
    grade: str | None = None
    evidence: str | None = None
    algorithm: str | None = None
    expected: str | None = None
    found: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Layout:
    """One layout of the recognised repository: "complete", "incomplete" or "not downloaded"."""

    title: str
    state: str
    absent: tuple[str, ...]
    absent_documents: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All answers about a source, and what follows from them."""

    root: str
    repo: str | None
    revision: str | None
    quick: bool
    results: tuple[FileResult, ...]
    layouts: tuple[Layout, ...] = ()
    records: tuple[Mapping[str, object], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many files there are of each status."""
        return {status.value: sum(result.status is status for result in self.results) for status in Status}

    @property
    def official(self) -> bool:
        """Whether all that a loader would take, in layouts that are complete, is official by full digest.

        Documents and other stray files do not count; a stray file that a loader might take does.
        """
        at_hand = [layout for layout in self.layouts if layout.state != "not downloaded"]
        if not at_hand or self.counts[Status.MISMATCHED] or self.counts[Status.MISSING]:
            return False
        loaded = [result for result in self.results if result.name.endswith(LOADED_SUFFIXES)]
        return all(layout.state == "complete" for layout in at_hand) and all(result.official for result in loaded)

    @property
    def answer(self) -> str:
        """One sentence: is this the official model?"""
        counts, repo = self.counts, self.repo or "a pinned model"
        faults = [f"{counts[status]} {status}" for status in (Status.MISMATCHED, Status.MISSING) if counts[status]]
        stray = f"; {counts[Status.UNKNOWN]} unknown besides" if counts[Status.UNKNOWN] else ""
        if faults:
            return f"no: {' and '.join(faults)}"
        if self.quick:
            return "not established: sizes and headers agree, contents were not hashed"
        if self.official:
            titles = ", ".join(layout.title for layout in self.layouts if layout.state == "complete")
            return f"yes: {repo}, {titles}, by digest of every file{stray}"
        if counts[Status.VERIFIED] and all(r.official for r in self.results if r.status is Status.VERIFIED):
            return f"only in part: {counts[Status.VERIFIED]} official{stray}"
        if counts[Status.VERIFIED]:
            return f"not by official digests: {counts[Status.VERIFIED]} verified, on the word named with each{stray}"
        return "not established: no authority knows these files"

    def exit_code(self, allow_unknown: Sequence[str] = ()) -> ExitCode:
        """MISMATCH, else UNKNOWN, else OK. Unknown files that fit a pattern are allowed beside verified ones."""
        if self.counts[Status.MISMATCHED] or self.counts[Status.MISSING]:
            return ExitCode.MISMATCH
        unknown = [result.name for result in self.results if result.status is Status.UNKNOWN]
        refused = [name for name in unknown if not any(fnmatchcase(name, pattern) for pattern in allow_unknown)]
        return ExitCode.UNKNOWN if refused or not self.counts[Status.VERIFIED] else ExitCode.OK

    def as_dict(self, allow_unknown: Sequence[str] = ()) -> dict[str, Any]:
        """The report as it appears in `--json` output."""
        return {
            "schema": SCHEMA,
            "root": self.root,
            "repo": self.repo,
            "revision": self.revision,
            "official": self.official,
            "answer": self.answer,
            "exit_code": int(self.exit_code(allow_unknown)),
            "quick": self.quick,
            "counts": self.counts,
            "layouts": [asdict(layout) for layout in self.layouts],
            "records": [dict(record) for record in self.records],
            "notes": list(self.notes),
            "files": [asdict(result) for result in self.results],
        }

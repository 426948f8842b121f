"""Whether files are what somebody promised: verified, mismatched, missing or unknown, and on whose word.

Several authorities may speak about one file, in three ranks. The highest rank that knows the file decides; within a
rank all must agree; what a lower rank objects is a note.

1. the official pins (`official`), and the manifest or SHA256SUMS that the user names: his own word;
2. a manifest, certificate or SHA256SUMS found beside the files: shows corruption, but whoever can change the files can
   change the list;
3. the hub client's tree record: the same, and for small files only git's SHA-1.

A file that nobody knows is unknown and never counts as verified; so is a file whose contents were not hashed. A list
itself needs no word while it is the best authority there is; one found beside the files is a file like any other as soon
as the pins or a list of the user's are in force. The pins
bind a folder that is, says it is, or by names and sizes looks like one of the pinned repositories; anywhere else they
only recognise files by digest. Another text of README.md is unknown rather than wrong: it changes between revisions. So
do other small files of a snapshot whose commit is newer than the pins; the weights are bound at every commit.

Missing is what an authority promises and the source lacks: all files of a list; of a pinned repository, the files of
the layouts at hand, without documents such as LICENSE; and every shard that an index names. A tree record promises
nothing, because a partial download is no fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.convert import official
from gptoss_convert.convert.official import Table
from gptoss_convert.convert.verify_complete import completeness
from gptoss_convert.convert.verify_judge import judge
from gptoss_convert.convert.verify_report import FileResult, Report, Status
from gptoss_convert.convert.verify_sources import Subject, Voice, survey
from gptoss_convert.convert.verify_unhashed import before_hashing
from gptoss_convert.errors import Refused, TargetExists
from gptoss_convert.formats.digests import GIT_SHA1, MANIFEST_SCHEMA, FileDigest, Progress, hash_files
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.output import write_atomically
from gptoss_convert.formats.tree import TreeFile, source_root

DEFAULT_THREADS = min(8, os.cpu_count() or 1)


def verify(
    source: Path,
    *,
    repo: str | None = None,
    revision: str | None = None,
    manifest: Path | None = None,
    sums: Path | None = None,
    require_official: bool = False,
    threads: int = DEFAULT_THREADS,
    quick: bool = False,
    progress: Progress | None = None,
    table: Table | None = None,
    known: Mapping[Path, FileDigest] | None = None,
) -> Report:
    """Check every file of a source; nothing is written and no network is used.

    repo: the repository that the source claims to be; "none" for a model that only resembles one; None: look.
    revision: the commit, where the caller knows it. manifest, sums: the user's own lists. require_official: only
    official pins verify. quick: sizes and headers only; then nothing is ever verified. progress: gets every file's
    bytes once. known: digests taken just now; used for the files that are still exactly those.
    """
    subject = survey(
        source_root(source), repo=repo, revision=revision, lists=(manifest, sums), table=table or official.load()
    )
    idle = frozenset() if require_official else subject.idle_lists
    results = _judged(subject, idle, quick, threads, progress or (lambda _: None), known or {})
    layouts, absent = completeness(subject)
    for result in absent:
        results.setdefault(result.name, result)
    if require_official:
        results = {name: _official_only(result) for name, result in results.items()}
    return Report(
        root=str(source),
        repo=subject.repo_id,
        revision=subject.revision or (subject.repo.revision if subject.repo else None),
        quick=quick,
        results=tuple(results[name] for name in sorted(results)),
        layouts=tuple(layouts),
        records=tuple(record.as_dict() for record in subject.records),
        notes=tuple(subject.notes),
    )


def _judged(
    subject: Subject,
    idle: frozenset[str],
    quick: bool,
    threads: int,
    progress: Progress,
    known: Mapping[Path, FileDigest],
) -> dict[str, FileResult]:
    """The answer about every file that is there; of the lists in `idle` only if somebody speaks about them."""
    voices = {file.name: subject.voices(file) for file in subject.files}
    early: dict[str, FileResult] = {}
    for file in subject.files:
        result = before_hashing(file, voices[file.name], subject.table, quick)
        if result is not None:
            early[file.name] = result
            progress(file.size)
    digests = _digests([file for file in subject.files if file.name not in early], voices, threads, progress, known)
    return {
        file.name: early.get(file.name) or judge(file, digests[file.path], voices[file.name], subject.table)
        for file in subject.files
        if file.name not in idle or voices[file.name]
    }


def _digests(
    files: Sequence[TreeFile],
    voices: Mapping[str, Sequence[Voice]],
    threads: int,
    progress: Progress,
    known: Mapping[Path, FileDigest],
) -> dict[Path, FileDigest]:
    """Digests of the files, those of `known` taken over where the file is still the same."""
    git = {
        file.path
        for file in files
        if any(claim.algorithm == GIT_SHA1 for voice in voices[file.name] for claim in voice.claims)
    }
    result: dict[Path, FileDigest] = {}
    for file in files:
        before = known.get(file.path)
        if before is None or (file.path in git and before.git_sha1 is None):
            continue
        with SourceFile(file.path) as opened:
            if opened.identity == before.identity:
                result[file.path] = before
                progress(file.size)
    todo = [file.path for file in files if file.path not in result]
    return result | hash_files(todo, threads=threads, git_sha1=frozenset(git), progress=progress)


def _official_only(result: FileResult) -> FileResult:
    """For who asks whether a model is the official one: another's word leaves a file unknown."""
    if result.status is not Status.VERIFIED or result.official:
        return result
    reason = f"agrees with {result.authority}, which is no official pin"
    return replace(result, status=Status.UNKNOWN, reason=reason)


def manifest_document(report: Report) -> dict[str, Any]:
    """A manifest of what was found, to verify against later; with each file the word on which it was verified."""
    faults = [r.name for r in report.results if r.status in (Status.MISMATCHED, Status.MISSING) or r.sha256 is None]
    if faults:
        raise Refused(
            "no manifest is written: files are mismatched, missing or were not hashed",
            file=report.root,
            found=", ".join(faults[:5]),
            remedy="mend these files first; a manifest would promise them as they are now",
        )
    return {
        "schema": MANIFEST_SCHEMA,
        "repo": report.repo,
        "revision": report.revision,
        "files": [
            {
                "name": result.name,
                "size": result.size,
                "sha256": result.sha256,
                "verified_by": result.authority if result.status is Status.VERIFIED else None,
            }
            for result in report.results
        ],
    }


def write_manifest(report: Report, path: Path) -> None:
    """Write the manifest of a report: all of it or nothing, and never over an existing file."""
    text = json.dumps(manifest_document(report), indent=1, ensure_ascii=True) + "\n"
    if path.exists():
        raise TargetExists("the manifest's name is taken", file=path, remedy="remove it or choose another name")
    write_atomically(path, text.encode())

"""Whether files are what somebody promised: verified, mismatched, missing or unknown, and on whose word.

Several authorities may speak about one file, in three ranks. The highest rank that knows the file decides; within a
rank all must agree; what a lower rank objects is a note.

1. the official pins (`official`), and the manifest or SHA256SUMS that the user names: his own word;
2. a manifest, certificate or SHA256SUMS found beside the files: shows corruption, but whoever can change the files can
   change the list;
3. the hub client's tree record: the same, and for small files only git's SHA-1.

A file that nobody knows is unknown and never counts as verified; so is a file whose contents were not hashed. The pins
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gptoss_convert.convert import official
from gptoss_convert.convert.official import OPENAI, Pin, Repo, Table
from gptoss_convert.errors import BadInput, CannotWrite, ExitCode, Refused, TargetExists
from gptoss_convert.formats.digests import (
    GIT_SHA1,
    MANIFEST_SCHEMA,
    SHA256,
    Expected,
    FileDigest,
    Progress,
    hash_files,
    is_manifest,
    manifest_files,
    read_manifest,
    read_sums,
    read_tree_record,
)
from gptoss_convert.formats.files import SourceFile, read_json
from gptoss_convert.formats.safetensors import read_header
from gptoss_convert.formats.sniff import HEAD_BYTES, Kind, identify
from gptoss_convert.formats.tree import HubPlace, TreeFile, hub_place, source_root, walk

SCHEMA = "gptoss-convert/verify/1"
NO_REPO = "none"
DEFAULT_THREADS = min(8, os.cpu_count() or 1)

RANK_WORD, RANK_FOUND, RANK_HUB = 1, 2, 3
TRUST = {
    RANK_WORD: "named by you: as trustworthy as the place you have it from",
    RANK_FOUND: "found beside the files and not signed: shows corruption, proves no origin",
    RANK_HUB: "the hub client's local note, not signed: shows corruption, proves no origin",
}
SUMS_NAMES = ("SHA256SUMS", "SHA256SUMS.txt")
MANIFEST_ENDINGS = ("manifest.json", "certificate.json")
TAIL_BYTES = 4096

# Content that stands where a file should be; never a file of a model that ends in one of these suffixes.
STAND_INS = frozenset({Kind.EMPTY, Kind.ZEROS, Kind.LFS_POINTER, Kind.HTML, Kind.XML})
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


@dataclass(frozen=True)
class _Claim:
    """One version of a file that an authority accepts. Without a digest it can only be contradicted, by its size."""

    authority: str
    size: int | None
    algorithm: str = SHA256
    digest: str | None = None
    prefix: str | None = None
    pin: Pin | None = None

    def fits(self, size: int) -> bool:
        return self.size is None or self.size == size


@dataclass(frozen=True)
class _Voice:
    """What one authority says about one file: any of the claims will do. A yielding voice doubts, but never refutes."""

    rank: int
    claims: tuple[_Claim, ...]
    yielding: bool = False


@dataclass(frozen=True)
class _Record:
    """A list of digests, its names relative to the source. `path` is its own file."""

    title: str
    rank: int
    path: Path
    files: Mapping[str, tuple[_Claim, ...]]

    @property
    def promises(self) -> bool:
        return self.rank != RANK_HUB


@dataclass(frozen=True)
class _Source:
    """What is verified, and everything that is known about it before the first byte is hashed."""

    root: Path
    files: tuple[TreeFile, ...]
    single: bool
    table: Table
    repo: Repo | None
    repo_id: str | None
    revision: str | None
    prefix: str
    records: tuple[_Record, ...]
    idle_records: frozenset[Path]
    notes: list[str] = field(default_factory=list)

    def voices(self, file: TreeFile) -> list[_Voice]:
        """Who says what about this file by its name."""
        result = []
        if self.repo is not None:
            names = [self.prefix + file.name]
            if self.single and not self.repo.pins(names[0]):
                names = [name for name in self.repo.files if name.rpartition("/")[2] == file.name]
            if voice := self._official(names):
                result.append(voice)
        result += [_Voice(record.rank, record.files[file.name]) for record in self.records if file.name in record.files]
        return result

    def _official(self, names: Iterable[str]) -> _Voice | None:
        assert self.repo is not None
        pins = [pin for name in names for pin in self.repo.pins(name)]
        if not pins:
            return None
        claims = [_pin_claim(pin) for pin in pins]
        for prefix in self.repo.prefixes:
            if prefix.name in {pin.name for pin in pins}:
                claims.append(_Claim(f"{self.repo.repo}, {prefix.seen}", prefix.size, prefix=prefix.digits))
        newer = not self.repo.knows_revision(self.revision) and not any(pin.is_weights for pin in pins)
        return _Voice(RANK_WORD, tuple(claims), yielding=newer or all(pin.name in official.REWORDED for pin in pins))


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
    lists = (manifest, sums)
    look = _look(source_root(source), repo=repo, revision=revision, lists=lists, table=table or official.load())
    tell = progress or (lambda _: None)
    voices = {file.name: look.voices(file) for file in look.files}
    early: dict[str, FileResult] = {}
    for file in look.files:
        result = _before_hashing(file, voices[file.name], look, quick)
        if result is not None:
            early[file.name] = result
            tell(file.size)
    digests = _digests([file for file in look.files if file.name not in early], voices, threads, tell, known or {})
    results = {
        file.name: early.get(file.name) or _judge(file, digests[file.path], voices[file.name], look)
        for file in look.files
        if file.path.resolve() not in look.idle_records or voices[file.name]
    }
    layouts, absent = _completeness(look)
    for result in absent:
        results.setdefault(result.name, result)
    if require_official:
        results = {name: _official_only(result) for name, result in results.items()}
    return Report(
        root=str(source),
        repo=look.repo_id,
        revision=look.revision or (look.repo.revision if look.repo else None),
        quick=quick,
        results=tuple(results[name] for name in sorted(results)),
        layouts=tuple(layouts),
        records=tuple(
            {"title": record.title, "path": str(record.path), "files": len(record.files), "trust": TRUST[record.rank]}
            for record in look.records
        ),
        notes=tuple(look.notes),
    )


# --- before the first byte is hashed ---------------------------------------------------------------------------------


def _look(
    root: Path, *, repo: str | None, revision: str | None, lists: tuple[Path | None, Path | None], table: Table
) -> _Source:
    """Find the files, the repository they claim to be from, and the lists of digests."""
    files = tuple(walk(root))
    if not files:
        raise BadInput("the folder holds no files", file=root)
    single = root.is_file()
    place = hub_place(root.parent if single else root)
    notes: list[str] = []
    prefix = place.prefix if place else ""
    repo_id = repo or (place.repo if place else None)
    sizes = {file.name: file.size for file in files}
    candidates = [c for c in ([] if single else table.recognise(sizes)) if repo_id in (None, c.repo)]
    if candidates and place is None:
        prefix = candidates[0].prefix
        if repo_id is None:
            repo_id = candidates[0].repo
            notes.append(f"taken for {repo_id} by names and sizes; if it only resembles it, say --repo {NO_REPO}")
    pinned = table.repos.get(repo_id) if repo_id else None
    if repo_id and pinned is None and repo_id != NO_REPO:
        notes.append(f"no digests of {repo_id} are pinned; official files are still recognised by digest")
    named = _named_records(*lists)
    found = _found_records(_list_files(root, files, single), notes)
    idle = {record.path.resolve() for record in named + found}
    records = named + ([] if named else found) + _tree_records(root, place, notes)
    return _Source(
        root=root,
        files=files,
        single=single,
        table=table,
        repo=pinned,
        repo_id=None if repo_id == NO_REPO else repo_id,
        revision=revision or (place.revision if place else None),
        prefix=prefix,
        records=tuple(records),
        idle_records=frozenset(idle),
        notes=notes,
    )


def _named_records(manifest: Path | None, sums: Path | None) -> list[_Record]:
    """The lists that the user names; one that cannot be read is an error."""
    named = []
    if manifest is not None:
        named.append(_record("manifest", RANK_WORD, manifest, read_manifest(manifest)))
    if sums is not None:
        named.append(_record("SHA256SUMS", RANK_WORD, sums, read_sums(sums)))
    return named


def _found_records(paths: Iterable[Path], notes: list[str]) -> list[_Record]:
    """Lists found beside the files; one that cannot be read is an ordinary file, and noted."""
    found = []
    for path in paths:
        try:
            if path.suffix == ".json":
                document = read_json(path)
                if is_manifest(document):
                    found.append(_record("manifest", RANK_FOUND, path, manifest_files(document, path)))
            else:
                found.append(_record("SHA256SUMS", RANK_FOUND, path, read_sums(path)))
        except BadInput as error:
            notes.append(f"not used as a list of digests: {path.name}: {error.what}")
    return found


def _list_files(root: Path, files: Sequence[TreeFile], single: bool) -> list[Path]:
    """The files that by their names are lists of digests."""
    if single:
        beside = [Path(f"{root}.{ending}") for ending in (*MANIFEST_ENDINGS, "sha256")]
        beside += [root.parent / name for name in ("gptoss-certificate.json", "gptoss-manifest.json", *SUMS_NAMES)]
        return [path for path in beside if path.is_file() and path.resolve() != root.resolve()]
    top = [file for file in files if "/" not in file.name]
    return [file.path for file in top if file.name in SUMS_NAMES or file.name.endswith(MANIFEST_ENDINGS)]


def _record(title: str, rank: int, path: Path, files: Mapping[str, Expected]) -> _Record:
    claims = {
        name: (_Claim(f"{title} {path.name}", expected.size, expected.algorithm, expected.digest),)
        for name, expected in files.items()
    }
    return _Record(title, rank, path, claims)


def _tree_records(root: Path, place: HubPlace | None, notes: list[str]) -> list[_Record]:
    """The hub client's tree records of this source; of several commits in one folder, any may be the right one."""
    if place is not None:
        paths, prefix = [place.repo_folder / "trees" / f"{place.revision}.json"], place.prefix
    else:
        paths, prefix = sorted((root / ".cache" / "huggingface" / "trees").glob("*.json")), ""
    merged: dict[str, tuple[_Claim, ...]] = {}
    for path in paths:
        try:
            files = read_tree_record(path) if path.is_file() else {}
        except BadInput as error:
            notes.append(f"tree record of the hub client not used: {path.name}: {error.what}")
            continue
        for name, expected in files.items():
            if name.startswith(prefix):
                claim = _Claim(f"hub tree record @{path.stem[:8]}", expected.size, expected.algorithm, expected.digest)
                merged[name.removeprefix(prefix)] = (*merged.get(name.removeprefix(prefix), ()), claim)
    return [_Record("hub tree record", RANK_HUB, paths[-1], merged)] if merged else []


def _pin_claim(pin: Pin) -> _Claim:
    return _Claim(pin.authority, pin.size, SHA256, pin.sha256, pin=pin)


def _before_hashing(file: TreeFile, voices: Sequence[_Voice], look: _Source, quick: bool) -> FileResult | None:
    """The answer where size, first bytes or header already give it, or where `quick` leaves it at that; else None."""
    firm = [voice for voice in voices if not voice.yielding]
    top = min((voice.rank for voice in firm), default=None)
    for voice in firm:
        if voice.rank == top and not any(claim.fits(file.size) for claim in voice.claims):
            return _by_size(file, voice)
    kind = identify(_head(file))
    if kind in STAND_INS and file.name.endswith(MODEL_SUFFIXES):
        return FileResult(
            file.name,
            file.size,
            Status.MISMATCHED,
            f"{kind.value}",
            "header",
            authority="its own contents",
            expected=f"the contents of a {Path(file.name).suffix} file",
            found=kind.value,
        )
    header, fault = _header_of(file)
    if fault is not None and not voices:
        return FileResult(
            file.name,
            file.size,
            Status.MISMATCHED,
            fault,
            "header",
            authority="its own header",
            expected="a sound safetensors header",
            found=fault,
        )
    pins = [claim.pin for voice in voices for claim in voice.claims if claim.pin and claim.pin.size == file.size]
    pins = (
        [pin for pin in pins if pin.header_sha256]
        if voices
        else [pin for pin in look.table.by_size(file.size) if pin.header_sha256]
    )
    agrees = [pin for pin in pins if pin.header_sha256 == header]
    if voices and pins and not agrees and (quick or any(pin.header_published for pin in pins)):
        return FileResult(
            file.name,
            file.size,
            Status.MISMATCHED,
            fault or "already the header differs: another model",
            "header",
            authority=pins[0].authority,
            algorithm=SHA256,
            expected=pins[0].header_sha256,
            found=header,
        )
    return _unhashed(file, voices, pins, agrees) if quick else None


def _by_size(file: TreeFile, voice: _Voice) -> FileResult:
    claim = voice.claims[0]
    assert claim.size is not None
    kind = identify(_head(file))
    own = (Kind.SAFETENSORS, Kind.GGUF, Kind.METAL)
    if kind in STAND_INS or (kind and kind not in own and file.name.endswith(official.WEIGHT_SUFFIXES)):
        reason = kind.value
    elif file.size < claim.size:
        reason = f"truncated, or another file: {claim.size - file.size} bytes short"
    else:
        reason = f"another file: {file.size - claim.size} bytes longer"
    return FileResult(
        file.name,
        file.size,
        Status.MISMATCHED,
        reason,
        "size",
        authority=claim.authority,
        expected=f"{claim.size} bytes",
        found=f"{file.size} bytes",
    )


def _unhashed(file: TreeFile, voices: Sequence[_Voice], pins: Sequence[Pin], agrees: Sequence[Pin]) -> FileResult:
    """The most that a quick look may say."""
    if agrees:
        reason, stage = f"header agrees with {agrees[0].authority}; contents not hashed", "header"
    elif pins:
        reason, stage = f"same size as {pins[0].name} of {pins[0].repo}, but another header", "header"
    elif voices:
        reason, stage = "size agrees or is not on record; contents not hashed", "size"
    else:
        reason, stage = "no authority knows this name; contents not hashed", "size"
    authority = voices[0].claims[0].authority if voices else None
    return FileResult(file.name, file.size, Status.UNKNOWN, reason, stage, authority=authority)


def _head(file: TreeFile) -> bytes:
    with SourceFile(file.path) as opened:
        return bytes(opened.read(0, min(HEAD_BYTES, opened.size)))


def _header_of(file: TreeFile) -> tuple[str | None, str | None]:
    """The digest of a safetensors file's header, or what is wrong with that header; neither for other files."""
    if not file.name.endswith(".safetensors"):
        return None, None
    try:
        with SourceFile(file.path) as opened:
            return read_header(opened).header_sha256, None
    except BadInput as error:
        return None, f"{error.what}{f' ({error.found})' if error.found else ''}"


# --- hashing and judging ---------------------------------------------------------------------------------------------


def _digests(
    files: Sequence[TreeFile],
    voices: Mapping[str, Sequence[_Voice]],
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


def _judge(file: TreeFile, digest: FileDigest, voices: Sequence[_Voice], look: _Source) -> FileResult:
    """The answer about a file that was hashed."""
    if not any(claim.pin for voice in voices for claim in voice.claims) and (
        pins := look.table.by_digest(digest.sha256)
    ):
        voices = [_Voice(RANK_WORD, tuple(_pin_claim(pin) for pin in pins)), *voices]
    verified: tuple[int, _Claim] | None = None
    doubts: list[str] = []
    for voice in sorted(voices, key=lambda voice: voice.rank):
        match = next((c for c in voice.claims if c.digest and c.digest == digest.get(c.algorithm)), None)
        if match is not None:
            verified = verified or (voice.rank, match)
            continue
        doubt = _doubt(file, digest, voice)
        if doubt is None and (verified is None or verified[0] == voice.rank):
            return _mismatch(file, digest, voice)
        doubts.append(doubt or f"{voice.claims[0].authority} lists another digest")
    if verified is None:
        return _unknown(file, digest, doubts)
    return _verified(file, digest, verified[1], doubts)


def _doubt(file: TreeFile, digest: FileDigest, voice: _Voice) -> str | None:
    """Why a voice that does not know this digest does not refute it either; None if it does refute it."""
    for claim in voice.claims:
        if claim.prefix and claim.fits(file.size) and digest.sha256.startswith(claim.prefix):
            return f"the digest begins like that of {claim.authority}, of which no more is on record"
    if voice.yielding:
        return f"differs from {voice.claims[0].authority}, but may be another revision's"
    if any(claim.digest is None and claim.prefix is None and claim.fits(file.size) for claim in voice.claims):
        return "its size is on record, its digest has never been published"
    return None


def _mismatch(file: TreeFile, digest: FileDigest, voice: _Voice) -> FileResult:
    claim = next((claim for claim in voice.claims if claim.digest and claim.fits(file.size)), voice.claims[0])
    reason = "right size, other contents"
    if claim.size is None:
        reason = "other contents"
    if claim.pin and claim.pin.header_sha256:
        header, fault = _header_of(file)
        same = header == claim.pin.header_sha256
        reason = "the header agrees, the tensors differ: corrupt, or changed weights" if same else "another model"
        reason = fault or reason
    if _tail_is_zero(file):
        reason += "; it ends in zero bytes, as an interrupted download does"
    return _with_claim(file, digest, claim, Status.MISMATCHED, reason)


def _verified(file: TreeFile, digest: FileDigest, claim: _Claim, doubts: Sequence[str]) -> FileResult:
    reason = "every byte agrees"
    if claim.pin and claim.pin.name.rpartition("/")[2] != file.name.rpartition("/")[2]:
        reason = f"every byte agrees; this is {claim.pin.name} under another name"
    return _with_claim(file, digest, claim, Status.VERIFIED, "; ".join([reason, *doubts]))


def _unknown(file: TreeFile, digest: FileDigest, doubts: Sequence[str]) -> FileResult:
    kind = identify(_head(file))
    what = f" ({kind.value})" if kind and file.name.endswith(official.WEIGHT_SUFFIXES) else ""
    reason = "; ".join(doubts) or f"no authority knows this file{what}"
    return FileResult(
        file.name,
        file.size,
        Status.UNKNOWN,
        reason,
        "digest",
        algorithm=SHA256,
        found=digest.sha256,
        sha256=digest.sha256,
    )


def _with_claim(file: TreeFile, digest: FileDigest, claim: _Claim, status: Status, reason: str) -> FileResult:
    pin = claim.pin
    return FileResult(
        file.name,
        file.size,
        status,
        reason,
        "digest",
        authority=claim.authority,
        official=status is Status.VERIFIED and pin is not None and pin.publisher == OPENAI,
        grade=pin.grade if pin else None,
        evidence=pin.evidence if pin else None,
        algorithm=claim.algorithm,
        expected=claim.digest,
        found=digest.get(claim.algorithm),
        sha256=digest.sha256,
    )


def _tail_is_zero(file: TreeFile) -> bool:
    with SourceFile(file.path) as opened:
        length = min(TAIL_BYTES, opened.size)
        return length == TAIL_BYTES and not any(opened.read(opened.size - length, length))


def _official_only(result: FileResult) -> FileResult:
    """For who asks whether a model is the official one: another's word leaves a file unknown."""
    if result.status is not Status.VERIFIED or result.official:
        return result
    reason = f"agrees with {result.authority}, which is no official pin"
    return replace(result, status=Status.UNKNOWN, reason=reason)


# --- what should be there --------------------------------------------------------------------------------------------


def _completeness(look: _Source) -> tuple[list[Layout], list[FileResult]]:
    """The layouts of the recognised repository, and a MISSING result for every promised file that is absent."""
    if look.single:
        return [], []
    present = {file.name for file in look.files}
    layouts, missing = _layouts(look, present)
    for record in look.records:
        for name, claims in record.files.items() if record.promises else ():
            if name not in present and not (look.root / name).is_file():
                missing.append(_missing(name, claims[0].authority, claims[0].digest, "listed, but not there"))
    for file in look.files:
        if file.name.endswith(".safetensors.index.json"):
            missing += _missing_shards(file, present, look.notes)
    return layouts, missing


def _layouts(look: _Source, present: set[str]) -> tuple[list[Layout], list[FileResult]]:
    repo = look.repo
    if repo is None:
        return [], []
    inside = {name: pin for name, pin in repo.files.items() if name.startswith(look.prefix)}
    here = {name for name in inside if name.removeprefix(look.prefix) in present}
    groups = list(dict.fromkeys(pin.layout for pin in sorted(inside.values(), key=lambda pin: pin.name.count("/"))))
    with_weights = {inside[name].layout for name in here if inside[name].is_weights or "index" in name}
    at_hand = with_weights or {inside[name].layout for name in here if name not in official.DOCUMENTS}
    layouts, missing = [], []
    for group in groups:
        members = [pin for pin in inside.values() if pin.layout == group and pin.size is not None]
        absent = sorted(pin.name for pin in members if pin.name not in here)
        needed = tuple(name for name in absent if name not in official.DOCUMENTS)
        documents = tuple(name for name in absent if name in official.DOCUMENTS)
        state = "not downloaded" if group not in at_hand else "incomplete" if needed else "complete"
        title = official.layout_title(group, repo)
        layouts.append(Layout(title, state, () if group not in at_hand else needed, documents))
        for name in needed if group in at_hand else ():
            pin = inside[name]
            reason = f"belongs to the {title} of {repo.repo}"
            missing.append(_missing(name.removeprefix(look.prefix), pin.authority, pin.sha256, reason))
    return layouts, missing


def _missing_shards(index: TreeFile, present: set[str], notes: list[str]) -> list[FileResult]:
    """The files that an index sends its reader to and that are not there."""
    try:
        weights = read_json(index.path).get("weight_map")
    except BadInput as error:
        notes.append(f"{index.name}: {error.what}")
        return []
    folder = index.name[: index.name.rfind("/") + 1]
    names = {name for name in weights.values() if isinstance(name, str)} if isinstance(weights, dict) else set()
    absent = sorted(folder + name for name in names if folder + name not in present)
    return [_missing(name, index.name, None, f"{index.name} sends its reader to this file") for name in absent]


def _missing(name: str, authority: str, digest: str | None, reason: str) -> FileResult:
    return FileResult(name, None, Status.MISSING, reason, "size", authority=authority, expected=digest)


# --- a manifest of one's own -----------------------------------------------------------------------------------------


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, flush it to the disk, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite("cannot write the file", file=path, found=error.strerror) from error
    finally:
        temporary.unlink(missing_ok=True)

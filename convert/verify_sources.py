"""What is known about files before the first byte is hashed: where they claim to be from, and who says what of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptoss_convert.convert import official
from gptoss_convert.convert.official import Pin, Repo, Table
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.digests import (
    SHA256,
    Expected,
    is_manifest,
    manifest_files,
    read_manifest,
    read_sums,
    read_tree_record,
)
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.tree import HubPlace, TreeFile, hub_place, walk

NO_REPO = "none"

RANK_WORD, RANK_FOUND, RANK_HUB = 1, 2, 3
TRUST = {
    RANK_WORD: "named by you: as trustworthy as the place you have it from",
    RANK_FOUND: "found beside the files and not signed: shows corruption, proves no origin",
    RANK_HUB: "the hub client's local note, not signed: shows corruption, proves no origin",
}
SUMS_NAMES = ("SHA256SUMS", "SHA256SUMS.txt")
MANIFEST_ENDINGS = ("manifest.json", "certificate.json")


@dataclass(frozen=True)
class Claim:
    """One version of a file that an authority accepts. Without a digest it can only be contradicted, by its size."""

    authority: str
    size: int | None
    algorithm: str = SHA256
    digest: str | None = None
    prefix: str | None = None
    pin: Pin | None = None

    def fits(self, size: int) -> bool:
        """Whether a file of this size can be the one that is meant."""
        return self.size is None or self.size == size


@dataclass(frozen=True)
class Voice:
    """What one authority says about one file: any of the claims will do. A yielding voice doubts, but never refutes."""

    rank: int
    claims: tuple[Claim, ...]
    yielding: bool = False


@dataclass(frozen=True)
class Record:
    """A list of digests, its names relative to the source. `path` is its own file."""

    title: str
    rank: int
    path: Path
    files: Mapping[str, tuple[Claim, ...]]

    @property
    def promises(self) -> bool:
        """Whether its files are missing when they are not there."""
        return self.rank != RANK_HUB

    def as_dict(self) -> dict[str, object]:
        """The list as it appears in a report."""
        return {"title": self.title, "path": str(self.path), "files": len(self.files), "trust": TRUST[self.rank]}


@dataclass(frozen=True)
class Subject:
    """What is verified, and everything that is known about it before the first byte is hashed."""

    root: Path
    files: tuple[TreeFile, ...]
    single: bool
    table: Table
    repo: Repo | None
    repo_id: str | None
    revision: str | None
    prefix: str
    records: tuple[Record, ...]
    idle_lists: frozenset[str]  # names of files that are lists themselves, and of which nobody need speak
    notes: list[str] = field(default_factory=list)

    def voices(self, file: TreeFile) -> list[Voice]:
        """Who says what about this file by its name."""
        result = []
        if self.repo is not None:
            names = [self.prefix + file.name]
            if self.single and not self.repo.pins(names[0]):
                names = [name for name in self.repo.files if name.rpartition("/")[2] == file.name]
            if voice := self._official(names):
                result.append(voice)
        result += [Voice(record.rank, record.files[file.name]) for record in self.records if file.name in record.files]
        return result

    def _official(self, names: Iterable[str]) -> Voice | None:
        assert self.repo is not None
        pins = [pin for name in names for pin in self.repo.pins(name)]
        if not pins:
            return None
        claims = [pin_claim(pin) for pin in pins]
        for prefix in self.repo.prefixes:
            if prefix.name in {pin.name for pin in pins}:
                claims.append(Claim(f"{self.repo.repo}, {prefix.seen}", prefix.size, prefix=prefix.digits))
        newer = not self.repo.knows_revision(self.revision) and not any(pin.is_weights for pin in pins)
        return Voice(RANK_WORD, tuple(claims), yielding=newer or all(pin.name in official.REWORDED for pin in pins))


def survey(
    root: Path, *, repo: str | None, revision: str | None, lists: tuple[Path | None, Path | None], table: Table
) -> Subject:
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
    records = named + ([] if named else found) + _tree_records(root, place, notes)
    return Subject(
        root=root,
        files=files,
        single=single,
        table=table,
        repo=pinned,
        repo_id=None if repo_id == NO_REPO else repo_id,
        revision=revision or (place.revision if place else None),
        prefix=prefix,
        records=tuple(records),
        idle_lists=_idle_lists(root, files, named, found if pinned is None else []),
        notes=notes,
    )


def _idle_lists(
    root: Path, files: Sequence[TreeFile], named: Sequence[Record], found: Sequence[Record]
) -> frozenset[str]:
    """The names of the lists that vouch for the others and need not be vouched for themselves.

    Such a file must lie there under its own name, not as a link: else a list could hide the file that it leads to. A list
    found beside the files is one only while no better authority is in force (`found` is then empty): against pins, or a
    list that the user names, it is a stray file like any other.
    """
    lists = {record.path.parent.resolve() / record.path.name for record in (named or found)}
    here = root.resolve()
    plain = (file.name for file in files if not (root / file.name).is_symlink())
    return frozenset(name for name in plain if here / name in lists and (named or _is_list_name(name)))


def _named_records(manifest: Path | None, sums: Path | None) -> list[Record]:
    """The lists that the user names; one that cannot be read is an error."""
    named = []
    if manifest is not None:
        named.append(_record("manifest", RANK_WORD, manifest, read_manifest(manifest)))
    if sums is not None:
        named.append(_record("SHA256SUMS", RANK_WORD, sums, read_sums(sums)))
    return named


def _found_records(paths: Iterable[Path], notes: list[str]) -> list[Record]:
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
    return [file.path for file in files if _is_list_name(file.name)]


def _is_list_name(name: str) -> bool:
    return "/" not in name and (name in SUMS_NAMES or name.endswith(MANIFEST_ENDINGS))


def _record(title: str, rank: int, path: Path, files: Mapping[str, Expected]) -> Record:
    claims = {
        name: (Claim(f"{title} {path.name}", expected.size, expected.algorithm, expected.digest),)
        for name, expected in files.items()
    }
    return Record(title, rank, path, claims)


def _tree_records(root: Path, place: HubPlace | None, notes: list[str]) -> list[Record]:
    """The hub client's tree records of this source; of several commits in one folder, any may be the right one."""
    if place is not None:
        paths, prefix = [place.repo_folder / "trees" / f"{place.revision}.json"], place.prefix
    else:
        paths, prefix = sorted((root / ".cache" / "huggingface" / "trees").glob("*.json")), ""
    merged: dict[str, tuple[Claim, ...]] = {}
    for path in paths:
        try:
            files = read_tree_record(path) if path.is_file() else {}
        except BadInput as error:
            notes.append(f"tree record of the hub client not used: {path.name}: {error.what}")
            continue
        for name, expected in files.items():
            if name.startswith(prefix):
                claim = Claim(f"hub tree record @{path.stem[:8]}", expected.size, expected.algorithm, expected.digest)
                merged[name.removeprefix(prefix)] = (*merged.get(name.removeprefix(prefix), ()), claim)
    return [Record("hub tree record", RANK_HUB, paths[-1], merged)] if merged else []


def pin_claim(pin: Pin) -> Claim:
    """What a pin says of its file."""
    return Claim(pin.authority, pin.size, SHA256, pin.sha256, pin=pin)

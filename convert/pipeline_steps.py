"""The steps of a run: which are done and unchanged, which are to be done again, and whose files are whose.

    OUT/state.json    of every step: a digest of what it was made from, the digests of what it made, and while it is under way
                      the places that it claims

A step is done again if what it is made from has changed, by digest, or what it made is not there with its digest. Only what a
step made, or claimed and did not finish, is replaced. The manifest is taken away before anything that it names changes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import blake3

from gptoss_convert import __version__
from gptoss_convert.convert import verify as verifying
from gptoss_convert.errors import BadInput, CannotWrite, GptOssError, TargetExists
from gptoss_convert.formats.digests import hash_files
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.output import write_atomically
from gptoss_convert.formats.tree import walk

STATE_SCHEMA = "gptoss-convert/state/1"
STATE, MANIFEST = "state.json", "manifest.json"
Tell = Callable[[Mapping[str, Any]], None]
Digests = dict[str, str]  # path, relative to OUT or to the source → SHA-256


class Steps:
    """What is done in OUT by one recipe. A context: within it no other run works there."""

    def __init__(self, out: Path, recipe: str, tell: Tell) -> None:
        """recipe: the file's name; tell: gets an event when a step begins, is skipped, done, has failed or is removed."""
        self.out = out
        self._recipe = recipe
        self._tell = tell
        self._lock = -1
        self._steps: dict[str, Any] = {}

    def __enter__(self) -> Steps:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CannotWrite(
                "cannot write", file=self.out, found=error.strerror, expected="a folder, or a place for one"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._unlock()
            raise TargetExists(
                "another run is at work in this folder", file=self.out, remedy="wait for it, or give the recipe another out"
            ) from error  # fmt: skip
        try:
            self._steps = self._read()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def do(self, name: str, where: str, inputs: object, places: Iterable[Path], work: Callable[[], None]) -> Digests:
        """Do a step, or skip it if it is done and unchanged; returns the digests of what it made. where: in the recipe."""
        key = blake3.blake3(json.dumps([name, __version__, inputs], sort_keys=True).encode()).hexdigest()
        places = list(places)
        known = self._steps.get(name)
        if known is not None and known["key"] == key and self.digests(places) == known["made"]:
            self._tell({"event": "skipped", "step": name})
            return dict(known["made"])
        self._require_ours(places, known)
        self._tell({"event": "begin", "step": name})
        before = {**known["before"], **known["made"]} if known else {}
        claims = sorted({self._name(place) for place in places} | set(known["claims"] if known else ()))
        self._remember(name, {"key": None, "made": {}, "before": before, "claims": claims})
        try:
            work()
        except GptOssError as error:
            self._tell({"event": "failed", "step": name, "exit_code": int(error.code)})
            error.file = error.file or where
            raise
        made = self.digests(places)
        left = {path: digest for path, digest in before.items() if path not in made and (self.out / path).exists()}
        self._remember(name, {"key": key, "made": made, "before": left, "claims": []})
        self._tell({"event": "done", "step": name, "files": len(made)})
        return made

    def remove(self, name: str) -> None:
        """Remove what a step made, because it is not to be there any more: a file that is no longer what it made stays."""
        known = self._steps.get(name)
        if known is None:
            return
        self._withdraw_manifest()
        folders = set()
        for path, digest in known["made"].items():
            file = self.out / path
            if file.is_file() and hash_files([file], threads=1)[file].sha256 == digest:
                file.unlink()
                folders.add(file.parent)
        for folder in sorted(folders, key=lambda place: -len(place.parts)):
            if not any(folder.iterdir()):
                folder.rmdir()
        del self._steps[name]
        self._write()
        self._tell({"event": "removed", "step": name})

    def digests(self, places: Iterable[Path]) -> Digests:
        """Of every file at or below some places, by its path relative to OUT."""
        paths: list[Path] = []
        for place in places:
            paths += [entry.path for entry in walk(place)] if place.is_dir() else [place] if place.is_file() else []
        found = hash_files(paths, threads=verifying.DEFAULT_THREADS)
        return {self._name(path): digest.sha256 for path, digest in sorted(found.items())}

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.out))

    def _require_ours(self, places: Iterable[Path], known: Mapping[str, Any] | None) -> None:
        """Refuse to replace what no run of this recipe has made."""
        ours = known["made"].keys() | known["before"].keys() if known else set()
        for place in places:
            if not os.path.lexists(place) or (known and self._name(place) in known["claims"]):
                continue
            inside = [entry.path for entry in walk(place)] if place.is_dir() else [place]
            foreign = [path for path in inside if self._name(path) not in ours]
            if foreign:
                raise TargetExists(
                    "something stands in an output's place that no run of this recipe has made", file=foreign[0],
                    remedy="move it away yourself, or give the recipe another out",
                )  # fmt: skip

    def _read(self) -> dict[str, Any]:
        path = self.out / STATE
        if not path.exists():
            return {}
        found = read_json(path)
        steps = found.get("steps")
        if (
            found.get("schema") != STATE_SCHEMA
            or not isinstance(steps, dict)
            or not all(map(_is_record, steps.values()))
        ):
            raise BadInput(
                "not the state of a run", file=path, found=_form(found), expected=STATE_SCHEMA,
                remedy="remove the folder, or give the recipe another out",
            )  # fmt: skip
        if found.get("recipe") != self._recipe:
            raise TargetExists(
                "another recipe's outputs stand here", file=self.out, found=found.get("recipe"), expected=self._recipe,
                remedy=f"give each recipe an out of its own; if it was only renamed, write its new name into {path}",
            )  # fmt: skip
        return steps

    def _remember(self, name: str, record: dict[str, Any]) -> None:
        self._withdraw_manifest()
        self._steps[name] = record
        self._write()

    def _write(self) -> None:
        document = {"schema": STATE_SCHEMA, "recipe": self._recipe, "steps": self._steps}
        write_atomically(self.out / STATE, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    def _withdraw_manifest(self) -> None:
        (self.out / MANIFEST).unlink(missing_ok=True)


def _form(found: Mapping[str, Any]) -> str:
    return "steps that no run has written" if found.get("schema") == STATE_SCHEMA else f"schema {found.get('schema')}"


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("claims"), list):
        return False
    tables = [record.get("made"), record.get("before")]
    texts = [record["claims"], *(table.values() for table in tables if isinstance(table, dict))]
    return (
        "key" in record
        and all(isinstance(table, dict) for table in tables)
        and all(isinstance(text, str) for group in texts for text in group)
    )

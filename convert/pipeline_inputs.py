"""What a run is made from: the source, verified; what lies beside it; the texts; and the lock file that pins them all.

    RECIPE.lock.json    beside the recipe: repository and revision, the digests of the source's files, of the tokenizer's and of
                        bases' folders, of the texts

The lock is written by the first run; a later one whose inputs are others is refused unless the lock is to be renewed.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.convert import verify as verifying
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.protect import files_read
from gptoss_convert.convert.recipe import DEFAULT, Output, Recipe, Text
from gptoss_convert.convert.resolve import fetched_folder, resolve_source
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.verify_report import Report
from gptoss_convert.errors import BadInput, DigestMismatch, ExitCode, InputChanged, UnknownDigest, UsageError
from gptoss_convert.formats.digests import FileDigest, hash_files
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.output import write_atomically
from gptoss_convert.formats.tree import source_root, walk

LOCK_SCHEMA = "gptoss-convert/lock/1"
Known = Mapping[Path, FileDigest]
PARTS = {"source": "the source is", "beside": "what lies beside the source is", "texts": "the texts are"}


@dataclass(frozen=True)
class Inputs:
    """path: where the source is read; files, beside, texts: SHA-256 by name in the source, by path and by name in the recipe."""

    path: Path
    names: Mapping[str, str]  # path, or repo and revision, as the recipe has them
    official: bool
    files: Mapping[str, str]
    beside: Mapping[str, str]
    texts: Mapping[str, str]

    def parts(self) -> dict[str, Any]:
        """As lock and manifest have them."""
        source = {**self.names, "files": dict(self.files)}
        return {"source": source, "beside": dict(self.beside), "texts": dict(self.texts)}


def require_there(recipe: Recipe) -> None:
    """Every file that the recipe names exists, and OUT lies in none of them; asked before anything is fetched."""
    source = recipe.source
    named: list[tuple[list[str | int], str]] = [
        (["source", key], source[key]) for key in ("path", "tokenizer") if key in source
    ]
    named += [(["text", t.name, "file"], t.file) for t in recipe.texts.values() if t.file != DEFAULT]
    named += [
        (["output", o.index, key], o.table[key]) for o in recipe.outputs for key in ("base", "recipe") if key in o.table
    ]
    for place, name in named:
        path = recipe.place(name)
        if "\0" in name or not os.path.lexists(path):
            raise BadInput(
                "no such file or folder", file=recipe.where(*place), found=path, expected="a path from the recipe"
            )
        if path.is_dir() and recipe.out.resolve().is_relative_to(path.resolve()):
            raise UsageError(
                "the outputs would lie in a folder that they are made from", file=recipe.where(*place), found=recipe.out,
                expected=f"a place outside {path}", remedy="give the recipe another out",
            )  # fmt: skip


def gather(recipe: Recipe, show: ShowProgress, *, renew: bool) -> Inputs:
    """Fetch and verify the source, and hash what else a run is made from."""
    given = recipe.source
    names = {key: given[key] for key in ("path", "repo", "revision") if key in given}
    lock = None if renew or not lock_path(recipe).exists() else read_json(lock_path(recipe))
    path, known = _place(recipe, show, lock)
    official = bool(given.get("official"))
    files: dict[str, str] = {}
    whole = True
    for place in [path, *_other_parts(path, given.get("gate_proj"))]:
        report = _verified(place, official, show, known)
        files |= {result.name: result.sha256 for result in report.results if result.sha256 is not None}
        whole = whole and report.official
    beside = {given["tokenizer"]: tree_digest(recipe.place(given["tokenizer"]))} if "tokenizer" in given else {}
    for output in recipe.outputs:
        if "base" in output.table:
            beside[output.table["base"]] = tree_digest(recipe.place(output.table["base"]))
    texts = {text.name: _text_digest(recipe, text.file) for text in recipe.texts.values()}
    return Inputs(path, names, whole, files, beside, texts)


def _place(recipe: Recipe, show: ShowProgress, lock: Mapping[str, Any] | None) -> tuple[Path, Known]:
    """Where the source lies, and digests taken on the way. What the cache holds as the lock names it needs no hub."""
    given = recipe.source
    if "path" in given:
        return recipe.place(given["path"]), {}
    folder = fetched_folder(given["repo"], given["revision"])
    locked = None if lock is None else lock.get("source")
    if isinstance(locked, dict) and folder.is_dir():
        entries = walk(folder)
        found = hash_files([entry.path for entry in entries], threads=verifying.DEFAULT_THREADS)
        if {entry.name: found[entry.path].sha256 for entry in entries} == locked.get("files"):
            return folder, found
    return resolve_source(f"{given['repo']}@{given['revision']}", show), {}


def _other_parts(path: Path, gate_proj: str | None) -> list[Path]:
    """Of a source that is named by one file: the others that it is read from, such as the parts of a split GGUF."""
    if not path.is_file():
        return []
    with open_source(path, gate_proj=gate_proj) as source:
        mine = os.path.realpath(path)
        return sorted({place for place in files_read(source) if os.path.realpath(place) != mine})


def _verified(path: Path, official: bool, show: ShowProgress, known: Known) -> Report:
    total = sum(file.size for file in walk(source_root(path)))
    with show("verifying", total) as advance:
        report = verifying.verify(path, require_official=official, progress=advance, known=known)
    if report.exit_code() is ExitCode.MISMATCH:
        wrong = next(r for r in report.results if r.status in ("mismatched", "missing"))
        raise DigestMismatch(
            "the source is not what was promised", file=path, found=f"{wrong.name}: {wrong.reason}",
            expected=wrong.expected, remedy="gptoss-convert verify names every file; fetch it again",
        )  # fmt: skip
    if official and not report.official:
        raise UnknownDigest(
            "the source's weights have no official digest", file=path, found=report.answer,
            remedy="leave official out, or fetch the release",
        )  # fmt: skip
    return report


def tree_digest(path: Path) -> str:
    """One SHA-256 for a file, or for a folder's names and contents."""
    entries = {entry.path: entry.name for entry in walk(source_root(path))}
    found = hash_files(list(entries), threads=verifying.DEFAULT_THREADS)
    listed = sorted((entries[place], digest.sha256) for place, digest in found.items())
    return listed[0][1] if path.is_file() else _sha256(json.dumps(listed).encode())


def codecs_digest(recipe: Recipe, output: Output) -> str | None:
    """Of the TOML file with codecs that an output names."""
    return tree_digest(recipe.place(output.table["recipe"])) if "recipe" in output.table else None


def _text_digest(recipe: Recipe, file: str) -> str:
    if file == DEFAULT:
        return _sha256(importlib.resources.files("gptoss_convert").joinpath("data/calibration.jsonl").read_bytes())
    path = recipe.place(file)
    return hash_files([path], threads=1)[path].sha256


def require_unchanged(recipe: Recipe, text: Text, inputs: Inputs) -> None:
    """InputChanged unless a text that was read is still the one that was hashed when the run began."""
    now = _text_digest(recipe, text.file)
    if now != inputs.texts[text.name]:
        raise InputChanged(
            "the text is no longer what it was when the run began", file=recipe.place(text.file), found=now,
            expected=inputs.texts[text.name], remedy="run again",
        )  # fmt: skip


def lock_path(recipe: Recipe) -> Path:
    """Beside the recipe."""
    return recipe.path.with_suffix(".lock.json")


def keep_lock(recipe: Recipe, inputs: Inputs, *, locked: bool, renew: bool) -> None:
    """Hold the inputs against the lock file, or write it. locked: refuse without one; renew: replace it."""
    document = {"schema": LOCK_SCHEMA, **inputs.parts()}
    path = lock_path(recipe)
    if path.exists() and not renew:
        found = read_json(path)
        if found.get("schema") != LOCK_SCHEMA:
            raise BadInput(
                "not a lock file", file=path, found=found.get("schema"), expected=LOCK_SCHEMA,
                remedy="take the recipe's own, or write another: --renew-lock",
            )  # fmt: skip
        for part, words in PARTS.items():
            if found.get(part) != document[part]:
                raise DigestMismatch(
                    f"{words} not what the lock file names", file=path,
                    found=_difference(found.get(part), document[part]), expected="the same names and digests",
                    remedy="mend it, or accept it as it is now: --renew-lock",
                )  # fmt: skip
        return
    if locked and not renew:
        raise BadInput(
            "there is no lock file", file=path, remedy="run once without --locked, and commit what it writes"
        )
    write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def _difference(before: object, now: object) -> str:
    """What differs, in a few words: each name with what it is now and what the lock has."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "another form"
    names: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        mine, theirs = before.get(key), now.get(key)
        if mine != theirs:
            inner = isinstance(mine, dict) and isinstance(theirs, dict)
            names.append(
                f"{key} ({_difference(mine, theirs) if inner else f'{_short(theirs)}, locked {_short(mine)}'})"
            )
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:12]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

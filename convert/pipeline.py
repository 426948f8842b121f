"""`run`: a recipe from its source to every artifact, compared and exported; what is done and unchanged is skipped.

    OUT/
        artifacts/NAME…      as convert writes them, with their certificates
        calibration/TEXT.gguf    statistics, shared by the outputs that are rounded by importance
        reports/NAME.json, .html
        exports/NAME-PLATFORM/
        state.json           of every step: a digest of what it was made from, and the digests of what it made
        manifest.json        every artifact, its digests, its certificate, its measured quality

    RECIPE.lock.json         beside the recipe: the source's revision and digests, the texts'

A step is done again if what it is made from has changed, by digest, or what it made is not there with its digest. The lock is
written by the first run; a later one whose source or texts are others is refused unless the lock is to be renewed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3

from gptoss_convert import __version__
from gptoss_convert.convert import verify as verifying
from gptoss_convert.convert.calibration import Wish
from gptoss_convert.convert.certificate import FOLDER_NAME, file_name
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.pipeline_quality import measure
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.recipe import DEFAULT, Output, Recipe, Text
from gptoss_convert.convert.resolve import resolve_source
from gptoss_convert.convert.sizes import parse_size
from gptoss_convert.errors import BadInput, DigestMismatch, ExitCode, ProofFailed, TargetExists, UnknownDigest
from gptoss_convert.formats.digests import hash_files
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.output import write_atomically
from gptoss_convert.formats.tree import source_root, walk

LOCK_SCHEMA, STATE_SCHEMA, MANIFEST_SCHEMA = (f"gptoss-convert/{name}/1" for name in ("lock", "state", "run"))
Tell = Callable[[Mapping[str, Any]], None]
Digests = dict[str, str]  # path, relative to OUT or to the source → SHA-256


@dataclass(frozen=True)
class Settings:
    """How a recipe is run. locked: refuse without a lock; renew: replace it."""

    device: str = "cpu"
    threads: int = 0
    locked: bool = False
    renew: bool = False


@dataclass
class Pipeline:
    """One run. `tell` gets an event when a step begins, is skipped or is done."""

    recipe: Recipe
    settings: Settings
    show: ShowProgress
    tell: Tell
    state: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Everything; returns the manifest. ProofFailed, after all else is done, where an output misses a limit."""
        out = self.recipe.out
        out.mkdir(parents=True, exist_ok=True)
        self.state = self._read_state()
        source, digests = self._source()
        texts = {name: self._text_digest(text) for name, text in self.recipe.texts.items()}
        self._lock(digests, texts)
        made = [self._output(output, source, digests, texts) for output in self.recipe.outputs]
        document = {
            "schema": MANIFEST_SCHEMA,
            "tool": {"name": "gptoss-convert", "version": __version__},
            "recipe": {"name": self.recipe.path.name, "sha256": _sha256(self.recipe.path.read_bytes())},
            "source": {**self._source_names(), "files": digests},
            "texts": texts,
            "outputs": made,
        }
        write_atomically(out / "manifest.json", (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
        self.tell(
            {"event": "manifest", "path": str(out / "manifest.json"), "outputs": len(made), "missed": self.missed}
        )
        if self.missed:
            raise ProofFailed(
                "outputs miss their limits", file=self.recipe.path, found="; ".join(self.missed),
                expected="what fail_above says", remedy="look at their reports; larger types, or --method gptq",
            )  # fmt: skip
        return document

    # --- the source, the texts and the lock ----------------------------------------------------------------------------

    def _source_names(self) -> dict[str, Any]:
        given = self.recipe.source
        return {key: given[key] for key in ("path", "repo", "revision") if key in given}

    def _source(self) -> tuple[Path, Digests]:
        given = self.recipe.source
        self.tell({"event": "begin", "step": "source"})
        path = (
            resolve_source(f"{given['repo']}@{given['revision']}", self.show) if "repo" in given
            else self.recipe.place(given["path"])
        )  # fmt: skip
        if not os.path.lexists(path):
            raise BadInput("no such file or folder", file=path, expected="the source of the recipe")
        total = sum(file.size for file in walk(source_root(path)))
        with self.show("verifying", total) as advance:
            report = verifying.verify(path, require_official=bool(given.get("official")), progress=advance)
        code = report.exit_code()
        if code is ExitCode.MISMATCH:
            raise DigestMismatch(
                "the source is not what was promised", file=path, found=report.answer, remedy="gptoss-convert verify"
            )
        if code is ExitCode.UNKNOWN and given.get("official"):
            raise UnknownDigest(
                "the source holds files without an official digest", file=path, found=report.answer,
                remedy="leave official out, or fetch the release",
            )  # fmt: skip
        digests = {result.name: result.sha256 for result in report.results if result.sha256 is not None}
        self.tell({"event": "done", "step": "source", "official": report.official, "files": len(digests)})
        return path, digests

    def _text_digest(self, text: Text) -> str:
        if text.file == DEFAULT:
            import importlib.resources

            return _sha256(importlib.resources.files("gptoss_convert").joinpath("data/calibration.jsonl").read_bytes())
        path = self.recipe.place(text.file)
        return hash_files([path], threads=1)[path].sha256

    @property
    def lock_path(self) -> Path:
        """Beside the recipe."""
        return self.recipe.path.with_suffix(".lock.json")

    def _lock(self, digests: Digests, texts: Digests) -> None:
        document = {"schema": LOCK_SCHEMA, "source": {**self._source_names(), "files": digests}, "texts": texts}
        path = self.lock_path
        if path.exists() and not self.settings.renew:
            found = read_json(path)
            for part in ("source", "texts"):
                if found.get(part) != document[part]:
                    raise DigestMismatch(
                        f"the {part} {'is' if part == 'source' else 'are'} not what the lock file names", file=path,
                        found=_difference(found.get(part), document[part]), expected="the same digests",
                        remedy="mend it, or accept it as it is now: --renew-lock",
                    )  # fmt: skip
            return
        if self.settings.locked and not self.settings.renew:
            raise BadInput(
                "there is no lock file", file=path, remedy="run once without --locked, and commit what it writes"
            )
        write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    # --- steps ---------------------------------------------------------------------------------------------------------

    def _step(self, name: str, inputs: object, places: Iterable[Path], work: Callable[[], None]) -> Digests:
        """Do a step, or skip it if it is done and unchanged; returns the digests of what it made."""
        key = blake3.blake3(json.dumps([name, __version__, inputs], sort_keys=True).encode()).hexdigest()
        places = list(places)
        known = self.state["steps"].get(name)
        if known is not None and known["key"] == key and self._digests(places) == known["made"]:
            self.tell({"event": "skipped", "step": name})
            return dict(known["made"])
        for place in places:
            if known is None and os.path.lexists(place):
                raise TargetExists(
                    "something stands in an output's place that no run of this recipe has made", file=place,
                    remedy="remove it yourself, or give the recipe another out",
                )  # fmt: skip
        self.tell({"event": "begin", "step": name})
        if known is None:  # whatever it leaves, from now on, is ours
            self._remember(name, {"key": None, "made": {}})
        work()
        made = self._digests(places)
        self._remember(name, {"key": key, "made": made})
        self.tell({"event": "done", "step": name, "files": len(made)})
        return made

    def _digests(self, places: Iterable[Path]) -> Digests:
        paths: list[Path] = []
        for place in places:
            paths += [entry.path for entry in walk(place)] if place.is_dir() else [place] if place.is_file() else []
        found = hash_files(paths, threads=verifying.DEFAULT_THREADS)
        return {str(path.relative_to(self.recipe.out)): digest.sha256 for path, digest in sorted(found.items())}

    def _read_state(self) -> dict[str, Any]:
        path = self.recipe.out / "state.json"
        if not path.exists():
            return {"schema": STATE_SCHEMA, "steps": {}}
        found = read_json(path)
        if found.get("schema") != STATE_SCHEMA or not isinstance(found.get("steps"), dict):
            raise BadInput("not the state of a run", file=path, found=found.get("schema"), expected=STATE_SCHEMA)
        return found

    def _remember(self, name: str, record: dict[str, Any]) -> None:
        self.state["steps"][name] = record
        path = self.recipe.out / "state.json"
        write_atomically(path, (json.dumps(self.state, indent=1, sort_keys=True) + "\n").encode())

    # --- an output -----------------------------------------------------------------------------------------------------

    def _output(self, output: Output, source: Path, digests: Digests, texts: Digests) -> dict[str, Any]:
        place = self.recipe.out / "artifacts" / output.file_name
        wish, calibrated = self._wish(output, source, digests, texts)
        inputs = [digests, _without(output.table, "compare", "export"), calibrated, self._others(output)]
        single = place.suffix == ".gguf"
        certificate = place.parent / file_name(place.name) if single else place / FOLDER_NAME
        made = self._step(
            f"convert {output.name}", inputs, [place, certificate] if single else [place],
            lambda: self._convert(output, source, place, wish),
        )  # fmt: skip
        quality = self._compare(output, source, place, [digests, made], texts)
        passed = quality is None or all(gate["passed"] for gate in quality["gates"])
        return {
            "name": output.name,
            "artifact": str(place.relative_to(self.recipe.out)),
            "files": made,
            "certificate": str(certificate.relative_to(self.recipe.out)),
            "quality": quality,
            "exports": [
                self._export(output, index, place, made) for index in range(len(output.table.get("export", [])))
            ]
            if passed
            else [],
        }

    def _others(self, output: Output) -> Digests:
        """Digests of what an output names beside the source."""
        found = {}
        for key in ("recipe", "base"):
            if key in output.table:
                path = self.recipe.place(output.table[key])
                paths = [entry.path for entry in walk(source_root(path))] if path.is_dir() else [path]
                hashed = hash_files(paths, threads=verifying.DEFAULT_THREADS)
                found[key] = _sha256(repr(sorted(d.sha256 for d in hashed.values())).encode())
        return found

    def _wish(self, output: Output, source: Path, digests: Digests, texts: Digests) -> tuple[Wish, object]:
        """What it is rounded by, and the digests of that."""
        if output.method == "round":
            return Wish(), None
        text = self.recipe.texts[output.table["calibration"]]
        name = text.file if text.file == DEFAULT else str(self.recipe.place(text.file))
        inputs = [digests, texts[text.name], text.tokens, text.context]
        if output.method == "gptq":
            return Wish("gptq", name, self.settings.device, text.context, text.tokens), inputs
        place = self.recipe.out / "calibration" / f"{text.name}.gguf"
        made = self._step(f"calibrate {text.name}", inputs, [place], lambda: self._calibrate(text, name, source, place))
        return Wish("importance", str(place)), made

    def _calibrate(self, text: Text, name: str, source: Path, place: Path) -> None:
        from gptoss_convert.convert.calibrate import calibrate
        from gptoss_convert.convert.texts import read_texts

        calibrate(
            source, place, lambda opened: read_texts(name, opened, text.context, text.tokens), context=text.context,
            device=self.settings.device, threads=self.settings.threads, overwrite=True, show=self.show,
            gate_proj=self.recipe.source.get("gate_proj"), tokenizer=self._tokenizer(),
        )  # fmt: skip

    def _convert(self, output: Output, source: Path, place: Path, wish: Wish) -> None:
        given = output.table
        plain = (
            "experts", "dense", "embedding", "router", "head", "onnx_runtime", "type", "widen", "allow_larger", "proof",
        )  # fmt: skip
        options = Options(
            given["to"],
            recipe=self.recipe.place(given["recipe"]) if "recipe" in given else None,
            base=self.recipe.place(given["base"]) if "base" in given else None,
            split_bytes=parse_size(given["split_size"]) if "split_size" in given else None,
            threads=self.settings.threads,
            name=given.get("general_name"),
            tokenizer=self._tokenizer(),
            gate_proj=self.recipe.source.get("gate_proj"),
            overwrite=True,
            rounding=wish,
            **{key: given[key] for key in plain if key in given},
        )
        convert(source, place, options, self.show)

    def _tokenizer(self) -> Path | None:
        given = self.recipe.source.get("tokenizer")
        return None if given is None else self.recipe.place(given)

    def _compare(
        self, output: Output, source: Path, place: Path, inputs: list[Digests], texts: Digests
    ) -> dict[str, Any] | None:
        given = output.table.get("compare")
        if given is None:
            return None
        text = self.recipe.texts.get(given.get("text", ""))
        report = self.recipe.out / "reports" / f"{output.name}.json"
        page = report.with_suffix(".html") if given.get("report", True) else None
        self._step(
            f"compare {output.name}",
            [*inputs, given, text and [texts[text.name], text.tokens, text.context]],
            [report, *([] if page is None else [page])],
            lambda: measure(self.recipe, self.settings, source, place, text, given, report, page, self.show),
        )
        document = read_json(report)
        for gate in document["gates"]:
            if not gate["passed"]:
                self.missed.append(f"{output.name}: {gate['metric']} {gate['found']} above {gate['limit']}")
        found = document["text"]
        return {
            "report": str(report.relative_to(self.recipe.out)), "gates": document["gates"],
            **({} if found is None else {key: found[key] for key in ("kld", "top1", "perplexity")}),
        }  # fmt: skip

    def _export(self, output: Output, index: int, place: Path, made: Digests) -> dict[str, Any]:
        from gptoss_convert.convert.exports.package import Request
        from gptoss_convert.convert.exports.write import export

        given = dict(output.table["export"][index])
        platform = given.pop("for")
        same = [e["for"] for e in output.table["export"]].count(platform)
        target = self.recipe.out / "exports" / (f"{output.name}-{platform}" + (f"-{index}" if same > 1 else ""))
        report = self.recipe.out / "reports" / f"{output.name}.json"
        quality = report if platform == "huggingface" and "compare" in output.table else None
        inputs = [made, platform, given, quality and self._digests([quality])]
        files = self._step(
            f"export {target.name}", inputs, [target],
            lambda: void(export(place, target, platform, Request(**given, quality=quality), overwrite=True, show=self.show)),
        )  # fmt: skip
        return {"platform": platform, "folder": str(target.relative_to(self.recipe.out)), "files": len(files)}


def void(_: object) -> None:
    """Forget a result."""


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _difference(before: object, now: object) -> str:
    """Which names differ, in a few words."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "another form"
    names: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        mine, theirs = before.get(key), now.get(key)
        if mine != theirs:
            inner = isinstance(mine, dict) and isinstance(theirs, dict)
            names.append(f"{key} ({_difference(mine, theirs)})" if inner else str(key))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

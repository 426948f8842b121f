"""`run`: a recipe from its source to every artifact, compared and exported; what is done and unchanged is skipped.

    OUT/
        artifacts/NAME…      as convert writes them, with their certificates
        calibration/TEXT.gguf    statistics, shared by the outputs that are rounded by importance
        reports/NAME.json, .html
        exports/NAME-PLATFORM/
        state.json           see pipeline_steps.py
        manifest.json        every artifact, its digests, its certificate, its measured quality; there only when all is done

The inputs and their lock file: pipeline_inputs.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss_convert import __version__
from gptoss_convert.convert.calibration import Wish, require_torch
from gptoss_convert.convert.certificate import FOLDER_NAME, file_name
from gptoss_convert.convert.companions import TOKENIZER
from gptoss_convert.convert.compare_gates import largest
from gptoss_convert.convert.conversion import Options, convert, open_for, require_fitting
from gptoss_convert.convert.pipeline_inputs import (
    Inputs,
    codecs_digest,
    gather,
    keep_lock,
    require_there,
    require_unchanged,
)
from gptoss_convert.convert.pipeline_quality import measure
from gptoss_convert.convert.pipeline_steps import MANIFEST, Digests, Steps, Tell
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.recipe import DEFAULT, Output, Recipe, Text
from gptoss_convert.convert.sizes import parse_size
from gptoss_convert.errors import InputChanged, ProofFailed, Refused, UsageError
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.output import write_atomically

MANIFEST_SCHEMA = "gptoss-convert/run/1"
_KINDS = {"hf": "mxfp4"}  # what `convert --to` makes is called otherwise by the exports


@dataclass(frozen=True)
class Settings:
    """How a recipe is run. locked: refuse without a lock; renew: replace it."""

    device: str = "cpu"
    threads: int = 0
    locked: bool = False
    renew: bool = False


def require_sense(recipe: Recipe, settings: Settings = Settings()) -> None:
    """UsageError, with the line, for an output whose options do not fit together or whose kind a platform cannot serve."""
    from gptoss_convert.convert.exports.package import Request
    from gptoss_convert.convert.exports.platforms import PLATFORMS

    for output in recipe.outputs:
        where = recipe.where("output", output.index)
        wish = Wish(output.method, None if output.method == "round" else DEFAULT, settings.device)
        try:
            require_fitting(options_of(recipe, output, settings, wish), Path(output.file_name))
        except UsageError as error:
            error.file = where
            raise
        kind = _kind(output)
        for export in output.table.get("export", []):
            platform = PLATFORMS[export["for"]]
            try:
                Request(**_without(export, "for")).only(export["for"], platform.options)
                if "name" in export:
                    platform.named(export["name"])
            except UsageError as error:
                error.file = where
                raise
            if kind not in platform.kinds:
                raise UsageError(
                    f"{export['for']} cannot serve this output", file=where, found=f"{output.name}: {kind}",
                    expected=" or ".join(platform.kinds),
                )  # fmt: skip


def _kind(output: Output) -> str:
    """What the exports call it."""
    to = str(output.table["to"])
    return _KINDS.get(to, to)


def options_of(recipe: Recipe, output: Output, settings: Settings, wish: Wish) -> Options:
    """The conversion that a recipe asks for."""
    given = output.table
    plain = (
        "experts",
        "dense",
        "embedding",
        "router",
        "head",
        "onnx_runtime",
        "type",
        "widen",
        "allow_larger",
        "proof",
    )
    source = recipe.source
    return Options(
        given["to"],
        recipe=recipe.place(given["recipe"]) if "recipe" in given else None,
        base=recipe.place(given["base"]) if "base" in given else None,
        split_bytes=parse_size(given["split_size"]) if "split_size" in given else None,
        threads=settings.threads,
        name=given.get("general_name"),
        tokenizer=recipe.place(source["tokenizer"]) if "tokenizer" in source else None,
        gate_proj=source.get("gate_proj"),
        overwrite=True,
        rounding=wish,
        **{key: given[key] for key in plain if key in given},
    )


@dataclass
class Pipeline:
    """One run. `tell` gets an event when a step begins, is skipped, is done or has failed."""

    recipe: Recipe
    settings: Settings
    show: ShowProgress
    tell: Tell
    missed: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Everything; returns the manifest. ProofFailed, after all else is done, where an output misses a limit."""
        require_sense(self.recipe, self.settings)
        require_there(self.recipe)
        self._require_device()
        with Steps(self.recipe.out, self.recipe.path.name, self.tell) as steps:
            return self._run(steps)

    def _require_device(self) -> None:
        """That what computes is there, before hours of what does not."""
        if all(output.method == "round" and "compare" not in output.table for output in self.recipe.outputs):
            return
        require_torch()
        from gptoss_convert.convert.forward import choose_device

        choose_device(self.settings.device)

    def _run(self, steps: Steps) -> dict[str, Any]:
        self.tell({"event": "begin", "step": "source"})
        inputs = gather(self.recipe, self.show, renew=self.settings.renew)
        self.tell({"event": "done", "step": "source", "official": inputs.official, "files": len(inputs.files)})
        keep_lock(self.recipe, inputs, locked=self.settings.locked, renew=self.settings.renew)
        self._require_exportable(inputs)
        made = [self._output(steps, output, inputs) for output in self.recipe.outputs]
        document = {
            "schema": MANIFEST_SCHEMA,
            "tool": {"name": "gptoss-convert", "version": __version__},
            "recipe": {"name": self.recipe.path.name, "sha256": self.recipe.sha256},
            **inputs.parts(),
            "outputs": made,
        }
        path = self.recipe.out / MANIFEST
        write_atomically(path, (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        self.tell({"event": "manifest", "path": str(path), "outputs": len(made), "missed": self.missed})
        if self.missed:
            raise ProofFailed(
                "outputs miss their limits", file=self.recipe.path, found="; ".join(self.missed),
                expected="what fail_above says", remedy="look at their reports; larger types, or --method gptq",
            )  # fmt: skip
        return document

    def _require_exportable(self, inputs: Inputs) -> None:
        """That no export will refuse what has taken hours to convert, as far as the source and the recipe tell."""
        from gptoss_convert.convert.exports.package import Request
        from gptoss_convert.convert.exports.platforms import PLATFORMS

        for output in self.recipe.outputs:
            if not output.table.get("export"):
                continue
            options = options_of(self.recipe, output, self.settings, Wish(output.method))
            with open_for(inputs.path, options) as source:
                if TOKENIZER not in source.companions:
                    raise Refused(
                        "an export needs the tokenizer, which the source does not have", file=self._where(output),
                        found=f"no {TOKENIZER}",
                        remedy='[source] tokenizer = "FOLDER", with the release\'s tokenizer and template',
                    )  # fmt: skip
                for export in output.table["export"]:
                    foresee = PLATFORMS[export["for"]].foresee
                    try:
                        if foresee is not None:
                            foresee(_kind(output), source, options, Request(**_without(export, "for")))
                    except (Refused, UsageError) as error:
                        error.file = self._where(output)
                        raise

    def _output(self, steps: Steps, output: Output, inputs: Inputs) -> dict[str, Any]:
        place = self.recipe.out / "artifacts" / output.file_name
        wish, calibrated = self._wish(steps, output, inputs)
        base = inputs.beside.get(output.table.get("base", ""))
        table = _without(output.table, "compare", "export", "base", "recipe")
        made_from = [self._origin(inputs), table, calibrated, base, codecs_digest(self.recipe, output)]
        single = place.suffix == ".gguf"
        certificate = place.parent / file_name(place.name) if single else place / FOLDER_NAME
        made = steps.do(
            f"convert {output.name}", self._where(output), made_from, [place, certificate] if single else [place],
            lambda: self._convert(output, inputs, place, wish),
        )  # fmt: skip
        quality = self._compare(steps, output, inputs, place, made)
        passed = quality is None or all(gate["passed"] for gate in quality["gates"])
        exports = []
        for index in range(len(output.table.get("export", []))):
            if passed:
                exports.append(self._export(steps, output, index, place, made))
            else:
                steps.remove(f"export {self._export_name(output, index)}")
        return {
            "name": output.name,
            "artifact": str(place.relative_to(self.recipe.out)),
            "files": made,
            "certificate": str(certificate.relative_to(self.recipe.out)),
            "quality": quality,
            "exports": exports,
        }

    def _where(self, output: Output) -> str:
        return self.recipe.where("output", output.index)

    def _origin(self, inputs: Inputs) -> list[object]:
        """What the source is read from, and how."""
        source = self.recipe.source
        return [dict(inputs.files), source.get("gate_proj"), inputs.beside.get(source.get("tokenizer", ""))]

    def _text(self, text: Text, inputs: Inputs) -> list[object]:
        """All that decides which tokens are read."""
        return [inputs.texts[text.name], Path(text.file).suffix, text.tokens, text.context]

    def _text_name(self, text: Text) -> str:
        return text.file if text.file == DEFAULT else str(self.recipe.place(text.file))

    def _wish(self, steps: Steps, output: Output, inputs: Inputs) -> tuple[Wish, object]:
        """What it is rounded by, and the digests of that."""
        if output.method == "round":
            return Wish(), None
        text = self.recipe.texts[output.table["calibration"]]
        name = self._text_name(text)
        if output.method == "gptq":
            return Wish("gptq", name, self.settings.device, text.context, text.tokens), self._text(text, inputs)
        place = self.recipe.out / "calibration" / f"{text.name}.gguf"
        made = steps.do(
            f"calibrate {text.name}", self.recipe.where("text", text.name), [self._origin(inputs), self._text(text, inputs)],
            [place], lambda: self._calibrate(text, name, inputs, place),
        )  # fmt: skip
        return Wish("importance", str(place)), made

    def _calibrate(self, text: Text, name: str, inputs: Inputs, place: Path) -> None:
        from gptoss_convert.convert.calibrate import calibrate
        from gptoss_convert.convert.texts import read_texts

        given = self.recipe.source
        calibrate(
            inputs.path, place, lambda opened: read_texts(name, opened, text.context, text.tokens), context=text.context,
            device=self.settings.device, threads=self.settings.threads, overwrite=True, show=self.show,
            gate_proj=given.get("gate_proj"),
            tokenizer=self.recipe.place(given["tokenizer"]) if "tokenizer" in given else None,
        )  # fmt: skip
        require_unchanged(self.recipe, text, inputs)

    def _convert(self, output: Output, inputs: Inputs, place: Path, wish: Wish) -> None:
        made = convert(inputs.path, place, options_of(self.recipe, output, self.settings, wish), self.show)
        read = made.digests.source
        changed = sorted(name for name, digest in read.items() if digest not in inputs.files.values())
        if changed:
            raise InputChanged(
                "the source is no longer what was verified when the run began", file=inputs.path / changed[0],
                found=read[changed[0]], remedy="let whatever changes it finish, then run again",
            )  # fmt: skip
        if output.method == "gptq":
            require_unchanged(self.recipe, self.recipe.texts[output.table["calibration"]], inputs)

    def _compare(
        self, steps: Steps, output: Output, inputs: Inputs, place: Path, made: Digests
    ) -> dict[str, Any] | None:
        given = output.table.get("compare")
        if given is None:
            return None
        text = self.recipe.texts.get(given.get("text", ""))
        report = self.recipe.out / "reports" / f"{output.name}.json"
        page = report.with_suffix(".html") if given.get("report", True) else None
        steps.do(
            f"compare {output.name}", self._where(output),
            [self._origin(inputs), made, given, text and self._text(text, inputs)],
            [report, *([] if page is None else [page])],
            lambda: self._measure(inputs, place, text, given, report, page),
        )  # fmt: skip
        document = read_json(report)
        for gate in document["gates"]:
            if not gate["passed"]:
                found = "not finite" if gate["found"] is None else gate["found"]
                self.missed.append(f"{output.name}: {gate['metric']} {found}, limit {gate['limit']}")
        worst = largest(tensor["relative_rms"] for tensor in document["tensors"])
        return {
            "report": str(report.relative_to(self.recipe.out)), "gates": document["gates"],
            "tensor_rms": worst if math.isfinite(worst) else None,
            **({} if text is None else self._of_text(output, text, inputs, document["text"])),
        }  # fmt: skip

    def _measure(
        self, inputs: Inputs, place: Path, text: Text | None, given: Mapping[str, Any], report: Path, page: Path | None
    ) -> None:
        measure(self.recipe, self.settings, inputs.path, place, text, given, report, page, self.show)
        if text is not None:
            require_unchanged(self.recipe, text, inputs)

    def _of_text(self, output: Output, text: Text, inputs: Inputs, found: dict[str, Any]) -> dict[str, Any]:
        """What the text has shown. held_out: whether it is another than the one that the output was calibrated on."""
        calibration = output.table.get("calibration")
        held_out = calibration is None or inputs.texts[calibration] != inputs.texts[text.name]
        return {
            "text": text.name, "held_out": held_out,
            **{key: found[key] for key in ("scored", "kld", "top1", "perplexity")},
        }  # fmt: skip

    def _export_name(self, output: Output, index: int) -> str:
        platforms = [export["for"] for export in output.table["export"]]
        platform = platforms[index]
        return f"{output.name}-{platform}" + (f"-{index}" if platforms.count(platform) > 1 else "")

    def _export(self, steps: Steps, output: Output, index: int, place: Path, made: Digests) -> dict[str, Any]:
        from gptoss_convert.convert.exports.package import Request
        from gptoss_convert.convert.exports.write import export

        given = dict(output.table["export"][index])
        platform = given.pop("for")
        target = self.recipe.out / "exports" / self._export_name(output, index)
        report = self.recipe.out / "reports" / f"{output.name}.json"
        quality = report if platform == "huggingface" and "compare" in output.table else None
        files = steps.do(
            f"export {target.name}", self._where(output),
            [made, platform, given, quality and steps.digests([quality])], [target],
            lambda: void(export(place, target, platform, Request(**given, quality=quality), overwrite=True, show=self.show)),
        )  # fmt: skip
        return {"platform": platform, "folder": str(target.relative_to(self.recipe.out)), "files": files}


def void(_: object) -> None:
    """Forget a result."""


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}

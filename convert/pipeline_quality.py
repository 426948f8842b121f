"""The comparing step of a recipe: the document of `compare` and its page, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.convert.calibration import require_torch
from gptoss_convert.convert.compare_gates import judge
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.recipe import DEFAULT, Recipe, Text
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.strict_json import strict
from gptoss_convert.convert.workers import cores
from gptoss_convert.formats.output import write_atomically

if TYPE_CHECKING:
    from gptoss_convert.convert.pipeline import Settings


def measure(
    recipe: Recipe, settings: Settings, source: Path, artifact: Path, text: Text | None, given: Mapping[str, Any],
    report: Path, page: Path | None, show: ShowProgress,
) -> None:  # fmt: skip
    """Compare an artifact with its source, judge it by its limits, and write the document, and the page if one is wanted."""
    require_torch()
    from gptoss_convert.convert.compare import compare
    from gptoss_convert.convert.compare_report import render
    from gptoss_convert.convert.texts import read_texts

    tokenizer = recipe.source.get("tokenizer")
    with (
        open_source(
            source,
            gate_proj=recipe.source.get("gate_proj"),
            tokenizer=None if tokenizer is None else recipe.place(tokenizer),
        ) as mine,
        open_source(artifact) as made,
    ):
        texts, context = None, 0
        if text is not None:
            name = text.file if text.file == DEFAULT else recipe.place(text.file)
            texts, context = read_texts(name, mine, text.context, text.tokens), text.context
        document = compare(
            mine, made, texts, device=settings.device, threads=settings.threads or cores(), context=context, show=show
        )
        for side in (mine, made):
            side.check_unchanged()
    judge(document, list(given.get("fail_above", {}).items()))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(report, (json.dumps(strict(document), indent=1, allow_nan=False) + "\n").encode())
    if page is not None:
        write_atomically(page, render(document).encode())

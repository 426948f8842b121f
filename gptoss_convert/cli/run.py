"""`gptoss-convert run`: the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from gptoss_convert.cli.output import print_event, progress


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, and nothing else.")
@click.option("--check", is_flag=True, help="Only read the recipe, and say whether it fits; looks at no other file.")
@click.option("--locked", is_flag=True, help="Refuse to run without a lock file.")
@click.option("--renew-lock", "renew", is_flag=True, help="Accept the source and the texts as they are now.")
@click.option("--device", default="cpu", help="Where calibration and comparison compute: cpu, cuda.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads; 0: one a core.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Events on stdout, one JSON object a line; the last is the manifest's, or the error's.",
)
def command(
    recipe: Path | None, schema: bool, check: bool, locked: bool, renew: bool, device: str, threads: int, as_json: bool
) -> None:
    """Make all outputs of RECIPE, a TOML file: fetch, verify, calibrate, convert, compare, export.

    What is done and unchanged, by digest, is skipped. A lock file beside the recipe pins the source and the texts; a manifest
    names every artifact, its digests, its certificate and its measured quality. Exit 11 where an output misses its limits.
    """
    from gptoss_convert.convert import recipe as recipes
    from gptoss_convert.errors import UsageError

    if schema:
        print(json.dumps(recipes.schema(), indent=2))
        return
    if recipe is None:
        raise UsageError(
            "RECIPE is missing", expected="a TOML file", remedy="gptoss-convert run --schema says what it holds"
        )
    found = recipes.read_recipe_file(recipe)
    from gptoss_convert.convert.pipeline import Pipeline, Settings, require_sense

    if check:
        require_sense(found)
        _tell(
            {"event": "checked", "recipe": str(recipe), "outputs": [output.name for output in found.outputs]}, as_json
        )
        return
    settings = Settings(device=device, threads=threads, locked=locked, renew=renew)
    show = (lambda label, total: nullcontext(lambda _: None)) if as_json else progress
    Pipeline(found, settings, show, lambda event: _tell(event, as_json)).run()


def _tell(event: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_event(event)
        return
    words = {
        "begin": "begins", "done": "done", "skipped": "is done already", "failed": "failed", "removed": "is removed",
        "manifest": "manifest", "checked": "fits",
    }  # fmt: skip
    what = event.get("step") or event.get("path") or event.get("recipe")
    print(f"{words[event['event']]:<16} {what}", file=sys.stdout, flush=True)

"""Recipes: what `run` makes of one source, as TOML. The schema is data/recipe.schema.json; errors name the line.

    [source]    a path, or a repository at a commit        [[output]]  one artifact: how it is converted, compared, exported
    [text.*]    texts to calibrate on and to compare by

Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.files import SourceFile

MAX_BYTES = 1 << 20
DEFAULT = "default"
_HEADER = re.compile(r"\s*(?P<array>\[)?\[(?P<name>[^\[\]]+)\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*(?P<key>[A-Za-z0-9_.\"'-]+)\s*=")


@dataclass(frozen=True)
class Text:
    """A text by name. file: "default" or a path."""

    name: str
    file: str
    tokens: int
    context: int


@dataclass(frozen=True)
class Output:
    """One artifact. `table` is what the recipe says of it."""

    name: str
    table: Mapping[str, Any]
    line: int

    @property
    def file_name(self) -> str:
        """What the artifact is called: a file for a whole GGUF, else a folder."""
        return f"{self.name}.gguf" if self.table["to"] == "gguf" and "split_size" not in self.table else self.name

    @property
    def method(self) -> str:
        """round, importance or gptq."""
        return str(self.table.get("method", "round"))


@dataclass(frozen=True)
class Recipe:
    """A recipe that fits the schema and names nothing that is not there."""

    path: Path
    source: Mapping[str, Any]
    texts: Mapping[str, Text]
    outputs: Sequence[Output]
    out: Path

    def place(self, name: str) -> Path:
        """A path of the recipe's."""
        return self.path.parent / name


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, as it is published."""
    data = importlib.resources.files("gptoss_convert").joinpath("data/recipe.schema.json").read_bytes()
    found: dict[str, Any] = json.loads(data)
    return found


def read_recipe_file(path: Path) -> Recipe:
    """The recipe in a file; BadInput names the line."""
    with SourceFile(path) as file:
        if file.size > MAX_BYTES:
            raise BadInput("the recipe is too large", file=path, found=file.size, expected=f"at most {MAX_BYTES} bytes")
        data = bytes(file.read(0, file.size))
    try:
        text = data.decode()
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadInput("the recipe is not UTF-8", file=path, found=error.reason, expected="TOML in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput("the recipe is not TOML", file=path, found=str(error), expected="TOML 1.0") from error
    lines = _Lines(text)
    _validate(table, path, lines)
    texts = {
        name: Text(name, given["file"], given.get("tokens", 131072), given.get("context", 2048))
        for name, given in table.get("text", {}).items()
    }
    outputs = [Output(o["name"], o, lines.find(["output", i])) for i, o in enumerate(table["output"])]
    recipe = Recipe(
        path.absolute(), table["source"], texts, outputs, path.absolute().parent / table.get("out", "build")
    )
    _require_known(recipe, lines)
    return recipe


def _validate(table: Mapping[str, Any], path: Path, lines: _Lines) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(table))
    if error is None:
        return
    place = list(error.absolute_path)
    if error.validator == "additionalProperties":
        unknown = next((key for key in error.instance if key not in error.schema.get("properties", {})), None)
        place += [] if unknown is None else [unknown]
    raise BadInput(
        "the recipe does not fit its schema", file=f"{path}, line {lines.find(place)}",
        tensor=".".join(map(str, place)) or None, found=error.message[:300],
        remedy="gptoss-convert run --schema prints what a recipe may say",
    )  # fmt: skip


def _require_known(recipe: Recipe, lines: _Lines) -> None:
    """Names are unique, and texts that are named are there."""
    seen: set[str] = set()
    for index, output in enumerate(recipe.outputs):
        if output.name.lower() in seen:
            raise _wrong(
                recipe, lines, ["output", index, "name"], "two outputs have one name", output.name, "names of their own"
            )
        seen.add(output.name.lower())
        for place, name in _texts_of(output):
            if name not in recipe.texts:
                known = ", ".join(recipe.texts) or "none is given"
                raise _wrong(
                    recipe, lines, ["output", index, *place], "no such text", name, f"one of [text.*]: {known}"
                )
        compared = output.table.get("compare", {})
        limits = sorted(compared.get("fail_above", {}).keys() - {"tensor_rms"})
        if limits and "text" not in compared:
            raise _wrong(recipe, lines, ["output", index, "compare"], "a limit needs a text", limits, "text = NAME")


def _texts_of(output: Output) -> Iterable[tuple[list[str], str]]:
    if "calibration" in output.table:
        yield ["calibration"], output.table["calibration"]
    if "text" in output.table.get("compare", {}):
        yield ["compare", "text"], output.table["compare"]["text"]


def _wrong(
    recipe: Recipe, lines: _Lines, place: list[str | int], what: str, found: object, expected: str
) -> UsageError:
    return UsageError(what, file=f"{recipe.path}, line {lines.find(place)}", found=str(found), expected=expected)


class _Lines:
    """Where the tables and keys of a TOML text begin: good enough to name the line of a mistake."""

    def __init__(self, text: str) -> None:
        self._at: dict[tuple[str | int, ...], int] = {}
        counts: dict[tuple[str | int, ...], int] = {}  # arrays of tables: the number of the one that is open
        here: tuple[str | int, ...] = ()
        for number, line in enumerate(text.splitlines(), 1):
            header = _HEADER.match(line)
            if header:
                here = ()
                for part in header["name"].split("."):
                    here = (*here, counts[here]) if here in counts else here
                    here = (*here, part.strip().strip("\"'"))
                if header["array"]:
                    counts[here] = counts.get(here, -1) + 1
                    here = (*here, counts[here])
                self._at.setdefault(here, number)
            elif key := _KEY.match(line):
                parts = [part.strip("\"'") for part in key["key"].split(".")]
                self._at.setdefault((*here, *parts), number)

    def find(self, place: Sequence[str | int]) -> int:
        """The line of the deepest part of a path that has one."""
        for length in range(len(place), 0, -1):
            if tuple(place[:length]) in self._at:
                return self._at[tuple(place[:length])]
        return 1

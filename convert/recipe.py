"""Recipes: what `run` makes of one source, as TOML. The schema is data/recipe.schema.json; errors name the line.

    [source]    a path, or a repository at a commit        [[output]]  one artifact: how it is converted, compared, exported
    [text.*]    texts to calibrate on and to compare by

Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gptoss_convert.convert.certificate import file_name
from gptoss_convert.convert.recipe_lines import Lines
from gptoss_convert.convert.sizes import parse_size
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.files import SourceFile

MAX_BYTES = 1 << 20
DEFAULT = "default"


@dataclass(frozen=True)
class Text:
    """A text by name. file: "default" or a path."""

    name: str
    file: str
    tokens: int
    context: int


@dataclass(frozen=True)
class Output:
    """One artifact. `table` is what the recipe says of it; index: its place among the outputs."""

    name: str
    table: Mapping[str, Any]
    line: int
    index: int

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
    lines: Lines
    sha256: str

    def place(self, name: str) -> Path:
        """A path of the recipe's."""
        return self.path.parent / name

    def where(self, *place: str | int) -> str:
        """The file and the line of a table or key."""
        return f"{self.path}, line {self.lines.find(place)}"


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
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and arrays nested too deeply
        raise BadInput("the recipe is not TOML", file=path, found=str(error), expected="TOML 1.0") from error
    lines = Lines(text)
    _validate(table, path, lines)
    texts = {
        name: Text(name, given["file"], given.get("tokens", 131072), given.get("context", 2048))
        for name, given in table.get("text", {}).items()
    }
    outputs = [Output(o["name"], o, lines.find(["output", i]), i) for i, o in enumerate(table["output"])]
    out = path.absolute().parent / table.get("out", "build")
    digest = hashlib.sha256(data).hexdigest()
    recipe = Recipe(path.absolute(), table["source"], texts, outputs, out, lines, digest)
    _require_known(recipe)
    return recipe


def _validate(table: Mapping[str, Any], path: Path, lines: Lines) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(table))
    if error is None:
        return
    place = list(error.absolute_path)
    if error.validator == "additionalProperties":
        unknown = next((key for key in error.instance if key not in error.schema.get("properties", {})), None)
        place += [] if unknown is None else [unknown]
    elif "propertyNames" in error.relative_schema_path:
        place.append(error.instance)
    found, expected = _told(error)
    raise BadInput(
        "the recipe does not fit its schema", file=f"{path}, line {lines.find(place)}",
        tensor=".".join(map(str, place)) or None, found=found, expected=expected,
        remedy="gptoss-convert run --schema prints what a recipe may say",
    )  # fmt: skip


def _validator() -> Any:
    """JSON Schema's, but 600.0 is no integer: it would be written into files as such; and NaN and infinity are no numbers."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    extended: Any = extend  # untyped in the library's types

    def is_integer(_: object, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(_: object, value: object) -> bool:
        return is_integer(_, value) or (isinstance(value, float) and math.isfinite(value))

    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer).redefine("number", is_number)
    return extended(Draft202012Validator, type_checker=types)(schema())


def _told(error: Any) -> tuple[str, str | None]:
    """What was found and what was expected."""
    keys = ", ".join(error.instance) if isinstance(error.instance, Mapping) else ""
    if error.validator == "oneOf":
        return keys or "nothing", "path, or repo and revision"
    if error.validator == "not":
        return "calibration", 'method = "importance" or "gptq" beside it'
    if error.validator == "additionalProperties":
        return error.message[:300], ", ".join(error.schema.get("properties", {}))
    if error.validator == "required":
        return error.message[:300], ", ".join(error.validator_value)
    return error.message[:300], None


def _require_known(recipe: Recipe) -> None:
    """Places are different ones, texts that are named are there and can be read, and sizes are sizes."""
    for text in recipe.texts.values():
        if text.file != DEFAULT and Path(text.file).suffix.lower() not in (".txt", ".jsonl"):
            raise _wrong(recipe, ["text", text.name, "file"], "not a text", text.file, '"default", a .txt or a .jsonl')
    seen: dict[str, str] = {}
    for index, output in enumerate(recipe.outputs):
        for place in dict.fromkeys(n.lower() for n in (output.name, output.file_name, file_name(output.file_name))):
            if place in seen:
                raise _wrong(
                    recipe, ["output", index, "name"], "two outputs have one name", f"{output.name} and {seen[place]}",
                    "names of their own, whatever the case and .gguf at the end",
                )  # fmt: skip
            seen[place] = output.name
        for key, name in _texts_of(output):
            if name not in recipe.texts:
                known = ", ".join(recipe.texts) or "none is given"
                raise _wrong(recipe, ["output", index, *key], "no such text", name, f"one of [text.*]: {known}")
        compared = output.table.get("compare", {})
        limits = sorted(compared.get("fail_above", {}).keys() - {"tensor_rms"})
        if limits and "text" not in compared:
            raise _wrong(recipe, ["output", index, "compare"], "a limit needs a text", limits, "text = NAME")
        try:
            parse_size(output.table.get("split_size", "1"))
        except ValueError as error:
            found = output.table["split_size"]
            raise _wrong(
                recipe, ["output", index, "split_size"], "not a size", found, "such as 4GB or 512MiB"
            ) from error


def _texts_of(output: Output) -> Iterable[tuple[list[str], str]]:
    if "calibration" in output.table:
        yield ["calibration"], output.table["calibration"]
    if "text" in output.table.get("compare", {}):
        yield ["compare", "text"], output.table["compare"]["text"]


def _wrong(recipe: Recipe, place: list[str | int], what: str, found: object, expected: str) -> UsageError:
    return UsageError(what, file=recipe.where(*place), found=str(found), expected=expected)

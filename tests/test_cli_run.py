"""`gptoss-convert run` on the command line, and the examples that use it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support.checkpoints import SMALL, Model, write_hf

from gptoss_convert.cli import main
from gptoss_convert.cli.run import command
from gptoss_convert.convert import official
from gptoss_convert.convert.pipeline import require_sense
from gptoss_convert.convert.recipe import read_recipe_file, schema
from gptoss_convert.errors import UsageError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPE = """\
[source]
path = "model"

[[output]]
name = "lossless"
to = "gguf"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf(Model(SMALL), tmp_path / "model")
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def invoke(*arguments: object) -> list[str]:
    done = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout.splitlines()


def test_events_are_one_json_object_a_line_and_the_manifest_is_the_last(folder: Path) -> None:
    events = [json.loads(line) for line in invoke(folder / "r.toml", "--json")]
    assert [(e["event"], e.get("step")) for e in events] == [
        ("begin", "source"), ("done", "source"), ("begin", "convert lossless"), ("done", "convert lossless"), ("manifest", None),
    ]  # fmt: skip
    assert Path(events[-1]["path"]).exists()
    again = [json.loads(line) for line in invoke(folder / "r.toml", "--json", "--locked")]
    assert ("skipped", "convert lossless") in [(e["event"], e.get("step")) for e in again]


@pytest.mark.parametrize(
    ("before", "after", "code", "error"),
    [
        ('to = "gguf"', 'to = "gguf"\ntype = "q44"', 2, "UsageError"),
        ('path = "model"', 'path = "nowhere"', 3, "BadInput"),
        ('path = "model"', 'path = "model"\nofficial = true', 5, "UnknownDigest"),
        ('name = "lossless"', "", 3, "BadInput"),
    ],
)
def test_an_error_is_the_last_event_and_keeps_to_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, code: int, error: str
) -> None:
    (folder / "r.toml").write_text(RECIPE.replace(before, after))
    with pytest.raises(SystemExit) as left:
        main(["run", str(folder / "r.toml"), "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (left.value.code, events[-1]["exit_code"], events[-1]["error"]) == (code, code, error)
    assert events[-1]["event"] == "error"


def test_a_wrong_option_is_told_on_one_line_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", str(folder / "r.toml"), "--json", "--colour"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["exit_code"] == 2


def test_people_read_the_same_in_words(folder: Path) -> None:
    assert any("convert lossless" in line for line in invoke(folder / "r.toml"))


def test_check_writes_nothing(folder: Path) -> None:
    assert json.loads(invoke(folder / "r.toml", "--check", "--json")[0])["outputs"] == ["lossless"]
    assert sorted(p.name for p in folder.iterdir()) == ["model", "r.toml"]


def test_the_schema_is_printed(folder: Path) -> None:
    assert json.loads("\n".join(invoke("--schema"))) == schema()


def test_without_a_recipe_it_is_a_usage_error() -> None:
    assert isinstance(CliRunner().invoke(command, []).exception, UsageError)


def test_the_example_fits_and_names_the_pinned_release() -> None:
    recipe = read_recipe_file(EXAMPLES / "recipe.toml")
    require_sense(recipe)
    assert recipe.source["revision"] == official.load().repos[recipe.source["repo"]].revision


def test_the_example_does_not_compare_on_what_it_calibrates_on() -> None:
    recipe = read_recipe_file(EXAMPLES / "recipe.toml")
    for output in recipe.outputs:
        if "compare" in output.table and "calibration" in output.table:
            compared, calibrated = (
                recipe.texts[n].file for n in (output.table["compare"]["text"], output.table["calibration"])
            )
            assert compared != calibrated


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_every_command_of_the_ci_examples_is_one_of_ours(name: str) -> None:
    text = (EXAMPLES / "ci" / name).read_text()
    assert yaml.safe_load(text)
    commands = [line.split("gptoss-convert ", 1)[1] for line in text.splitlines() if " gptoss-convert run" in line]
    assert len(commands) == 2
    for line in commands:
        verb, *arguments = shlex.split(line.split("|")[0].split(">")[0])
        assert verb == "run"
        command.make_context("run", arguments)

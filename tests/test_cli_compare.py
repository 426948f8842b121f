"""`gptoss-convert compare`: what it refuses before it begins, what it prints, and pages that replace nothing unasked."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.checkpoints import STEADY, Model, write_bf16, write_hf

from gptoss_convert import cli
from gptoss_convert.convert import compare as comparing
from gptoss_convert.convert import conversion
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.progress import silent

Cli = Callable[..., tuple[int, str, str]]
SPEC = replace(STEADY, layers=2, heads=4, experts_per_token=2)
TEXT = "The weights of a model are numbers, and a converter moves them. def convert(source): return 1, 22, 333\n" * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source; q4.gguf, q4: a split one, int8; odd: one weight is NaN; text.txt; tokenizer."""
    folder = tmp_path_factory.mktemp("compare")
    write_hf(Model(SPEC), folder / "source")
    q4 = {"to": "gguf", "type": "q4_0", "allow_larger": True, "proof": False}
    for name, options in (
        ("q4.gguf", q4),
        ("q4", q4 | {"split_bytes": 300_000}),
        ("int8", {"to": "int8", "proof": False}),
    ):
        conversion.convert(folder / "source", folder / name, Options(**options), silent)  # type: ignore[arg-type]
    odd = Model(SPEC)
    odd.tensors["block.1.attn.out.weight"][3, 5] = math.nan
    write_bf16(odd, folder / "odd", rope="parameters")
    (folder / "text.txt").write_text(TEXT)
    (folder / "tokenizer").mkdir()
    for file in (folder / "source").glob("*token*.json"):
        shutil.copy(file, folder / "tokenizer")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process and in that folder: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = 0
        try:
            cli.main(["compare", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work may begin."""

    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work has begun")

    monkeypatch.setattr(comparing, "compare", never)


def refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def parsed(out: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out, parse_constant=refuse)
    return document


INPUTS = {
    "the artifact": ("q4.gguf", "q4.gguf", []),
    "a part of the artifact": ("q4", "q4/q4-00002-of-00003.gguf", []),
    "another part than the named one": ("q4/q4-00001-of-00003.gguf", "q4/q4-00002-of-00003.gguf", []),
    "the source": ("q4.gguf", "source/model-00001-of-00003.safetensors", []),
    "the configuration": ("q4.gguf", "source/config.json", []),
    "the source's tokenizer": ("q4.gguf", "source/tokenizer.json", []),
    "the text": ("q4.gguf", "text.txt", ["--text", "text.txt"]),
    "a tokenizer": ("q4.gguf", "tokenizer/tokenizer.json", ["--tokenizer", "tokenizer"]),
    "the folder of all": ("q4.gguf", ".", []),
}


def states(folder: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("what", INPUTS)
def test_a_report_takes_no_inputs_place_even_when_it_may_overwrite(what: str, folder: Path, run: Cli) -> None:
    artifact, place, more = INPUTS[what]
    assert (folder / place).exists()
    before = states(folder)
    code, _, err = run(artifact, "source", *more, "--report", place, "--overwrite")
    assert code == 2, err
    assert "would take the place of what it is made from" in err
    assert states(folder) == before


@pytest.mark.usefixtures("idle")
def test_a_file_that_exists_is_8_before_any_work_and_stays(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    code, out, err = run("q4.gguf", "source", "--report", tmp_path / "mine.html")
    assert (code, out) == (8, "")
    assert "--overwrite" in err
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.usefixtures("idle")
def test_a_folder_that_is_not_there_is_7_before_any_work(run: Cli, tmp_path: Path) -> None:
    code, _, err = run("q4.gguf", "source", "--report", tmp_path / "missing" / "page.html")
    assert code == 7
    assert "check that the folder exists" in err


def test_a_page_in_the_artifacts_own_folder_is_replaced_when_asked(run: Cli, folder: Path) -> None:
    for more in ([], ["--overwrite"]):
        assert run("int8", "source", "--report", folder / "int8" / "report.html", *more)[0] == 0
    assert run("int8", "source", "--report", folder / "int8" / "report.html")[0] == 8
    page = (folder / "int8" / "report.html").read_text()
    assert "W8A8" in page
    (folder / "int8" / "report.html").unlink()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("gate", ["kld=1", "kld=inf", "expert_error=1", "speed=1"])
def test_a_gate_that_cannot_be_judged_is_2_before_any_work(gate: str, run: Cli) -> None:
    code, _, err = run("nothing.gguf", "nowhere", "--fail-above", gate)
    assert code == 2
    assert "gate" in err


def test_the_result_is_printed_though_the_report_cannot_be_written(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "folder" / "page.html"
    place.parent.mkdir()
    measure = comparing.compare

    def then_lost(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = measure(*arguments, **options)
        place.parent.rmdir()
        return found

    monkeypatch.setattr(comparing, "compare", then_lost)
    code, out, err = run("q4.gguf", "source", "--report", place, "--json")
    assert code == 7
    assert parsed(out)["artifact"]["name"] == "q4.gguf"
    assert "cannot write" in err


@pytest.mark.parametrize("metric", ["tensor_rms", "expert_error", "kld"])
def test_an_artifact_with_one_nan_misses_every_gate_and_is_named(metric: str, run: Cli) -> None:
    code, out, err = run("odd", "source", "--text", "text.txt", "--context", 64, "--fail-above", f"{metric}=0.5")
    assert code == 11
    assert "not finite: the artifact holds values that are NaN or infinite" in out
    assert "model.layers.1.self_attn.o_proj.weight: 1 of them, the first at expert 0, row 3, column 5" in out
    rows = out[out.index("relative RMS") :].splitlines()
    assert rows[1].split()[0] == "model.layers.1.self_attn.o_proj.weight"
    assert "not finite" in rows[1]
    assert f"gate      {metric} ≤ 0.5: not finite, MISSED" in out
    assert "gptoss-convert inspect odd" in err
    assert "nan" not in out.split()


def test_the_json_of_what_is_not_finite_is_strict_and_its_page_a_page(run: Cli, tmp_path: Path) -> None:
    arguments = ["--text", "text.txt", "--context", 64, "--report", tmp_path / "odd.html", "--json"]
    code, out, _ = run("odd", "source", *arguments, "--fail-above", "tensor_rms=1")
    assert code == 11
    found = parsed(out)
    assert found["gates"] == [{"metric": "tensor_rms", "limit": 1, "found": None, "passed": False}]
    assert found["text"]["kld"]["mean"] is None
    page = (tmp_path / "odd.html").read_text()
    assert "The artifact holds values that are not finite." in page


def test_nothing_is_warned_of_on_stderr(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "gptoss_convert", "compare", str(folder / "odd"), str(folder / "source")]
    result = subprocess.run(
        [*command, "--text", str(folder / "text.txt"), "--context", "64"], capture_output=True, text=True, check=True
    )
    assert "Warning" not in result.stderr


def test_int8_is_told_with_what_was_not_measured(run: Cli) -> None:
    assert "note      int8 weights with a scale for each output (W8A8)" in run("int8", "source")[1]
    assert "W8A8" not in run("q4.gguf", "source")[1]


def test_of_one_scored_token_the_error_is_unknown(run: Cli, folder: Path, tmp_path: Path) -> None:
    arguments = ["q4.gguf", "source", "--text", "text.txt", "--context", 4, "--tokens", 4]
    code, out, _ = run(*arguments, "--report", tmp_path / "one.html")
    assert code == 0
    assert "1 of 4 tokens scored" in out
    assert "± unknown" in out
    assert "± unknown" in (tmp_path / "one.html").read_text()
    assert parsed(run(*arguments, "--json")[1])["text"]["kld"]["se"] is None


def test_a_text_without_a_token_to_score_is_2_or_3_and_says_so(run: Cli, tmp_path: Path) -> None:
    for text, said in (("", "fewer than two tokens"), ("a", "fewer than two tokens"), ("a ", "no token to score")):
        (tmp_path / "short.txt").write_text(text)
        code, out, err = run("q4.gguf", "source", "--text", tmp_path / "short.txt")
        assert (code, out) == ((2 if "score" in said else 3), ""), err
        assert said in err

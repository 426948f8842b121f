"""Forecasts: to the byte, from headers alone, with the arithmetic where a type makes no sense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.checkpoints import STEADY, Model, write_bf16, write_hf
from support.sparse import write_sparse_release
from support.tokenizer import small_tokenizer

from gptoss_convert.cli.plan import command
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.forecast import Forecaster
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import Refused
from gptoss_convert.quant.recipe import TYPES

SPEC = replace(STEADY, heads=4, intermediate=288)  # 4 · 64 columns into attention's output, which no widening changes


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_hf(Model(SPEC), folder)
    return folder


@pytest.mark.parametrize("name", ["mxfp4", "q8_0", "q4_0", "q6_k", "q3_k_m", "q2_k", "f16"])
def test_the_written_file_has_the_forecast_bytes(release: Path, tmp_path: Path, name: str) -> None:
    with open_source(release) as source:
        forecast = Forecaster(source).of(TYPES[name])
    convert(release, tmp_path / "x.gguf", Options(to="gguf", type=name, allow_larger=True, proof=False), silent)
    assert (tmp_path / "x.gguf").stat().st_size == forecast.bytes


@pytest.mark.parametrize(("hidden", "intermediate"), [(320, 288), (160, 320), (256, 256), (512, 224)])
def test_a_recipe_with_widths_of_its_own_is_written_in_them_with_the_forecast_bytes(
    release: Path, tmp_path: Path, hidden: int, intermediate: int
) -> None:
    recipe = replace(TYPES["f16"], hidden=hidden, intermediate=intermediate)
    with open_source(release) as source:
        forecast = Forecaster(source).of(recipe)
    widths = f"{hidden}x{intermediate}"
    outcome = convert(
        release, tmp_path / "x.gguf", Options(to="gguf", type="f16", widen=widths, allow_larger=True), silent
    )
    assert (tmp_path / "x.gguf").stat().st_size == forecast.bytes
    config = outcome.plan.source.config
    assert (config.hidden, config.intermediate) == (hidden, intermediate)
    assert bool([loss for loss in outcome.plan.losses if "dropped" in loss]) == (intermediate < 288)


def test_a_recipe_may_not_make_the_residual_stream_narrower(release: Path, tmp_path: Path) -> None:
    options = Options(to="gguf", type="f16", widen="128x288", allow_larger=True)
    with pytest.raises(Refused, match="cannot be made narrower"):
        convert(release, tmp_path / "x.gguf", options, silent)
    with pytest.raises(Refused, match="too many neurons"):
        convert(release, tmp_path / "x.gguf", replace(options, widen="160x192"), silent)


def test_the_lossless_file_has_the_bytes_it_is_said_to_have(release: Path, tmp_path: Path) -> None:
    with open_source(release) as source:
        lossless = Forecaster(source).lossless_bytes
    convert(release, tmp_path / "x.gguf", Options(to="gguf", proof=False), silent)
    assert (tmp_path / "x.gguf").stat().st_size == lossless


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_k_m", "bf16"])
def test_bits_spent_on_packed_experts_for_nothing_are_refused_with_the_arithmetic(
    release: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(Refused, match="makes no sense") as error:
        convert(release, tmp_path / "x.gguf", Options(to="gguf", type=name), silent)
    assert "bits a weight on experts that hold 4.25" in str(error.value)
    assert "--allow-larger" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_bf16_fine_tune_may_become_any_type(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path / "source", rope="parameters", with_dtype=True)
    with open_source(tmp_path / "source") as source:
        assert not [f.type for f in Forecaster(source).every_type() if f.senseless]


def test_the_plan_of_the_released_models_names_what_the_types_promise(tmp_path: Path) -> None:
    small_tokenizer(tmp_path / "tokenizer", 400)
    write_sparse_release("gpt-oss-20b", tmp_path / "gpt-oss-20b", tmp_path / "tokenizer")
    run = CliRunner().invoke(command, [str(tmp_path / "gpt-oss-20b"), "--json"])
    assert run.exit_code == 0, run.output
    types = {row["type"]: row for row in json.loads(run.output)["types"]}
    # Decimal gigabytes; the small tokenizer stands in for 13 MB.
    sizes = {name: types[name]["bytes"] / 1e9 for name in ("mxfp4", "q3_k_s", "q2_k", "q2_k_s")}
    assert sizes == pytest.approx({"mxfp4": 12.1, "q3_k_s": 10.79, "q2_k": 9.32, "q2_k_s": 8.59}, abs=0.011)
    assert types["q2_k"]["widened"] == {"hidden": 3072, "intermediate": 3072}
    assert types["mxfp4"]["widened"] is None


def test_only_types_that_fit_are_listed_on_request(release: Path) -> None:
    whole = json.loads(CliRunner().invoke(command, [str(release), "--json"]).output)["types"]
    limit = sorted(row["bytes"] for row in whole)[3]
    some = json.loads(CliRunner().invoke(command, [str(release), "--json", "--fits", str(limit)]).output)["types"]
    assert sorted(row["bytes"] for row in some) == sorted(row["bytes"] for row in whole)[:4]

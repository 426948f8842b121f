"""Forecasts: to the byte, from headers alone, with the arithmetic where a type makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.checkpoints import STEADY, Model, write_bf16, write_hf
from support.sparse import write_sparse_release
from support.tokenizer import small_tokenizer

from gptoss_convert.cli.plan import command
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.cut import first_ones
from gptoss_convert.convert.forecast import Forecaster
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.target_gguf import plan_gguf
from gptoss_convert.errors import Refused
from gptoss_convert.quant.recipe import TYPES

SPEC = replace(STEADY, heads=4, intermediate=288)  # 4 · 64 columns into attention's output, which no widening changes


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


def test_a_bf16_fine_tune_may_become_any_type_but_f32(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path / "source", rope="parameters", with_dtype=True)
    with open_source(tmp_path / "source") as source:
        senseless = {f.type: f.senseless for f in Forecaster(source).every_type() if f.senseless}
    assert list(senseless) == ["f32"]
    assert "f32 spends 32 bits a weight on experts that hold 16" in str(senseless["f32"])
    with pytest.raises(Refused, match="makes no sense"):
        convert(tmp_path / "source", tmp_path / "x.gguf", Options(to="gguf", type="f32"), silent)


@pytest.mark.parametrize(
    ("held", "asked"), [("q8_0", "f16"), ("q8_0", "bf16"), ("f16", "f32"), ("q3_k_s", "q8_0"), ("q3_k_s", "q3_k_m")]
)
def test_no_source_is_given_more_bits_than_it_holds(release: Path, tmp_path: Path, held: str, asked: str) -> None:
    convert(release, tmp_path / "in.gguf", Options(to="gguf", type=held, allow_larger=True, proof=False), silent)
    with pytest.raises(Refused, match="makes no sense") as error:
        convert(tmp_path / "in.gguf", tmp_path / "x.gguf", Options(to="gguf", type=asked), silent)
    assert "bits a weight on experts that hold" in str(error.value.found)
    larger = Options(to="gguf", type=asked, allow_larger=True)
    convert(tmp_path / "in.gguf", tmp_path / "x.gguf", larger, silent)


@pytest.mark.parametrize("experts", ["f32", "bf16", "q8_0"])
def test_nor_by_the_name_of_a_codec_where_it_is_quantized_already(release: Path, tmp_path: Path, experts: str) -> None:
    convert(release, tmp_path / "in.gguf", Options(to="gguf", type="q3_k_s", allow_larger=True, proof=False), silent)
    with pytest.raises(Refused, match="makes no sense"):
        convert(tmp_path / "in.gguf", tmp_path / "x.gguf", Options(to="gguf", experts=experts), silent)


@pytest.mark.parametrize("experts", ["f32", "bf16", "q8_0"])
def test_mxfp4_experts_get_the_codec_that_is_named_with_the_arithmetic(
    release: Path, tmp_path: Path, experts: str
) -> None:
    outcome = convert(release, tmp_path / "x.gguf", Options(to="gguf", experts=experts), silent)
    (note,) = outcome.plan.notes
    assert f"{experts} spends" in note
    assert "on experts that hold 4.25" in note


def test_floats_get_the_codec_that_is_named(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path / "source", rope="parameters", with_dtype=True)
    outcome = convert(tmp_path / "source", tmp_path / "x.gguf", Options(to="gguf", experts="f32"), silent)
    assert outcome.plan.notes == []
    assert outcome.proof is not None
    assert outcome.proof.lossless


def test_a_cut_file_is_judged_by_its_own_size(release: Path, tmp_path: Path) -> None:
    with open_source(release) as source:
        forecaster = Forecaster(source)
        wide, cut = (forecaster.of(TYPES["q3_k_s"], mode) for mode in ("auto", "cut"))
        assert "more than" in str(wide.senseless)
        assert cut.senseless is None
    convert(release, tmp_path / "x.gguf", Options(to="gguf", type="q3_k_s", widen="cut"), silent)
    assert (tmp_path / "x.gguf").stat().st_size == cut.bytes
    with pytest.raises(Refused, match="makes no sense"):
        convert(release, tmp_path / "y.gguf", Options(to="gguf", type="q3_k_s"), silent)


def test_types_that_cannot_be_made_are_listed_without_a_size_and_with_the_reason(tmp_path: Path) -> None:
    write_hf(Model(STEADY), tmp_path / "in")  # 6 heads of 64: rows of 384 columns
    document = json.loads(CliRunner().invoke(command, [str(tmp_path / "in"), "--json"]).output)
    rows = {row["type"]: row for row in document["types"]}
    assert rows["q8_0"]["impossible"] is None
    for name in ("q6_k", "q3_k_m", "iq2_xxs"):
        assert rows[name]["bytes"] is None
        assert "blk.0.attn_output.weight: 384 columns" in rows[name]["impossible"]
        with pytest.raises(Refused, match="do not divide"):
            convert(tmp_path / "in", tmp_path / "x.gguf", Options(to="gguf", type=name, allow_larger=True), silent)
    table = CliRunner().invoke(command, [str(tmp_path / "in")], env={"COLUMNS": "300"}).output
    assert "impossible: the codec's blocks do not divide" in table
    fitting = json.loads(CliRunner().invoke(command, [str(tmp_path / "in"), "--json", "--fits", "9GB"]).output)["types"]
    assert {row["type"] for row in fitting} == {name for name, row in rows.items() if row["bytes"] is not None}


@pytest.fixture(scope="module", params=["gpt-oss-20b", "gpt-oss-120b"])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release's headers."""
    folder = tmp_path_factory.mktemp("sparse")
    small_tokenizer(folder / "tokenizer", 400)
    write_sparse_release(request.param, folder / request.param, folder / "tokenizer")
    return folder / str(request.param)


@pytest.mark.parametrize("mode", ["auto", "cut"])
def test_every_type_of_the_released_models_has_the_forecast_bytes(sparse: Path, mode: str) -> None:
    with open_source(sparse) as source:
        forecaster = Forecaster(source)
        for name, recipe in TYPES.items():
            plan = plan_gguf(source, recipe, widening=mode, neurons=first_ones)
            assert plan.output_bytes == forecaster.of(recipe, mode).bytes, name


def test_the_plan_of_the_released_models_names_what_the_types_promise(tmp_path: Path) -> None:
    small_tokenizer(tmp_path / "tokenizer", 400)
    write_sparse_release("gpt-oss-20b", tmp_path / "gpt-oss-20b", tmp_path / "tokenizer")
    run = CliRunner().invoke(command, [str(tmp_path / "gpt-oss-20b"), "--json"])
    assert run.exit_code == 0, run.output
    types = {row["type"]: row for row in json.loads(run.output)["types"]}
    # Decimal gigabytes; the small tokenizer stands in for 13 MB.
    sizes = {name: types[name]["bytes"] / 1e9 for name in ("mxfp4", "q3_k_s", "q2_k", "q2_k_s")}
    assert sizes == pytest.approx({"mxfp4": 12.1, "q3_k_s": 10.95, "q2_k": 9.48, "q2_k_s": 8.745}, abs=0.011)
    assert types["q2_k"]["widened"] == {"hidden": 3072, "intermediate": 3072}
    assert types["mxfp4"]["widened"] is None


def test_only_types_that_fit_are_listed_on_request(release: Path) -> None:
    whole = json.loads(CliRunner().invoke(command, [str(release), "--json"]).output)["types"]
    limit = sorted(row["bytes"] for row in whole)[3]
    some = json.loads(CliRunner().invoke(command, [str(release), "--json", "--fits", str(limit)]).output)["types"]
    assert sorted(row["bytes"] for row in some) == sorted(row["bytes"] for row in whole)[:4]

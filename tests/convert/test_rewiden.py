"""GGUFs as the source of widened files: gains that are float32 there, files of ours that are wide or cut, odd epsilons."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.checkpoints import STEADY, Model, write_hf

from gptoss_convert.convert.conversion import Options, Outcome, convert
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.convert.names import EMBEDDING, FINAL_NORM
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.widen import GAIN_ROUNDING, GAINS_ROUNDED, KEY_GAIN
from gptoss_convert.quant.recipe import TYPES

SPEC = replace(STEADY, heads=4, intermediate=288)


def made(source: Path, target: Path, **options: object) -> Outcome:
    return convert(source, target, Options(to="gguf", allow_larger=True, **options), silent)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """release/, and GGUFs made from it: native.gguf, wide.gguf (q3_k_s, 256 and 512 columns), cut.gguf (256 and 256)."""
    folder = tmp_path_factory.mktemp("sources")
    write_hf(Model(SPEC), folder / "release")
    made(folder / "release", folder / "native.gguf")
    made(folder / "release", folder / "wide.gguf", type="q3_k_s")
    made(folder / "release", folder / "cut.gguf", type="q3_k_s", widen="cut")
    return folder


def with_gains(source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a GGUF with other gains in all norms over the residual stream."""
    shutil.copy(source, target)
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_norm.weight", "attention_norm.weight", "output_norm.weight")):
            tensor.data[:] = change(np.array(tensor.data))
    reader.data.flush()
    return target


def any_floats(gains: np.ndarray) -> np.ndarray:
    return np.random.default_rng(len(gains)).uniform(0.1, 4, gains.shape).astype(np.float32)


def verdicts(outcome: Outcome) -> dict[str, str]:
    assert outcome.proof is not None
    return {tensor.name: tensor.verdict for tensor in outcome.proof.tensors}


def test_gains_that_are_bfloat16s_in_float32_come_back_exactly(folder: Path, tmp_path: Path) -> None:
    outcome = made(folder / "native.gguf", tmp_path / "x.gguf", widen="256x320")
    assert outcome.proof is not None
    assert outcome.proof.lossless
    assert outcome.document["lost"] == []
    with open_source(tmp_path / "x.gguf") as source:
        assert source.metadata[KEY_GAIN].value == "bf16"


def test_any_other_gains_are_rounded_to_float32_and_the_plan_the_certificate_and_the_reader_say_so(
    folder: Path, tmp_path: Path
) -> None:
    source = with_gains(folder / "native.gguf", tmp_path / "in.gguf", any_floats)
    outcome = made(source, tmp_path / "x.gguf", widen="256x320")
    assert outcome.plan.losses == [GAINS_ROUNDED]
    assert GAINS_ROUNDED in outcome.document["lost"]
    assert outcome.proof is not None
    off = {tensor.name: tensor.rms_error for tensor in outcome.proof.tensors if tensor.verdict == "different"}
    assert FINAL_NORM in off
    assert all("norm" in name and error <= GAIN_ROUNDING for name, error in off.items())
    with open_source(tmp_path / "x.gguf") as made_source:
        assert made_source.losses == [GAINS_ROUNDED]


def test_gains_of_any_floats_survive_a_widening_by_a_square(folder: Path, tmp_path: Path) -> None:
    source = with_gains(folder / "native.gguf", tmp_path / "in.gguf", any_floats)
    outcome = made(source, tmp_path / "x.gguf", widen="640x288")  # √(160/640) = 1/2
    assert outcome.proof is not None
    assert outcome.proof.lossless
    assert outcome.document["lost"] == []


def test_gains_of_a_wide_file_are_not_rounded_a_second_time(folder: Path, tmp_path: Path) -> None:
    source = with_gains(folder / "native.gguf", tmp_path / "in.gguf", any_floats)
    made(source, tmp_path / "wide.gguf", type="q3_k_s")
    outcome = made(tmp_path / "wide.gguf", tmp_path / "again.gguf", type="q2_k_s")
    assert {v for name, v in verdicts(outcome).items() if name.endswith("norm.weight")} == {"byte-equal"}


def test_a_wide_file_becomes_another_type_of_its_widths_with_all_else_kept(folder: Path, tmp_path: Path) -> None:
    outcome = made(folder / "wide.gguf", tmp_path / "x.gguf", type="q2_k_s")
    found = verdicts(outcome)
    assert {v for name, v in found.items() if not name.endswith("_proj")} == {"byte-equal"}
    assert {v for name, v in found.items() if name.endswith(("gate_up_proj", "down_proj"))} == {"different"}
    plan = foresee(folder / "wide.gguf", tmp_path / "y.gguf", Options(to="gguf", type="q2_k_s", allow_larger=True))
    fates = {row["tensor"]: row["fate"] for row in plan["tensors"]}
    assert fates["token_embd.weight"] == "bits kept"
    assert fates["blk.0.ffn_down_exps.weight"] == "rounded to q2_k"


def test_a_cut_file_becomes_another_type_of_its_widths_and_drops_no_more(folder: Path, tmp_path: Path) -> None:
    outcome = made(folder / "cut.gguf", tmp_path / "x.gguf", type="q2_k_s", widen="cut")
    assert verdicts(outcome)[EMBEDDING] == "byte-equal"
    assert outcome.plan.losses == []
    with open_source(folder / "cut.gguf") as before, open_source(tmp_path / "x.gguf") as after:
        assert before.kept is not None
        assert after.kept is not None
        assert all(np.array_equal(before.kept[n], after.kept[n]) for n in before.kept)


@pytest.mark.parametrize("name", ["wide.gguf", "cut.gguf"])
@pytest.mark.parametrize("widths", ["512x768", "512x288"])
def test_in_other_widths_it_is_encoded_anew_and_said_so(folder: Path, tmp_path: Path, name: str, widths: str) -> None:
    options = Options(to="gguf", type="q2_k_s" if widths == "512x768" else "mxfp4", widen=widths, allow_larger=True)
    outcome = convert(folder / name, tmp_path / "x.gguf", options, silent)
    codec = TYPES[str(options.type)].codecs["embedding"]
    # What comes of the same codec is encoded to the same values, though in other blocks to other bytes.
    assert verdicts(outcome)[EMBEDDING] == ("value-equal" if widths == "512x768" else "different")
    rows = foresee(folder / name, tmp_path / "y.gguf", options)["tensors"]
    assert {row["tensor"]: row["fate"] for row in rows}["token_embd.weight"] == f"rounded to {codec}"


def test_a_wide_file_that_is_copied_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    made(folder / "wide.gguf", tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == (folder / "wide.gguf").read_bytes()


@pytest.mark.parametrize("eps", [1e-5, 1.2345678e-5, 9.9999997e-6, 3e-7])
def test_any_epsilon_comes_back_from_a_wide_file(folder: Path, tmp_path: Path, eps: float) -> None:
    shutil.copytree(folder / "release", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": eps}))
    made(tmp_path / "in", tmp_path / "x.gguf", type="q2_k_s", proof=True)
    with open_source(tmp_path / "x.gguf") as source:
        assert source.config.rms_eps == pytest.approx(eps, rel=2**-23)


def test_gate_and_up_in_two_encodings_are_proved_by_the_bounds_of_both(folder: Path, tmp_path: Path) -> None:
    parts = {"gate": "q2_k", "up": "q3_k", "down": "q3_k", "attention": "q8_0", "embedding": "q8_0", "head": "q8_0"}
    (tmp_path / "r.toml").write_text("".join(f'{part} = "{codec}"\n' for part, codec in parts.items()))
    for widen in ("auto", "cut"):
        outcome = made(folder / "release", tmp_path / f"{widen}.gguf", recipe=tmp_path / "r.toml", widen=widen)
        assert outcome.proof is not None
        (found,) = (t for t in outcome.proof.tensors if t.name == "model.layers.0.mlp.experts.gate_up_proj")
        assert 0.05 < found.rms_error < 0.4

"""--base: a fine-tune's unchanged blocks keep the release's very bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import AWKWARD, SMALL, SQUARE, Model, write_bf16, write_hf

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.rebase import count_blocks
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import BadInput, ProofFailed, Refused, UsageError

TUNED = "model.layers.1.mlp.experts.down_proj"  # [E, in, out]
Change = Callable[[str, torch.Tensor], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, and a fine-tune of it that changed one output row of an expert and one weight of another."""
    root = tmp_path_factory.mktemp("tuned")
    model = Model(SMALL, awkward=AWKWARD)
    write_hf(model, root / "release")
    write_bf16(model, root / "tuned", rope="parameters", with_dtype=True)
    for path in (root / "tuned").glob("*.safetensors"):
        tensors = load_file(path)
        if TUNED in tensors:
            tensors[TUNED][2, :, 5] += 0.3
            tensors[TUNED][3, 4, 7] = 0 if tensors[TUNED][3, 4, 7] else 1.0
            save_file(tensors, path, metadata={"format": "pt"})
    return root


def tune(folder: Path, change: Change) -> Path:
    """A fine-tune of the release: `change` alters tensors by name, in place."""
    write_bf16(Model(SMALL, awkward=AWKWARD), folder, rope="parameters", with_dtype=True)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            change(name, tensor)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("to", "name"), [("hf", "out"), ("gguf", "out.gguf"), ("original", "original"), ("onnx", "onnx")]
)
def test_unchanged_blocks_keep_the_release_bytes(folder: Path, tmp_path: Path, to: str, name: str) -> None:
    options = Options(to=to, experts="mxfp4" if to == "gguf" else "auto", base=folder / "release")
    outcome = convert(folder / "tuned", tmp_path / name, options, silent)
    blocks = outcome.document["base"]["blocks"]
    assert blocks["blocks"] == 3 * 6 * (192 * 5 + 160 * 3)
    assert blocks["changed"] == 4  # three groups of the changed row, one of the changed weight
    assert blocks["kept"] == blocks["unchanged"] == blocks["blocks"] - 4
    assert 3 <= blocks["rounded"] <= 4
    with open_source(tmp_path / name) as made, open_source(folder / "release") as release:
        for view_name, view in release.views.items():
            if ".experts." in view_name and not view_name.endswith("_bias"):
                for expert in range(6):
                    mine = made.views[view_name].read(expert, 0, view.stack[1])
                    theirs = view.read(expert, 0, view.stack[1])
                    touched = view_name == TUNED and expert in (2, 3)
                    assert mine.same_bytes(theirs) != touched


def test_without_a_base_values_survive_but_not_all_bytes(folder: Path, tmp_path: Path) -> None:
    write_bf16(Model(SMALL, awkward=AWKWARD), tmp_path / "same", rope="parameters", with_dtype=True)
    outcome = convert(tmp_path / "same", tmp_path / "plain", Options(to="hf"), silent)
    assert outcome.proof is not None
    assert outcome.proof.lossless
    with open_source(tmp_path / "plain") as made, open_source(folder / "release") as release:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        a, b = (s.views[name].read(0, 0, 192) for s in (made, release))
        assert np.array_equal(a.values(), b.values())
        assert not a.same_bytes(b)


def test_a_release_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    write_hf(Model(SQUARE), tmp_path / "other")
    with pytest.raises(Refused, match="not the MXFP4 release of this model") as error:
        convert(folder / "tuned", tmp_path / "out", Options(to="hf", base=tmp_path / "other"), silent)
    assert error.value.tensor == "model.layers.0.mlp.experts.gate_up_proj"


def test_a_packed_source_needs_no_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="MXFP4 already"):
        convert(folder / "release", tmp_path / "out", Options(to="hf", base=folder / "release"), silent)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "q3_k_m", "allow_larger": True},
        {"type": "q8_0"},
        {"experts": "q8_0"},
        {"experts": "bf16", "proof": False},
        {"type": "mxfp4", "widen": "160x64"},
    ],
    ids=str,
)
@pytest.mark.parametrize("run", ["convert", "foresee"])
def test_a_base_is_refused_unless_every_expert_becomes_mxfp4(
    folder: Path, tmp_path: Path, choice: dict[str, Any], run: str
) -> None:
    """Going by way of MXFP4 would round twice, and there is no release's block to keep."""
    options = Options(to="gguf", base=folder / "release", **choice)
    with pytest.raises(UsageError, match="--base") as error:
        if run == "convert":
            convert(folder / "tuned", tmp_path / "m.gguf", options, silent)
        else:
            foresee(folder / "tuned", tmp_path / "m.gguf", options)
    assert error.value.remedy is not None
    assert "leave --base out" in error.value.remedy
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("choice", [{"experts": "int8"}, {"experts": "int4"}, {"onnx_runtime": "1.28"}], ids=str)
def test_a_base_is_refused_for_integer_experts_of_onnx(folder: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--base is for experts that become MXFP4"):
        convert(folder / "tuned", tmp_path / "m", Options(to="onnx", base=folder / "release", **choice), silent)
    assert not (tmp_path / "m").exists()


def test_a_base_is_refused_for_a_target_without_mxfp4(folder: Path, tmp_path: Path) -> None:
    for run in (convert, foresee):
        with pytest.raises(UsageError, match="MXFP4 experts"):
            run(
                folder / "tuned",
                tmp_path / "m",
                Options(to="bf16", base=folder / "release"),
                *[silent][: run is convert],
            )


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused_with_its_place(
    folder: Path, tmp_path: Path, value: float, proof: bool
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> None:
        if name == TUNED:
            tensor[2, 7, 5] = value

    bad = tune(tmp_path / "bad", spoil)
    with pytest.raises(BadInput, match="not a finite number") as error:
        convert(bad, tmp_path / "m.gguf", Options(to="gguf", base=folder / "release", proof=proof), silent)
    assert error.value.tensor == TUNED
    assert error.value.found == "at expert 2, row 5, column 7"
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("to", "name"), [("gguf", "m.gguf"), ("hf", "m")])
def test_the_dry_run_plans_what_the_run_writes(folder: Path, tmp_path: Path, to: str, name: str) -> None:
    options = Options(to=to, base=folder / "release")
    told = foresee(folder / "tuned", tmp_path / name, options)
    outcome = convert(folder / "tuned", tmp_path / name, options, silent)
    assert told["output_bytes"] == outcome.plan.output_bytes
    experts = [row for row in told["tensors"] if is_expert_matrix(row["source"])]
    assert {row["codec"] for row in experts} == ({"mxfp4"} if to == "gguf" else {"blocks", "scales"})
    assert all("keep the base's bytes" in row["fate"] for row in experts)


def test_every_block_is_counted_for_what_became_of_it(folder: Path, tmp_path: Path) -> None:
    """A fine-tune scaled by one bfloat16 step changes every block that holds anything; most round back to the release."""

    def scale(name: str, tensor: torch.Tensor) -> None:
        if name.endswith("experts.down_proj"):
            tensor *= 1.0078125
        if name == "model.layers.0.mlp.experts.gate_up_proj":
            tensor *= 2  # all exact, none the release's

    tuned = tune(tmp_path / "tuned", scale)
    outcome = convert(tuned, tmp_path / "m.gguf", Options(to="gguf", base=folder / "release"), silent)
    found = dict.fromkeys(("unchanged", "value_equal_to_the_release", "kept", "exact", "blocks"), 0)
    with (
        open_source(tuned) as before,
        open_source(tmp_path / "m.gguf") as after,
        open_source(folder / "release") as release,
    ):
        for name in filter(is_expert_matrix, before.views):
            for expert in range(6):
                s, w, r = (x.views[name].read(expert, 0, x.views[name].stack[1]) for x in (before, after, release))
                same = {
                    "unchanged": s.values() == r.values(),
                    "value_equal_to_the_release": w.values() == r.values(),
                    "exact": w.values() == s.values(),
                }
                for what, equal in same.items():
                    found[what] += int(equal.reshape(-1, 32).all(axis=1).sum())
                found["kept"] += int(((w.blocks == r.blocks).all(axis=2) & (w.scales == r.scales)).sum())
                found["blocks"] += w.scales.size
    blocks = outcome.document["base"]["blocks"]
    assert {what: blocks[what] for what in found} == found
    assert found["kept"] == found["value_equal_to_the_release"]  # no second spelling of the release's values
    assert blocks["unchanged"] + blocks["changed"] == blocks["exact"] + blocks["rounded"] == blocks["blocks"]
    changed = [blocks[f"changed_and_{what}"] for what in ("exact", "rounded_to_the_release", "rounded_elsewhere")]
    assert sum(changed) == blocks["changed"]
    assert changed[0] > 1000 < changed[1]
    assert blocks["kept"] == blocks["unchanged"] + changed[1]


def test_an_unchanged_block_in_other_bytes_fails_the_proof(folder: Path, tmp_path: Path) -> None:
    """The same values are not enough: without --base they come in other bytes."""
    convert(folder / "tuned", tmp_path / "m.gguf", Options(to="gguf", experts="mxfp4"), silent)
    with (
        open_source(folder / "tuned") as before,
        open_source(tmp_path / "m.gguf") as after,
        open_source(folder / "release") as release,
        pytest.raises(ProofFailed, match="lost the release's bytes"),
    ):
        count_blocks(before, after, release, 2)


@pytest.mark.parametrize("proof", [True, False])
def test_the_certificate_names_the_base_by_its_files(folder: Path, tmp_path: Path, proof: bool) -> None:
    options = Options(to="gguf", base=folder / "release", proof=proof)
    base = convert(folder / "tuned", tmp_path / "m.gguf", options, silent).document["base"]
    assert base["layout"] == "hf"
    for file in base["files"]:
        data = (folder / "release" / file["name"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {file["name"] for file in base["files"]} == {p.name for p in (folder / "release").glob("*.safetensors")}
    assert base["official_weights"] is False
    assert (base["blocks"] is None) == (not proof)

"""auto: a GGUF made from a GGUF has every tensor's own bytes, whatever mixture of types they are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.checkpoints import STEADY, Model, write_hf

from gptoss_convert.cli.convert import command
from gptoss_convert.convert.calibration import Wish
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.errors import Refused, UsageError

PARTS = ("gate", "up", "down", "attention", "embedding", "head")
RECIPES = {
    "one type of 32": ("q4_0",) * 6,
    "experts in one type, the rest in another": ("q5_1", "q5_1", "q5_1", "q8_0", "q4_1", "f16"),
    "gate and up apart": ("q4_0", "q8_0", "mxfp4", "q8_0", "bf16", "f32"),
    "one layer's down apart": ("iq4_nl", "iq4_nl", "iq4_nl", "q8_0", "q8_0", "q8_0"),
    "blocks of 256, widened": ("q3_k", "q3_k", "q3_k", "q6_k", "q4_k", "q6_k"),
    "blocks of 256, gate and up apart": ("q2_k", "iq4_xs", "q4_k", "q5_k", "q4_k", "q8_0"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "hf"
    write_hf(Model(replace(STEADY, heads=4, intermediate=288)), folder)
    return folder


def recipe(folder: Path, name: str) -> Path:
    text = "".join(f'{part} = "{codec}"\n' for part, codec in zip(PARTS, RECIPES[name], strict=True))
    if name == "one layer's down apart":
        text += '[[rule]]\nmatch = "blk.1.ffn_down_exps.weight"\ncodec = "q5_1"\n'
    path = folder / "own.toml"
    path.write_text(text)
    return path


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, np.asarray(t.data).tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("name", RECIPES)
def test_auto_keeps_every_tensors_type_and_bytes(source: Path, tmp_path: Path, name: str, convert: Any) -> None:
    convert(source, tmp_path / "a.gguf", "gguf", recipe=recipe(tmp_path, name), allow_larger=True)
    told = foresee(tmp_path / "a.gguf", tmp_path / "b.gguf", Options("gguf"))
    outcome = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf")
    before, after = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    assert {name: kind for name, (kind, _) in after.items()} == {name: kind for name, (kind, _) in before.items()}
    assert [name for name in before if before[name] != after[name]] == []
    assert outcome.document["lossless"] is True
    assert outcome.proof.count("byte-equal") == len(outcome.proof.tensors)
    assert {row["fate"] for row in told["tensors"]} <= {"bits kept", "bits moved"}


def test_what_is_asked_for_and_what_is_kept_may_differ(source: Path, tmp_path: Path, convert: Any) -> None:
    given = recipe(tmp_path, "experts in one type, the rest in another")
    convert(source, tmp_path / "a.gguf", "gguf", recipe=given, allow_larger=True)
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", experts="q8_0", allow_larger=True)
    before, after = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "_exps.weight" in name}
    assert {after[name][0] for name in changed} == {"Q8_0"}


def test_asking_for_an_experts_codec_outside_the_list_is_refused(source: Path, tmp_path: Path, convert: Any) -> None:
    with pytest.raises(UsageError, match="--experts cannot be q3_k") as error:
        convert(source, tmp_path / "a.gguf", "gguf", experts="q3_k")
    assert "mxfp4" in str(error.value.expected)


@pytest.mark.parametrize("widths", ["512x512", "none"])
def test_bits_that_other_widths_would_change_are_refused(
    source: Path, tmp_path: Path, widths: str, convert: Any
) -> None:
    given = recipe(tmp_path, "blocks of 256, widened")
    convert(source, tmp_path / "a.gguf", "gguf", recipe=given, allow_larger=True)
    with pytest.raises(Refused) as error:
        convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", widen=widths)
    assert error.value.tensor is not None
    assert error.value.remedy is not None


def test_types_of_32_are_widened_by_blocks_of_zeros(source: Path, tmp_path: Path, convert: Any) -> None:
    convert(source, tmp_path / "a.gguf", "gguf", recipe=recipe(tmp_path, "one type of 32"), allow_larger=True)
    outcome = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", widen="160x512")
    assert outcome.document["lossless"] is True
    assert {kind for name, (kind, _) in tensors(tmp_path / "b.gguf").items() if "_exps.weight" in name} == {"Q4_0"}


def test_a_file_whose_experts_were_cut_is_not_encoded_anew_in_silence(
    source: Path, tmp_path: Path, convert: Any
) -> None:
    given = recipe(tmp_path, "blocks of 256, widened")
    convert(source, tmp_path / "a.gguf", "gguf", recipe=given, allow_larger=True, widen="cut")
    with pytest.raises(Refused, match="cannot be kept") as error:
        convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf")
    assert "_exps.weight" in str(error.value.tensor)


def test_experts_stored_in_two_float_types_come_out_in_the_one_that_holds_both(
    layouts: dict[str, Path], copied: Callable[[Path], Path], tmp_path: Path, convert: Any
) -> None:
    folder = copied(layouts["linearised"])
    stem = "model.layers.1.mlp.experts.down_projs.2."
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        for name in {stem + "weight", stem + "bias"} & set(held):
            held[name] = held[name].float() + 2.0**-20
            assert not torch.equal(held[name].bfloat16().float(), held[name])
        save_file(held, path, metadata={"format": "pt"})
    outcome = convert(folder, tmp_path / "m.gguf", "gguf")
    assert outcome.document["lossless"] is True
    made = {name: kind for name, (kind, _) in tensors(tmp_path / "m.gguf").items()}
    assert {n: made[f"blk.{n}.ffn_down_exps.weight"] for n in range(3)} == {0: "BF16", 1: "F32", 2: "BF16"}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    "options",
    [("--to", "bf16"), ("--to", "hf"), ("--to", "gguf"), ("--to", "int8-g32"), ("--to", "gguf", "--dense", "f32")],
)
def test_a_method_that_would_round_nothing_is_refused_before_any_work(
    hf_folder: Path, tmp_path: Path, options: tuple[str, ...], dry: bool
) -> None:
    given = [str(hf_folder), str(tmp_path / "out.gguf"), *options, "--method", "gptq", "--calibration", "default"]
    done = CliRunner().invoke(command, [*given, *(["--dry-run"] if dry else [])])
    assert isinstance(done.exception, UsageError)
    assert "no matrix is rounded" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_the_memory_of_calibration(hf_folder: Path, tmp_path: Path) -> None:
    told = [
        foresee(hf_folder, tmp_path / "o.gguf", Options("gguf", type="q4_0", allow_larger=True, rounding=wish))[
            "peak_memory_bytes"
        ]
        for wish in (Wish(), Wish("gptq", "default"))
    ]
    assert told[1] > told[0] + 500_000_000

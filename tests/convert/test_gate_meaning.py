"""gate_proj of a per-expert checkpoint: its meaning is measured where the weights tell, and asked for where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.canonical import canonical_values
from support.checkpoints import SMALL, SQUARE, Model, write_per_expert

from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.errors import Refused

Meaning = Literal["deinterleaved", "halves"]
MEANINGS: list[Meaning] = ["deinterleaved", "halves"]
GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"


def holds(source: Source, model: Model) -> bool:
    """Whether gate and up are read as the model has them."""
    expected = canonical_values(model)
    same = []
    for layer in range(model.spec.layers):
        for suffix in ("", "_bias"):
            name = GATE_UP.format(layer) + suffix
            view = source.views[name]
            found = np.stack([view.read(e, 0, view.stack[1]).values() for e in range(view.stack[0])])
            same.append(np.array_equal(found, expected[name]))
    return all(same)


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("spec", [SMALL, SQUARE, replace(SMALL, layers=1), replace(SMALL, seed=9)], ids=str)
def test_the_weights_tell_the_meaning(meaning: Meaning, spec: Any, tmp_path: Path) -> None:
    model = Model(spec)
    write_per_expert(model, tmp_path, meaning)
    with open_source(tmp_path) as source:
        source.require_sound()
        assert source.gate_meaning == meaning
        assert any(f"as measured from biases and row norms: {meaning}" in note for note in source.notes)
        assert holds(source, model)


@pytest.fixture(scope="module")
def parity_free() -> Model:
    return Model(replace(SMALL, experts=4), parity_free=True)


@pytest.mark.parametrize("meaning", MEANINGS)
def test_where_the_weights_do_not_tell_nothing_is_guessed(meaning: Meaning, parity_free: Model, tmp_path: Path) -> None:
    write_per_expert(parity_free, tmp_path, meaning)
    with pytest.raises(Refused, match="two known meanings") as error:
        open_source(tmp_path)
    assert "--gate-proj" in str(error.value.remedy)


@pytest.mark.parametrize("told", MEANINGS)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_the_user_decides_where_the_weights_do_not(
    meaning: Meaning, told: Meaning, parity_free: Model, tmp_path: Path
) -> None:
    write_per_expert(parity_free, tmp_path, meaning)
    with open_source(tmp_path, gate_proj=told) as source:
        assert source.gate_meaning == told
        assert any("as told" in note for note in source.notes)
        assert holds(source, parity_free) == (told == meaning)


def test_the_user_decides_for_a_conversion_too(parity_free: Model, tmp_path: Path, convert: Any) -> None:
    write_per_expert(parity_free, tmp_path / "source", "halves")
    with pytest.raises(Refused, match="two known meanings"):
        convert(tmp_path / "source", tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    outcome = convert(tmp_path / "source", tmp_path / "out", "hf", gate_proj="halves")
    assert outcome.proof.lossless
    with open_source(tmp_path / "out") as source:
        assert holds(source, parity_free)


def test_telling_the_wrong_meaning_against_clear_weights_is_followed_and_noted(
    small_model: Model, tmp_path: Path
) -> None:
    write_per_expert(small_model, tmp_path, "deinterleaved")
    with open_source(tmp_path, gate_proj="halves") as source:
        assert source.gate_meaning == "halves"
        assert any("though biases and row norms say deinterleaved" in note for note in source.notes)
        assert not holds(source, small_model)


def test_layers_that_disagree_decide_nothing(small_model: Model, tmp_path: Path) -> None:
    """Layer 1's gate rows are swapped in parity, so that its statistics speak for the other meaning."""
    from safetensors.torch import load_file, save_file

    write_per_expert(small_model, tmp_path, "deinterleaved")
    other = tmp_path / "halves"
    write_per_expert(small_model, other, "halves")
    mine, theirs = ({}, {})
    for folder, all_tensors in ((tmp_path, mine), (other, theirs)):
        for path in sorted(folder.glob("*.safetensors")):
            all_tensors.update(load_file(path))
            path.unlink()
        (folder / "model.safetensors.index.json").unlink()
    mixed: dict[str, torch.Tensor] = {name: (theirs if ".layers.1." in name else mine)[name] for name in mine}
    save_file(mixed, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="two known meanings"):
        open_source(tmp_path)

"""metal's model.bin: what is folded in comes out exactly, what the file has lost is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.canonical import canonical_values
from support.checkpoints import SMALL, SQUARE, Model, write_metal
from support.metal import KEPT_SPECIALS

from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import BadInput


@pytest.fixture(scope="module")
def written(awkward_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metal") / "model.bin"
    write_metal(awkward_model, path)
    return path


def test_what_is_lost_for_good_is_said_in_source_and_certificate(written: Path, tmp_path: Path, convert: Any) -> None:
    rows = SMALL.text_tokens + KEPT_SPECIALS
    with open_source(written) as source:
        assert source.config.vocab == rows
        assert any(f"rows from {rows} on" in line for line in source.losses)
        assert any("chat template" in line for line in source.losses)
    outcome = convert(written, tmp_path / "out", "hf")
    assert outcome.proof.lossless  # of what the file holds
    assert outcome.document["lost"] == source.losses


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rotation_and_factors_come_out_exactly_for_any_rows(part: str, written: Path, awkward_model: Model) -> None:
    values = canonical_values(awkward_model)
    with open_source(written) as source:
        for layer in range(SMALL.layers):
            for suffix in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{part}_proj.{suffix}"
                view = source.views[name]
                for start, stop in ((0, 1), (63, 66), (5, 128), (0, view.stack[1])):
                    if stop <= view.stack[1]:
                        assert np.array_equal(view.read(0, start, stop).values(), values[name][0, start:stop])


def test_scale_bytes_wrap_back(tmp_path: Path) -> None:
    """The release's script adds 14 to a byte: scales of 242 and more wrap round, and must come back."""
    model = Model(replace(SMALL, layers=1))
    for matrix in ("mlp1", "mlp2"):
        scales = model.tensors[f"block.0.mlp.{matrix}_weight.scales"]
        scales.view(-1)[: len(scales.view(-1))] = (
            torch.arange(scales.numel(), dtype=torch.int64).remainder(256).to(torch.uint8)
        )
    write_metal(model, tmp_path / "model.bin")
    with open_source(tmp_path / "model.bin") as source:
        view = source.views["model.layers.0.mlp.experts.down_proj"]
        found = np.stack([view.read(e, 0, view.stack[1]).scales for e in range(view.stack[0])])  # type: ignore[union-attr]
    assert np.array_equal(found, model.tensors["block.0.mlp.mlp2_weight.scales"].numpy())


@pytest.mark.parametrize("spec", [SMALL, SQUARE, replace(SMALL, layers=1), replace(SMALL, vocab=401)], ids=str)
def test_the_configuration_is_worked_out_of_the_header(spec: Any, tmp_path: Path) -> None:
    write_metal(Model(spec), tmp_path / "model.bin")
    with open_source(tmp_path / "model.bin") as source:
        config = source.config
    assert (config.layers, config.experts, config.hidden, config.intermediate) == (
        spec.layers,
        spec.experts,
        spec.hidden,
        spec.intermediate,
    )
    assert (config.beta_fast, config.beta_slow, config.rope_factor) == (32.0, 1.0, spec.rope_factor)
    assert (config.rope_theta, config.original_positions, config.max_positions) == (
        spec.rope_theta,
        spec.initial_context,
        8192,
    )
    assert (config.rms_eps, config.swiglu_limit, config.sliding_window) == (1e-5, 7.0, spec.sliding_window)


def test_a_file_cut_anywhere_is_bad_input(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    for size in (0, 11, 16, 99, 147, 148, 500, 16384, len(data) // 2, len(data) - 1):
        (tmp_path / "model.bin").write_bytes(data[:size])
        with pytest.raises(BadInput):
            open_source(tmp_path / "model.bin")


def test_any_byte_of_the_header_may_be_anything_without_a_crash(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    path = tmp_path / "model.bin"
    for at in range(0, 148):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 : 20000])
            with pytest.raises(BadInput):  # a cut file, at the latest
                open_source(path)

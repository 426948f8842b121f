"""--base: a fine-tune's unchanged blocks keep the release's very bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import AWKWARD, SMALL, SQUARE, Model, write_bf16, write_hf

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import Refused

TUNED = "model.layers.1.mlp.experts.down_proj"  # [E, in, out]


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


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
            tensors[TUNED][2, :, 5] += 0.01
            tensors[TUNED][3, 4, 7] = 0 if tensors[TUNED][3, 4, 7] else 1.0
            save_file(tensors, path, metadata={"format": "pt"})
    return root


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("gguf", "out.gguf"), ("original", "original")])
def test_unchanged_blocks_keep_the_release_bytes(folder: Path, tmp_path: Path, to: str, name: str) -> None:
    options = Options(to=to, experts="mxfp4" if to == "gguf" else "auto", base=folder / "release")
    outcome = convert(folder / "tuned", tmp_path / name, options, silent)
    blocks = outcome.document["base"]
    assert blocks["blocks"] == 3 * 6 * (192 * 5 + 160 * 3)
    assert blocks["blocks"] - blocks["kept"] == 4  # three groups of the changed row, one of the changed weight
    assert blocks["rounded"] >= 3
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

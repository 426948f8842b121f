"""Full Hessians: what calibrate writes of them, a layer at a time, and what is read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.activations import inputs_in_transformers
from support.checkpoints import SMALL, Model, write_hf

from gptoss_convert.convert import calibrate as calibrating
from gptoss_convert.convert.calibrate import calibrate
from gptoss_convert.convert.forward import Walk, Weights
from gptoss_convert.convert.hessians import MARKER, Reader, stored_name
from gptoss_convert.convert.names import DOWN, GATE_UP, HEAD, layer_name
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.statistics import Inputs, Statistics, matrices
from gptoss_convert.convert.texts import Texts
from gptoss_convert.errors import BadInput, CannotWrite, TargetExists, UsageError
from gptoss_convert.quant.shrinkage import own_weight

SPEC = replace(SMALL, experts=8)
Q = layer_name(1, "self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_hf(Model(SPEC), folder)
    return folder


def texts() -> Texts:
    random = np.random.default_rng(3)
    sequences = [random.integers(0, SPEC.text_tokens, n).astype(np.int32) for n in (50, 50, 31)]
    return Texts(sequences, "some.txt", "ab" * 32, 131, {"text": 1})


def run(checkpoint: Path, folder: Path, name: str = "s.gguf") -> Statistics:
    return calibrate(
        checkpoint, folder / name, lambda _: texts(), context=50, hessians=folder / f"{name}.hessians", show=silent
    )[0]


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Statistics, Path]:
    folder = tmp_path_factory.mktemp("made")
    return run(checkpoint, folder), folder / "s.gguf.hessians"


def test_a_hessian_is_the_mean_of_x_xt_over_what_the_model_multiplies(
    checkpoint: Path, made: tuple[Statistics, Path]
) -> None:
    inputs = inputs_in_transformers(Model(SPEC), texts().sequences, 1)
    with open_source(checkpoint) as source:
        reader = Reader(made[1], source.config)
    for name, key, layer in (
        (Q, "q", 1), (layer_name(1, "self_attn.v_proj.weight"), "q", 1),
        (layer_name(1, "self_attn.o_proj.weight"), "o", 1), (HEAD, "head", None),
    ):  # fmt: skip
        x = np.concatenate(inputs[key])
        wanted = x.T @ x / len(x)
        found = reader.hessian(layer, name, 0).numpy()
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5 * np.abs(wanted).max())
        assert (found == found.T).all()


def test_an_experts_hessian_leans_on_the_layers_other_tokens_as_far_as_it_is_short(
    checkpoint: Path, made: tuple[Statistics, Path]
) -> None:
    with open_source(checkpoint) as source:
        reader = Reader(made[1], source.config)
        walk = Walk(Weights(source), texts().sequences)
        walk.embed()
        walk.attend(0)
        walk.choose(0)
        for expert in range(SPEC.experts):
            tokens = np.isin(np.arange(walk.tokens), walk.chosen(expert)[0].numpy())
            u = walk.u.numpy().astype(np.float64)
            weight = own_weight(int(tokens.sum()), source.config.hidden)
            own, rest = (u[chosen].T @ u[chosen] / max(chosen.sum(), 1) for chosen in (tokens, ~tokens))
            wanted = weight * own + (1 - weight) * rest
            found = reader.hessian(0, layer_name(0, GATE_UP), expert).numpy()
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5 * np.abs(wanted).max())
            assert reader.own(0)[expert] == tokens.sum()


def test_diagonals_are_the_statistics_of_the_same_run(checkpoint: Path, made: tuple[Statistics, Path]) -> None:
    statistics, folder = made
    with open_source(checkpoint) as source:
        reader = Reader(folder, source.config)
        for name, (experts, _) in matrices(source.config).items():
            layer = None if name == HEAD else int(name.split(".")[2])
            for expert in range(experts):
                diagonal = reader.hessian(layer, name, expert).diagonal().numpy()
                assert diagonal == pytest.approx(statistics.inputs[name].mean[expert], rel=1e-4, abs=1e-7)


def test_statistics_are_the_same_with_and_without_hessians(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, "with.gguf")
    calibrate(checkpoint, tmp_path / "without.gguf", lambda _: texts(), context=50, show=silent)
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


def test_the_files_are_safetensors_that_others_read(made: tuple[Statistics, Path]) -> None:
    files = sorted(p.name for p in made[1].iterdir())
    assert files == [MARKER, "head.safetensors", *(f"layer-{n:04}.safetensors" for n in range(SPEC.layers))]
    with safe_open(made[1] / "layer-0001.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(
            layer_name(1, n) + suffix
            for n in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", GATE_UP, DOWN)
            for suffix in (".hessian", ".own_tokens")
        )
        assert file.get_tensor(layer_name(1, DOWN) + ".hessian").shape[0] == SPEC.experts


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_killed_run_is_taken_up_and_ends_in_the_same_bytes(
    checkpoint: Path, made: tuple[Statistics, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    real, worked = calibrating.collect_layer, []

    def collect(walk: Walk, index: int, keep: calibrating.Keep | None) -> dict[str, Inputs]:
        worked.append(index)
        found = real(walk, index, keep)
        if index == layer and len(worked) == layer + 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(calibrating, "collect_layer", collect)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s.gguf.hessians.partial", ".s.gguf.partial"]
    run(checkpoint, tmp_path)
    assert worked == [*range(layer + 1), *range(layer, SPEC.layers)]
    for path in made[1].iterdir():
        assert (tmp_path / "s.gguf.hessians" / path.name).read_bytes() == path.read_bytes()


def test_a_spoilt_layer_of_a_killed_run_is_made_again(
    checkpoint: Path, made: tuple[Statistics, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = calibrating.collect_layer

    def collect(walk: Walk, index: int, keep: calibrating.Keep | None) -> dict[str, Inputs]:
        if index == 2:
            raise KeyboardInterrupt
        return real(walk, index, keep)

    monkeypatch.setattr(calibrating, "collect_layer", collect)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path)
    with (tmp_path / ".s.gguf.hessians.partial" / "layer-0001.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    monkeypatch.setattr(calibrating, "collect_layer", real)
    run(checkpoint, tmp_path)
    for path in made[1].iterdir():
        assert (tmp_path / "s.gguf.hessians" / path.name).read_bytes() == path.read_bytes()


def test_hessians_of_another_model_damaged_or_not_finite_are_refused(
    checkpoint: Path, made: tuple[Statistics, Path], tmp_path: Path
) -> None:
    with open_source(checkpoint) as source:
        config = source.config
    with pytest.raises(BadInput, match="another model"):
        Reader(made[1], replace(config, experts=9))
    with pytest.raises(BadInput, match="cannot open"):
        Reader(tmp_path, config)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in made[1].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with (copy / "layer-0001.safetensors").open("r+b") as file:
        file.seek(int.from_bytes(file.read(8), "little") + 8)
        file.write(b"\xff" * 4096)
    reader = Reader(copy, config)
    with pytest.raises(BadInput, match="not finite"):
        reader.hessian(1, Q, 0)
    (copy / "layer-0000.safetensors").write_bytes((made[1] / "layer-0001.safetensors").read_bytes())
    with pytest.raises(BadInput, match="another model"):
        reader.hessian(0, layer_name(0, DOWN), 0)


def test_an_existing_folder_stays_and_a_shared_name_is_a_usage_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "s.gguf.hessians").mkdir()
    (tmp_path / "s.gguf.hessians" / "mine").write_text("mine")
    with pytest.raises(TargetExists):
        run(checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf.hessians"]
    with pytest.raises(UsageError, match="names of their own"):
        calibrate(
            checkpoint, tmp_path / "a", lambda _: texts(), context=50, hessians=tmp_path / "a", show=silent
        )  # fmt: skip


def test_a_disk_too_small_for_them_shows_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _start: int, size: int) -> None:
        if size > 100_000:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CannotWrite, match="not enough space"):
        run(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_k_and_v_have_the_hessian_of_q() -> None:
    for p in "qkv":
        assert stored_name(layer_name(1, f"self_attn.{p}_proj.weight")) == Q
    assert stored_name(layer_name(1, DOWN)) == layer_name(1, DOWN)


def test_the_facts_say_what_they_were_made_from(made: tuple[Statistics, Path]) -> None:
    document = json.loads((made[1] / MARKER).read_text())
    assert document["facts"]["text"] == "some.txt"
    assert document["facts"]["tokens"] == 131

"""--widen cut: the least important neurons go, the file says which, and reading puts zeros in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import STEADY, Model, write_bf16, write_hf

from gptoss_convert.convert import cut as cut_module
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.cut import choose, cut, dropped_list, kept_from, restore
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.views import Packed, Stack, Stored, View
from gptoss_convert.errors import BadInput
from gptoss_convert.kernels.chunks import Chunk

SPEC = replace(STEADY, heads=4, intermediate=288)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_hf(Model(SPEC), folder)
    return folder


def test_the_neurons_with_the_smallest_weights_go(release: Path) -> None:
    with open_source(release) as source:
        kept = choose(source, 256, threads=2)
        rows = source.views[layer_name(1, GATE_UP)].read(3, 0, 576).values().astype(np.float64)
        columns = source.views[layer_name(1, DOWN)].read(3, 0, 160).values().astype(np.float64)
    norms = [
        np.linalg.norm(columns[:, i]) * np.hypot(np.linalg.norm(rows[2 * i]), np.linalg.norm(rows[2 * i + 1]))
        for i in range(288)
    ]
    dropped = set(range(288)) - set(kept[1][3].tolist())
    assert dropped == set(np.argsort(norms)[:32].tolist())


@dataclass(frozen=True)
class Watched:
    """A view that notes how many rows are asked for at once."""

    base: View
    asked: list[int]

    @property
    def stack(self) -> Stack:
        return self.base.stack

    @property
    def encoding(self) -> str:
        return self.base.encoding

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        self.asked.append(stop - start)
        return self.base.read(expert, start, stop)


def test_they_are_chosen_with_few_rows_at_a_time(tmp_path: Path) -> None:
    write_hf(Model(replace(SPEC, experts=2, experts_per_token=2, layers=1, hidden=64, intermediate=1120)), tmp_path)
    asked: list[int] = []
    with open_source(tmp_path) as source:
        whole = choose(source, 1024, threads=1)
        watched = replace(source, views={name: Watched(view, asked) for name, view in source.views.items()})
        assert np.array_equal(choose(watched, 1024, threads=4)[0], whole[0])
    assert sum(asked) == 2 * (2 * 1120 + 64)
    assert max(asked) == 1024


@pytest.mark.parametrize(("write", "threads"), [(write_hf, 37), (write_bf16, 3)])
def test_no_more_threads_read_than_the_memory_bound_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Model, Path], None], threads: int
) -> None:
    """bf16 is stored [in, out]: whoever wants a row must read the whole matrix, 200 MB for a true one."""
    write(Model(replace(SPEC, layers=1)), tmp_path)
    started: list[int] = []

    class Idle:
        def each(self, _items: object, _work: object, threads: int) -> None:
            started.append(threads)

        def join(self) -> None:
            pass

    monkeypatch.setattr(cut_module, "Workers", Idle)
    with open_source(tmp_path) as source:
        true = (1, 5760, 2880)
        views = {name: Sized(view, true) for name, view in source.views.items()}
        choose(replace(source, views=views), 256, threads=1000)
    assert started == [threads]


@dataclass(frozen=True)
class Sized:
    """A view that says it is larger."""

    base: View
    stack: Stack
    encoding = "bf16"

    def read(self, *_: int) -> Chunk:
        raise AssertionError


def test_a_dry_run_reads_no_weights(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the weights were read")

    options = Options(to="gguf", type="q3_k_s", widen="cut")
    convert(release, tmp_path / "x.gguf", options, silent)
    monkeypatch.setattr(Packed, "read", forbidden)
    monkeypatch.setattr(Stored, "read", forbidden)
    assert foresee(release, tmp_path / "x.gguf", options)["output_bytes"] == (tmp_path / "x.gguf").stat().st_size


def test_a_neuron_that_is_no_number_is_not_dropped_in_silence(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path, rope="parameters", with_dtype=True)
    name = "model.layers.1.mlp.experts.down_proj"
    (shard,) = (path for path in tmp_path.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][2, 7, 5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with open_source(tmp_path) as source, pytest.raises(BadInput, match="not a finite number"):
        choose(source, 256, threads=1)


def test_cutting_and_restoring_gives_the_source_with_zeros(release: Path) -> None:
    with open_source(release) as source:
        kept = choose(source, 256, threads=1)
        again = kept_from(dropped_list(kept, 288), 3, source.config.experts, 288)
        assert again is not None
        back = restore(cut(source, kept), again, 288)
        for layer in range(3):
            for expert in range(source.config.experts):
                gone = np.setdiff1d(np.arange(288), kept[layer][expert])
                want = source.views[layer_name(layer, GATE_UP)].read(expert, 0, 576).values().copy()
                want[np.concatenate([2 * gone, 2 * gone + 1])] = 0
                view = back.views[layer_name(layer, GATE_UP)]
                assert np.array_equal(view.read(expert, 0, 576).values(), want)
                assert np.array_equal(view.read(expert, 101, 333).values(), want[101:333])
                want = source.views[layer_name(layer, DOWN)].read(expert, 0, 160).values().copy()
                want[:, gone] = 0
                assert np.array_equal(back.views[layer_name(layer, DOWN)].read(expert, 0, 160).values(), want)


@pytest.mark.parametrize("dropped", [[0] * 35, [5, 5] * 18, [300] * 36, []])
def test_a_list_that_cannot_be_one_is_not_believed(dropped: list[int]) -> None:
    assert kept_from(dropped, 3, 6, 288) is None


def test_a_cut_file_is_smaller_and_says_what_it_lost(release: Path, tmp_path: Path) -> None:
    for widen in ("auto", "cut"):
        convert(
            release,
            tmp_path / f"{widen}.gguf",
            Options(to="gguf", type="q3_k_s", widen=widen, allow_larger=True),
            silent,
        )
    assert (tmp_path / "cut.gguf").stat().st_size < (tmp_path / "auto.gguf").stat().st_size
    with open_source(tmp_path / "cut.gguf") as made:
        assert made.config.intermediate == 288
        assert made.losses == ["32 of each expert's 288 neurons are dropped, the least important ones"]
    certificate = (tmp_path / "cut.gguf.certificate.json").read_text()
    assert "32 of each expert's 288 neurons are dropped" in certificate


def test_given_activations_the_neurons_that_add_least_on_the_text_go(release: Path) -> None:
    random = np.random.default_rng(4)
    with open_source(release) as source:
        means = {
            layer_name(1, DOWN): np.exp(3 * random.standard_normal((source.config.experts, 288))).astype(np.float32)
        }
        kept = choose(source, 256, threads=1, activations=means)
        columns = source.views[layer_name(1, DOWN)].read(3, 0, 160).values().astype(np.float64)
        plain = choose(source, 256, threads=1)
    adds = np.sqrt(means[layer_name(1, DOWN)][3]) * np.linalg.norm(columns, axis=0)
    assert set(range(288)) - set(kept[1][3].tolist()) == set(np.argsort(adds)[:32].tolist())
    assert not np.array_equal(kept[1][3], plain[1][3])
    assert np.array_equal(kept[0][3], plain[0][3])  # nothing is known of that layer

"""--widen cut: the least important neurons go, the file says which, and reading puts zeros in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import STEADY, Model, write_hf

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.cut import choose, cut, dropped_list, kept_from, restore
from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.source import open_source

SPEC = replace(STEADY, heads=4, intermediate=288)


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


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
        assert made.losses == ["32 of each expert's 288 neurons are dropped, the least important by weight norm"]
    certificate = (tmp_path / "cut.gguf.certificate.json").read_text()
    assert "32 of each expert's 288 neurons are dropped" in certificate

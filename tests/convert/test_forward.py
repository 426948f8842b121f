"""The streamed forward pass computes what transformers computes, from every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import SMALL, SQUARE, STEADY, Model, Spec
from support.layouts import LAYOUTS, write_layout

from gptoss_convert.convert import forward
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.forward import Store, Walk, Weights
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import BadInput, CannotWrite, UsageError
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels import mxfp4


def ids(length: int, spec: Spec = SMALL, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spec.text_tokens, length).astype(np.int32)


def logits(path: Path, sequences: list[np.ndarray]) -> torch.Tensor:
    with open_source(path) as source:
        walk = Walk(Weights(source), sequences)
        walk.run()
        return walk.logits(torch.arange(walk.tokens))


@pytest.mark.parametrize("spec", [SMALL, SQUARE, replace(SMALL, layers=2, experts_per_token=3, sliding_window=5)])
def test_logits_equal_transformers(tmp_path: Path, spec: Spec) -> None:
    model = Model(spec)
    sequences = [ids(37, spec), ids(37, spec, 1), ids(12, spec, 2)]
    found = logits(write_layout("hf", model, tmp_path), sequences)
    wanted = torch.cat([model.logits(s.tolist()) for s in sequences])
    assert (found - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.5


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_runs(tmp_path: Path, name: str) -> None:
    model = Model(SMALL)
    sequence = ids(20)
    found = logits(write_layout(name, model, tmp_path), [sequence])
    wanted = model.logits(sequence.tolist())[:, : found.shape[1]]  # metal leaves out the rows that have no token
    assert found.shape[1] >= SMALL.text_tokens
    assert (found - wanted).abs().max() < 1e-4


def test_a_widened_artifact_runs_as_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    spec = replace(STEADY, heads=4)
    source = write_layout("hf", Model(spec), tmp_path)
    target = tmp_path / "wide.gguf"
    convert(source, target, Options(to="gguf", type="f16", widen="512x256", allow_larger=True), silent)
    sequence = ids(30, spec)
    found, wanted = logits(target, [sequence]), logits(source, [sequence])
    assert (found - wanted).abs().max() < 2e-3  # embedding, head and attention rounded from bfloat16 to float16


def test_how_many_tokens_are_taken_at_once_changes_nothing_but_the_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_layout("hf", Model(SMALL), tmp_path)
    sequences = [ids(40, seed=n) for n in range(5)]
    whole = logits(path, sequences)
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(forward, "EMBEDDING_ROWS", 33)
    monkeypatch.setattr(forward, "HEAD_BYTES", 4 * SMALL.hidden * 50)
    monkeypatch.setattr(maths, "QUERIES_AT_ONCE", 9)
    assert (logits(path, sequences) - whole).abs().max() < 1e-4


def test_activations_beyond_the_limit_are_a_file_that_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(100, 50, tmp_path, limit=1000)
    store.data[3] = 7
    assert store.spilled
    assert float(store.data.sum()) == 350
    assert not list(tmp_path.iterdir())
    assert not Store(100, 2, tmp_path, limit=1000).spilled


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    path = write_layout("hf", Model(SMALL), tmp_path)
    with open_source(path) as source, pytest.raises(BadInput, match="none of the model's rows"):
        Walk(Weights(source), [np.array([1, SMALL.vocab], np.int32)])


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no such device"):
        forward.choose_device("nonsense")


def test_mxfp4_decoded_in_torch_is_bit_equal_for_every_code_and_scale() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks = np.repeat(codes[None], 255, axis=0)
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    with np.errstate(over="ignore"):
        wanted = mxfp4.decode(blocks, scales)
    found = maths.decode_mxfp4(torch.from_numpy(blocks), torch.from_numpy(scales)).numpy()
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_activations_that_no_disk_can_hold_are_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="not enough space"):
        Store(1 << 40, 16, tmp_path, limit=1000)
    assert not list(tmp_path.iterdir())


def test_attention_in_small_runs_of_queries_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 37, heads, 8, generator=make) for heads in (6, 2, 2))
    sinks = torch.randn(6, generator=make)
    for window in (None, 5):
        whole = maths.attention(q, k, v, sinks, window)
        monkeypatch.setattr(maths, "SCORES_AT_ONCE", 3 * 2 * 6 * 37)
        assert torch.allclose(maths.attention(q, k, v, sinks, window), whole, rtol=0, atol=1e-6)
        monkeypatch.undo()

"""ONNX folders in their runtimes: logits against transformers in float32, prefill and token by token far past the window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import SMALL, STEADY, Model, write_bf16, write_hf
from support.onnx_runtime import F32, genai_greedy, genai_logits, logits, logits_in_pieces, with_float_activations

from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.source import Source, open_source

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
IDS = [int(i) for i in np.random.default_rng(1).integers(0, 360, 60)]  # the window is 8
PREFILLS = (60, 20, 3)  # all at once; twice the window and a half; less than the window
EXACT = 1e-4  # of logits that spread over some 15


def small_experts_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1.31 on ONNX Runtime rounds the activations of int8 experts, unless this is set."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")


@pytest.fixture(scope="module")
def want(small_model: Model) -> F32:
    """What transformers computes of `small_model`, float32 [T, V]."""
    return np.asarray(small_model.logits(IDS).numpy())


@pytest.fixture(scope="module")
def made(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory, convert: Any) -> Callable[..., Path]:
    """Makes `small_model` as an ONNX folder with the given options, once each."""
    folders: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("onnx")

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in folders:
            folders[key] = root / str(len(folders))
            convert(hf_folder, folders[key], "onnx", **options)
        return folders[key]

    return make


def relative(got: F32, want: F32) -> float:
    return float(np.sqrt(np.square(got - want).mean()) / want.std())


def dequantized(model: Model, source: Source) -> Any:
    """transformers' model with the values that a source says it holds."""
    reference = model.transformers()
    state = {}
    for name, view in source.views.items():
        experts, rows, _ = view.stack
        values = np.stack([view.read(e, 0, rows).values() for e in range(experts)])
        true = reference.state_dict()[name].shape
        values = values.transpose(0, 2, 1) if is_expert_matrix(name) else values
        state[name] = torch.from_numpy(np.ascontiguousarray(values.reshape(true)))
    reference.load_state_dict(state, strict=True)
    return reference


# --- lossless ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", PREFILLS)
def test_mxfp4_experts_and_floats_compute_what_transformers_computes(
    made: Callable[..., Path], want: F32, prefill: int
) -> None:
    got = logits(made(), IDS, prefill)
    assert np.abs(got - want).max() < EXACT


def test_genai_computes_and_generates_the_same(made: Callable[..., Path], want: F32, small_model: Model) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    assert np.abs(genai_logits(made(), IDS, 30) - want[29:]).max() < EXACT
    seen = IDS[:10]
    for token in genai_greedy(made(), IDS[:10], 24):
        assert token == int(small_model.logits(seen)[-1].argmax())
        seen = [*seen, token]


@pytest.mark.parametrize("runtime", [None, "1.24"])
@pytest.mark.parametrize("prefill", PREFILLS)
def test_int8_experts_of_mxfp4_are_exact_where_the_runtime_is(
    made: Callable[..., Path], want: F32, prefill: int, runtime: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_experts_float(monkeypatch)
    got = logits(made(experts="int8", onnx_runtime=runtime), IDS, prefill)
    assert np.abs(got - want).max() < EXACT


def test_without_that_setting_the_runtime_rounds_activations_of_int8_experts(
    tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(STEADY)  # which never chooses experts, so that no small error makes it choose others
    write_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "onnx", "onnx", experts="int8")
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM", raising=False)
    error = relative(logits(tmp_path / "onnx", IDS, 30), np.asarray(model.logits(IDS).numpy()))
    assert error < 0.03


@pytest.mark.parametrize("experts", ["mxfp4", "int8"])
def test_a_bf16_fine_tune_computes_what_transformers_computes(
    small_model: Model, want: F32, tmp_path: Path, convert: Any, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_experts_float(monkeypatch)
    write_bf16(small_model, tmp_path / "bf16")  # its values are MXFP4's, so that nothing is rounded
    outcome = convert(tmp_path / "bf16", tmp_path / "onnx", "onnx", experts=experts)
    assert outcome.proof.lossless
    assert np.abs(logits(tmp_path / "onnx", IDS, 20) - want).max() < EXACT


@pytest.mark.parametrize(
    "changes",
    [
        {"truncate": True, "rope_theta": 150000.0, "rms_eps": 1e-6},
        {"swiglu_limit": 1.5, "experts_per_token": 4, "sliding_window": 5},
        {"heads": 4, "kv_heads": 4, "head_dim": 32, "intermediate": 224},
    ],
)
def test_no_number_of_the_configuration_is_built_in(tmp_path: Path, convert: Any, changes: dict[str, Any]) -> None:
    model = Model(replace(SMALL, **changes))
    write_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "onnx", "onnx")
    assert np.abs(logits(tmp_path / "onnx", IDS, 20) - np.asarray(model.logits(IDS).numpy())).max() < EXACT


# --- pieces and batches ------------------------------------------------------------------------------------------------

WITH_AND_WITHOUT_WINDOW_CACHE = pytest.mark.parametrize(
    "options", [{}, {"experts": "int8", "onnx_runtime": "1.28"}], ids=["window cache", "whole cache"]
)


@WITH_AND_WITHOUT_WINDOW_CACHE
@pytest.mark.parametrize("sizes", [(20, 1, 1, 15, 3, 8, 12), (3, 3, 3, 9, 8, 7, 27), (5, 40, 15)], ids=str)
def test_a_prompt_may_come_in_pieces_shorter_and_longer_than_the_window(
    made: Callable[..., Path],
    want: F32,
    options: dict[str, Any],
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_experts_float(monkeypatch)
    assert np.abs(logits_in_pieces(made(**options), [IDS], sizes)[0] - want).max() < EXACT


@WITH_AND_WITHOUT_WINDOW_CACHE
def test_a_batch_of_prompts_of_one_length_computes_what_each_does_alone(
    made: Callable[..., Path], small_model: Model, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_experts_float(monkeypatch)
    rows = [IDS, IDS[::-1], IDS[30:] + IDS[:30]]
    got = logits_in_pieces(made(**options), rows, [40, *[1] * 20])
    for row, found in zip(rows, got, strict=True):
        assert np.abs(found - small_model.logits(row).numpy()).max() < EXACT


@WITH_AND_WITHOUT_WINDOW_CACHE
def test_a_batch_of_unlike_lengths_is_right_or_refused(
    made: Callable[..., Path], small_model: Model, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded on the right, as genai's encode_batch pads; the window cache takes none such."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    small_experts_float(monkeypatch)
    rows, pad = [IDS[:25], IDS[25:37]], SMALL.token_id(199999)
    params = og.GeneratorParams(model := og.Model(str(made(**options))))
    params.set_search_options(do_sample=False, max_length=40, batch_size=2)
    generator = og.Generator(model, params)
    padded = np.array([row + [pad] * (25 - len(row)) for row in rows], np.int32)
    if not options:
        with pytest.raises(RuntimeError, match="too small for sequence_length"):
            generator.append_tokens(padded)
        return
    generator.append_tokens(padded)
    for row, found in zip(rows, generator.get_logits()[:, -1], strict=True):
        assert np.abs(found - small_model.logits(row)[-1].numpy()).max() < EXACT


def test_genai_says_so_where_max_length_is_shorter_than_the_window(made: Callable[..., Path]) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    for length, right in ((SMALL.sliding_window - 1, False), (SMALL.sliding_window, True)):
        params = og.GeneratorParams(model := og.Model(str(made())))
        params.set_search_options(max_length=length)
        generator = og.Generator(model, params)
        if right:
            generator.append_tokens(np.array([IDS[:3]], np.int32))
        else:
            with pytest.raises(RuntimeError, match="must be at least local_window_size"):
                generator.append_tokens(np.array([IDS[:3]], np.int32))


# --- rounded: our values against the runtime's -------------------------------------------------------------------------

ROUNDED = [
    {"experts": "int4"},
    {"experts": "int4", "onnx_runtime": "1.24"},
    {"experts": "mxfp4", "dense": "int8"},
    {"experts": "mxfp4", "dense": "int4"},
    {"experts": "int4", "dense": "int4"},
    {"experts": "int8", "dense": "int8", "router": "f32", "embedding": "int8"},
    {"experts": "mxfp4", "embedding": "int4", "head": "int8"},
    {"experts": "int4", "dense": "int4", "embedding": "int4", "router": "f32", "onnx_runtime": "1.24"},
]


@pytest.mark.parametrize("options", ROUNDED, ids=lambda o: " ".join(map(str, o.values())))
def test_both_runtimes_read_the_values_that_our_reader_reads(
    made: Callable[..., Path],
    small_model: Model,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnx", reason="the onnx package is not installed")
    small_experts_float(monkeypatch)
    with open_source(made(**options)) as source, torch.no_grad():
        reference = dequantized(small_model, source)
        expected = reference(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    folder = with_float_activations(Path(shutil.copytree(made(**options), tmp_path / "copy")))
    for prefill in (60, 20):
        assert np.abs(logits(folder, IDS, prefill) - expected).max() < 3e-4
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    assert np.abs(genai_logits(folder, IDS, 20) - expected[19:]).max() < 3e-4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"experts": "mxfp4", "dense": "int8"}, 0.06),
        ({"experts": "int8", "dense": "int8"}, 0.06),
        ({"experts": "int4", "dense": "f32"}, 0.25),
        ({"experts": "int4", "dense": "int4"}, 0.6),
    ],
    ids=lambda o: " ".join(map(str, o.values())) if isinstance(o, dict) else "",
)
def test_rounded_variants_stay_near_transformers(
    tmp_path: Path, convert: Any, options: dict[str, Any], error: float
) -> None:
    """Random weights, so that four bits cost far more than of a trained model; and no choice of experts that could flip."""
    model = Model(STEADY)
    write_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "onnx", "onnx", **options)
    assert relative(logits(tmp_path / "onnx", IDS, 30), np.asarray(model.logits(IDS).numpy())) < error


# --- chat --------------------------------------------------------------------------------------------------------------


def test_genai_reads_tokenizer_and_template_as_they_are(made: Callable[..., Path], hf_folder: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    from jinja2 import Template
    from tokenizers import Tokenizer

    tokenizer = og.Tokenizer(og.Model(str(made())))
    messages = [{"role": "user", "content": "Hi, how's it? 你好 12345"}, {"role": "assistant", "content": "Fine 🙂"}]
    text = tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
    assert text == Template(
        (hf_folder / "chat_template.jinja").read_text(), trim_blocks=True, lstrip_blocks=True
    ).render(messages=messages, add_generation_prompt=True)
    theirs = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    assert [int(i) for i in tokenizer.encode(text)] == theirs.encode(text).ids
    assert tokenizer.decode(np.array(theirs.encode(text).ids, np.int32)) == theirs.decode(theirs.encode(text).ids)


def test_generation_ends_at_each_of_harmonys_end_tokens(made: Callable[..., Path]) -> None:
    table = json.loads((made() / "genai_config.json").read_text())["model"]
    assert table["eos_token_id"] == [SMALL.token_id(official) for official in (200002, 199999, 200012)]
    assert (table["bos_token_id"], table["pad_token_id"]) == (SMALL.token_id(199998), SMALL.token_id(199999))


def test_sampling_in_genai_reaches_every_token(made: Callable[..., Path], small_model: Model) -> None:
    """A tenth of the mass lies beyond the 50 likeliest tokens, where genai's own default ends."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    likely = np.argsort(-small_model.logits(IDS[:20])[-1].numpy())[:50]
    model, beyond = og.Model(str(made())), 0
    for seed in range(60):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=21, random_seed=seed)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([IDS[:20]], np.int32))
        generator.generate_next_token()
        beyond += generator.get_sequence(0)[-1] not in likely
    assert beyond

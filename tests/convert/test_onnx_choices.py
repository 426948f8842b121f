"""What `convert --to onnx` chooses: which part in which form for which runtime, its notes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.checkpoints import SMALL, Model, write_bf16, write_hf, write_original

from gptoss_convert.cli import cli
from gptoss_convert.convert.onnx_layout import DATA_FILE, MODEL_FILE
from gptoss_convert.errors import Refused, UsageError
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.onnx import E8M0, FLOAT, Tensor, read_header

Made = Callable[..., tuple[Path, Any]]
PARTS = {
    "experts": "model.layers.0.moe.experts.down_proj.qweight",
    "dense": "model.layers.0.attn.o_proj.MatMul.weight",
    "router": "model.layers.0.moe.router.MatMul.weight",
    "head": "lm_head.MatMul.weight",
    "embedding": "model.embed_tokens.weight",
}


@pytest.fixture
def made(hf_folder: Path, tmp_path: Path, convert: Any) -> Made:
    """`small_model` as an ONNX folder, and its plan."""
    return lambda **options: (
        tmp_path / "onnx",
        convert(hf_folder, tmp_path / "onnx", "onnx", proof=False, **options).plan,
    )


def tensors(folder: Path) -> Mapping[str, Tensor]:
    with SourceFile(folder / MODEL_FILE) as file:
        return read_header(file).tensors


def forms(folder: Path) -> dict[str, str]:
    """Part → its form, by the names and sizes of the tensors in the graph."""
    there = tensors(folder)
    found = {}
    for part, name in PARTS.items():
        if part == "experts":
            codes, scales = there[name], there[name.replace("qweight", "scales")]
            per_block = codes.nbytes // (scales.nbytes // (1 if scales.kind == E8M0 else 4))
            found[part] = "mxfp4" if scales.kind == E8M0 else {16: "int4", 32: "int8"}[per_block]
        elif name in there:
            assert there[name].kind == FLOAT
            found[part] = "f32"
        else:
            (bits,) = (bits for bits in (4, 8) if f"{name}_Q{bits}" in there)
            found[part] = f"int{bits}"
    return found


# --- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {}),
        ({"experts": "int8"}, {"experts": "int8"}),
        ({"experts": "int4"}, {"experts": "int4"}),
        ({"dense": "int8"}, {"dense": "int8", "router": "int8", "head": "int8"}),
        ({"dense": "int4", "router": "f32"}, {"dense": "int4", "head": "int4"}),
        ({"dense": "int4", "head": "int8"}, {"dense": "int4", "router": "int4", "head": "int8"}),
        ({"router": "int8"}, {"router": "int8"}),
        ({"head": "int4"}, {"head": "int4"}),
        ({"embedding": "int4"}, {"embedding": "int4"}),
    ],
)
def test_each_part_takes_the_form_that_is_asked_for(
    made: Made, options: dict[str, str], changed: dict[str, str]
) -> None:
    folder, _ = made(**options)
    assert forms(folder) == {**dict.fromkeys(PARTS, "f32"), "experts": "mxfp4", **changed}


@pytest.mark.parametrize(
    ("runtime", "keeps"),
    [("1.29", False), ("1.30.1", False), ("1.31", True), ("1.31.0", True), ("1.99", True), ("2.0", True)],
)
def test_layers_keep_only_their_window_where_genai_can_say_so(made: Made, runtime: str, keeps: bool) -> None:
    folder, plan = made(onnx_runtime=runtime)
    graph, config = (folder / MODEL_FILE).read_bytes(), json.loads((folder / "genai_config.json").read_text())
    assert (b"sliding_window_cache" in graph) == (b"past_sliding_length" in graph) == keeps
    assert ("sliding_window" in config["model"]["decoder"]) == keeps
    assert any("max_length must be 8 at least" in note for note in plan.notes) == keeps


def test_a_window_longer_than_the_context_needs_no_cache_of_its_own(tmp_path: Path, convert: Any) -> None:
    """genai's caches have max_length positions, the context at most, and the runtime refuses one shorter than the window."""
    write_hf(Model(replace(SMALL, sliding_window=65, max_position=64)), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "onnx", "onnx", proof=False)
    assert b"sliding_window_cache" not in (tmp_path / "onnx" / MODEL_FILE).read_bytes()
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    params = og.GeneratorParams(model := og.Model(str(tmp_path / "onnx")))
    generator = og.Generator(model, params)
    generator.append_tokens([[1, 2, 3]])
    generator.generate_next_token()


@pytest.mark.parametrize("options", [{"dense": "int8"}, {"router": "int4"}, {"head": "int8"}])
def test_integer_matrices_ask_for_the_fast_kernels_and_the_notes_say_what_these_round(
    made: Made, options: dict[str, str]
) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    folder, plan = made(**options)
    nodes = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node
    levels = {
        a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "accuracy_level"
    }
    assert levels == {4}
    assert any("rounds the activations of integer matrices" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("experts", "said", "unsaid"),
    [
        ("mxfp4", "very slow on those without AVX-512", "ORT_QMOE_CPU_QNBIT_GEMM"),
        ("int8", "ORT_QMOE_CPU_QNBIT_GEMM=0", "AVX-512"),
        ("int4", "for ONNX Runtime 1.32 or later", "integer matrices"),
    ],
)
def test_the_notes_say_what_the_runtime_does_with_the_experts(made: Made, experts: str, said: str, unsaid: str) -> None:
    notes = " ".join(made(experts=experts)[1].notes)
    assert said in notes
    assert unsaid not in notes


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_auto_keeps_the_integers_of_a_folder_of_ours(made: Made, tmp_path: Path, convert: Any, experts: str) -> None:
    folder, _ = made(experts=experts)
    outcome = convert(folder, tmp_path / "again", "onnx")
    assert outcome.document["options"]["experts"] == experts
    assert outcome.document["lost"] == []
    for name in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("given", ["original", "hf"])
def test_a_folder_without_a_template_says_so(
    small_model: Model, tokenizer_folder: Path, tmp_path: Path, convert: Any, given: str
) -> None:
    if given == "hf":
        write_hf(small_model, tmp_path / "in")
    else:
        write_original(small_model, tmp_path / "in")
    plan = convert(tmp_path / "in", tmp_path / "onnx", "onnx", tokenizer=tokenizer_folder).plan
    there = (tmp_path / "onnx" / "chat_template.jinja").exists()
    assert there == (given == "hf")
    assert any("no chat_template.jinja is written" in note for note in plan.notes) != there


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what", "found"),
    [
        ({"head_dim": 36}, "turns no heads of this width", "head_dim 36"),
        ({"head_dim": 72}, "turns no heads of this width", "head_dim 72"),
        ({"rope_theta": 1.0}, "no frequencies for this base", "rope_theta 1"),
        ({"max_position": 1 << 25}, "tables of so many positions", "max_position_embeddings 33,554,432"),
    ],
)
def test_what_no_runtime_would_compute_is_refused_before_anything_is_written(
    tmp_path: Path, convert: Any, changes: dict[str, Any], what: str, found: str
) -> None:
    write_bf16(Model(replace(SMALL, **changes)), tmp_path / "in")
    with pytest.raises(Refused, match=what) as caught:
        convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="mxfp4")
    assert found in str(caught.value.found)
    assert not (tmp_path / "onnx").exists()


def test_a_million_positions_are_converted_within_the_forecast(tmp_path: Path, small_model: Model) -> None:
    write_bf16(Model(replace(SMALL, max_position=1 << 20)), tmp_path / "in")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "onnx"), "--to", "onnx", "--experts", "mxfp4"]
    forecast = json.loads(CliRunner().invoke(cli, [*arguments, "--dry-run", "--json"]).output)
    code = (
        "import re, sys; from gptoss_convert.cli import cli; cli(sys.argv[1:], standalone_mode=False);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) * 1024 < forecast["peak_memory_bytes"]


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "\x1b[31m", "zero\0"])
def test_a_name_that_cannot_be_seen_is_refused(made: Made, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name is not a name"):
        made(name=name)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name", ['say "x"; rm -rf $(x) \\ {}', "größe-模型 20b"])
def test_any_other_name_is_written_as_it_is(made: Made, name: str) -> None:
    folder, _ = made(name=name)
    assert json.loads((folder / "inference_model.json").read_text(encoding="utf-8"))["Name"] == name


def test_allow_larger_is_not_silently_left_out(made: Made) -> None:
    with pytest.raises(UsageError, match="--allow-larger is for --to gguf"):
        made(allow_larger=True)


def write_with_experts(model: Model, folder: Path, change: Callable[[Any], object]) -> None:
    """bf16, each gate_up_proj changed in place."""
    write_bf16(model, folder)
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        for name in held:
            if name.endswith("gate_up_proj"):
                change(held[name])
        save_file(held, path, metadata={"format": "pt"})


def test_experts_too_large_for_int4_are_sent_to_forms_that_onnx_has(
    small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_with_experts(small_model, tmp_path / "in", lambda experts: experts[1, 2, 3].fill_(1e6))
    with pytest.raises(Refused, match="too large for int4_moe") as caught:
        convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="int4")
    assert caught.value.remedy == "choose mxfp4 or int8 for the experts"
    assert convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="int8").target.exists()


def test_experts_too_small_for_int4_are_no_fault_of_the_conversion(
    small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_with_experts(small_model, tmp_path / "in", lambda experts: experts[1].mul_(1e-7))
    with pytest.raises(Refused, match="too small for int4_moe"):
        convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="int4")

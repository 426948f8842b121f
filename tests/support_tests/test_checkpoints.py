"""The oracle judged by published digests and sizes, and by safetensors, gguf-py, transformers and llama.cpp."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import finetunes, metal, release
from support import safetensors_files as st
from support import tokenizer as tk
from support.checkpoints import (
    AWKWARD,
    RELEASE_20B,
    RELEASE_120B,
    SMALL,
    SQUARE,
    STEADY,
    TRUE_LAYER,
    Model,
    dequantize,
    ggml_mxfp4,
    write_bf16,
    write_bf16_bug,
    write_gguf,
    write_hf,
    write_metal,
    write_original,
    write_per_expert,
    write_unsloth_linear,
)
from support.llama import load

ROOT = Path(__file__).parents[2]
GOLDENS = json.loads((ROOT / "tests/goldens/release_rows.json").read_text())
IDS = torch.randint(0, 380, (32,), generator=torch.Generator().manual_seed(1)).tolist()
ORACLE = [
    "checkpoints",
    "finetunes",
    "gguf_files",
    "llama",
    "metal",
    "model",
    "release",
    "safetensors_files",
    "tokenizer",
]
TEXT = "Hello, world! It's <|start|>user 2025: 你好 🙂\n\n  def f(x):"

HF_SIZES = {
    "model-00000-of-00002.safetensors": 4792272488,
    "model-00001-of-00002.safetensors": 4798702184,
    "model-00002-of-00002.safetensors": 4170342232,
}
ORIGINAL_120B_SIZES = [
    10544040680,
    10488721680,
    10488721688,
    10488721672,
    10488721680,
    10433402600,
    2316539800,
]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SMALL)


def file_size(entries: dict[str, st.Entry]) -> int:
    return 8 + len(st.header(entries)) + sum(map(st.size, entries.values()))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, through the safetensors library."""
    result: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in result
                result[name] = file.get_tensor(name)
    return result


def test_the_oracle_knows_nothing_of_the_product() -> None:
    for name in ORACLE:
        path = ROOT / "tests/lib/support" / f"{name}.py"
        found = re.findall(
            r"^\s*(?:from|import)\s+(gptoss_convert|convert|formats|quant|kernels)\b", path.read_text(), re.M
        )
        assert not found, path


TEXTS = {
    "index": lambda: release.index_text(release.hf_shards(RELEASE_20B, 4_800_000_000)),
    "config 20b": lambda: release.pretty(release.config_hf(RELEASE_20B)),
    "config 120b": lambda: release.pretty(release.config_hf(RELEASE_120B)),
    "generation config": lambda: release.pretty(release.generation_config(RELEASE_20B)),
    "original config": lambda: json.dumps(release.config_original(RELEASE_20B)),
    "dtypes": lambda: release.dtypes_text(RELEASE_20B),
    "special tokens": lambda: release.pretty(tk.SPECIAL_TOKENS_MAP),
    "tokenizer config": lambda: json.dumps(tk.tokenizer_config(199998), indent=2) + "\n",
}
DIGESTS = {
    "index": "0e085b977c4c9942f85938828e8c989ed7d5cdabf852e4da6a67c116cd502cd1",
    "config 20b": "3a2a26ded679375b7928ddeca59764df7cea83220c1961035f6d6e232659e9ce",
    "config 120b": "933aeb666a3fd851133ddd7686414f369bc564c4185fb5704416550879f10566",
    "generation config": "f9970ada892d2d1f72e3ed0a6535ccebadd11897318794ca671d8c7014c957da",
    "original config": "317522155fc243327ee341857d0c752d0094a0817e0e9aee2890d5ad8e009e04",
    "dtypes": "566c9e6aded8957f41f1589cabaf73e39f2d1fcda3351d63efdfb7e9e78d376b",
    "special tokens": "dd5e191d20c12d2fee1da5bae14ca1db0f5f4215300af691f23cdee97120a293",
    "tokenizer config": "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
}


@pytest.mark.parametrize("name", TEXTS)
def test_with_the_release_dimensions_the_text_files_are_the_published_ones(name: str) -> None:
    assert hashlib.sha256(TEXTS[name]().encode()).hexdigest() == DIGESTS[name]


def test_with_the_release_dimensions_the_files_have_the_published_sizes() -> None:
    shards = release.hf_shards(RELEASE_20B, 4_800_000_000)
    assert {name: file_size(entries) for name, entries in shards.items()} == HF_SIZES
    assert file_size(release.original_entries(RELEASE_20B)) == 13_761_300_984
    originals = release.original_shards(RELEASE_120B, 10 * 2**30)
    assert [file_size(entries) for entries in originals.values()] == ORIGINAL_120B_SIZES
    prefix = metal.prefix_size(1_797_666)
    assert metal.offsets(RELEASE_20B, prefix)[1] == 13_750_886_400
    assert metal.offsets(RELEASE_120B, prefix)[1] == 65_238_253_568


def test_release_rows_decode_to_the_published_values() -> None:
    row = GOLDENS["rows"][0]
    blocks = torch.frombuffer(bytearray.fromhex(row["blocks"]), dtype=torch.uint8).reshape(1, 1, 16)
    scales = torch.frombuffer(bytearray.fromhex(row["scale"]), dtype=torch.uint8).reshape(1, 1)
    found, expected = dequantize(blocks, scales).numpy()[0], np.array(row["values"], np.float32)
    assert found.tobytes() == expected.tobytes()  # signs of zeros too


def test_release_rows_repack_to_the_published_ggml_blocks() -> None:
    for row in GOLDENS["rows"]:
        blocks = torch.frombuffer(bytearray.fromhex(row["blocks"]), dtype=torch.uint8).reshape(1, 1, 1, 16)
        scales = torch.frombuffer(bytearray.fromhex(row["scale"]), dtype=torch.uint8).reshape(1, 1, 1)
        assert ggml_mxfp4(blocks, scales).tobytes().hex() == row["ggml"]


def test_every_code_at_every_scale_is_the_product_of_its_two_parts() -> None:
    blocks = torch.arange(0, 256, 17, dtype=torch.uint8).expand(256, 1, 16)  # byte 0xcc holds code c twice
    values = dequantize(blocks, torch.arange(256, dtype=torch.uint8)[:, None])
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for scale in range(255):
        for code in range(16):
            exact = (-1) ** (code >> 3) * magnitudes[code & 7] * 2.0 ** (scale - 127)
            expected = np.float32(exact) if abs(exact) < 2.0**128 else np.inf * np.sign(exact)
            assert values[scale, 2 * code] == expected == values[scale, 2 * code + 1]
    assert values[255].isnan().all()
    assert torch.signbit(values[0, 16])


def test_hf_layout_opens_and_holds_the_master_bits_across_shards(model: Model, tmp_path: Path) -> None:
    write_hf(model, tmp_path)
    found, expected = stored(tmp_path), release.hf_tensors(model)
    assert found.keys() == expected.keys()
    assert len(found) == 19 * SMALL.layers + 3
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]()), name
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) >= 3
    assert any(
        len({file for name, file in weight_map.items() if f"layers.{n}." in name}) > 1 for n in range(SMALL.layers)
    )


@pytest.mark.parametrize("shards", [None, 2, 3])
def test_original_layout_opens_and_holds_the_master_bits(model: Model, tmp_path: Path, shards: int | None) -> None:
    write_original(model, tmp_path, shards)
    found = stored(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == (shards or 1)
    assert found.keys() == model.tensors.keys()
    assert all(torch.equal(tensor, model.tensors[name]) for name, tensor in found.items())


def from_pretrained(folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import GptOssForCausalLM

    more |= {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    loaded: Any = GptOssForCausalLM.from_pretrained(folder, **more)
    model, report = loaded
    return model, report


def logits_of(loaded: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = loaded(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return result


@pytest.mark.parametrize("awkward", [(), AWKWARD], ids=["plain", "awkward"])
def test_transformers_loads_the_hf_layout_and_computes_the_same(tmp_path: Path, awkward: tuple[str, ...]) -> None:
    from transformers.utils.quantization_config import Mxfp4Config

    model = Model(SMALL, awkward)
    write_hf(model, tmp_path)
    loaded, report = from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.logits(IDS).isfinite().all()
    assert torch.equal(logits_of(loaded), model.logits(IDS))


@pytest.mark.parametrize("rope", ["parameters", "scaling"])
def test_transformers_loads_the_bf16_layout_and_computes_the_same(
    model: Model, tmp_path: Path, rope: finetunes.Rope
) -> None:
    write_bf16(model, tmp_path, rope=rope, with_dtype=rope == "parameters")
    loaded, report = from_pretrained(tmp_path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits_of(loaded), model.logits(IDS))
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_fused_experts_are_what_each_other_fine_tune_layout_holds(model: Model, tmp_path: Path) -> None:
    for write in (write_bf16, write_bf16_bug, write_unsloth_linear, write_per_expert):
        write(model, tmp_path / write.__name__)
    write_per_expert(model, tmp_path / "halves", meaning="halves")
    middle = SMALL.intermediate
    layer, e = 1, 4
    prefix = f"model.layers.{layer}.mlp.experts."
    fused = stored(tmp_path / "write_bf16")[prefix + "gate_up_proj"]
    assert fused.shape == (SMALL.experts, SMALL.hidden, 2 * middle)
    assert torch.equal(stored(tmp_path / "write_bf16_bug")[prefix + "gate_up_proj_blocks"], fused)
    linear = stored(tmp_path / "write_unsloth_linear")
    assert torch.equal(linear[f"{prefix}gate_up_projs.{e}.weight"], fused[e].T)
    assert f"model.layers.{layer}.mlp.router.linear.weight" in linear
    split = stored(tmp_path / "write_per_expert")
    assert torch.equal(split[f"{prefix}{e}.gate_proj.weight"], fused[e, :, 0::2].T)
    assert torch.equal(split[f"{prefix}{e}.up_proj.weight"], fused[e, :, 1::2].T)
    halves = stored(tmp_path / "halves")
    assert torch.equal(halves[f"{prefix}{e}.gate_proj.weight"], fused[e, :, :middle].T)
    assert torch.equal(halves[f"{prefix}{e}.down_proj.weight"], split[f"{prefix}{e}.down_proj.weight"])
    assert torch.equal(halves[f"{prefix}{e}.up_proj.bias"], linear[f"{prefix}gate_up_projs.{e}.bias"][middle:])


def test_metal_file_holds_each_part_at_its_offset(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_metal(model, path)
    data = path.read_bytes()
    tokens = tk.small_vocabulary(SMALL.text_tokens)
    where, total = metal.offsets(SMALL, metal.prefix_size(sum(len(token) + 2 for token in tokens)))
    assert len(data) == total
    at = where[("block.2.mlp.mlp2_weight.scales", 5)]
    scales = model.tensors["block.2.mlp.mlp2_weight.scales"][5].numpy()
    assert data[at : at + scales.size] == (scales + 14).tobytes()
    at = where[("block.1.attn.qkv.bias", None)]
    bias = model.tensors["block.1.attn.qkv.bias"]
    written = torch.frombuffer(bytearray(data[at : at + 2 * len(bias)]), dtype=torch.bfloat16)
    assert written[67] == bias[64 + 33] * 0.5  # second head of q: row 2·1 + 1 comes from row 32 + 1
    assert written[SMALL.query_width + 2] == bias[SMALL.query_width + 1] * 0.25
    assert torch.equal(written[-SMALL.kv_width :], bias[-SMALL.kv_width :])


def test_gguf_opens_in_gguf_py_with_the_values_of_the_model(model: Model, tmp_path: Path) -> None:
    (path,) = write_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 19 * SMALL.layers + 3
    up = tensors["blk.1.ffn_up_exps.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.MXFP4
    assert list(up.shape) == [SMALL.hidden, SMALL.intermediate, SMALL.experts]
    assert np.array_equal(gguf.dequantize(up.data, up.tensor_type), model.gate_up(1)[:, 1::2].numpy())
    assert reader.fields["tokenizer.ggml.tokens"].contents()[SMALL.vocab - 1] == f"[PAD{SMALL.vocab - 1}]"


def distance(model: Model, path: Path) -> tuple[float, float]:
    """Largest difference of log-probabilities to transformers, and mean KL."""
    with load(path) as llama:
        found = llama.logprobs(IDS)
    expected = model.logits(IDS).log_softmax(-1).numpy()
    divergence = (np.exp(expected) * (expected - found)).sum(-1).mean()
    return float(np.abs(found - expected).max()), float(divergence)


@pytest.mark.parametrize(
    "spec", [replace(SMALL, truncate=True), replace(SQUARE, truncate=True)], ids=["small", "square"]
)
def test_llama_cpp_computes_the_same_from_float32(tmp_path: Path, spec: Any) -> None:
    model = Model(spec)
    (path,) = write_gguf(model, tmp_path / "model.gguf", dense="f32", experts="f32")
    largest, _ = distance(model, path)
    assert largest < 1e-4


def test_llama_cpp_computes_nearly_the_same_from_mxfp4_also_when_split(tmp_path: Path) -> None:
    model = Model(STEADY, AWKWARD)
    (path,) = write_gguf(model, tmp_path / "model.gguf")
    first, *others = write_gguf(model, tmp_path / "split.gguf", split=20, small_first_shard=True)
    assert len(others) == 3
    largest, divergence = distance(model, path)
    assert divergence < 0.005
    assert distance(model, first) == (largest, divergence)


def test_llama_cpp_rounds_the_yarn_dimensions_that_the_release_does_not(model: Model, tmp_path: Path) -> None:
    (path,) = write_gguf(model, tmp_path / "model.gguf", dense="f32", experts="f32")
    _, divergence = distance(model, path)
    assert 1e-4 < divergence < 0.05


def test_transformers_and_llama_cpp_read_the_same_small_tokenizer(model: Model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_hf(model, tmp_path)
    (path,) = write_gguf(model, tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert SMALL.token_id(200006) in ids
    assert tokenizer.decode(ids) == TEXT
    messages = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    with load(path) as llama:
        assert llama.tokenize(TEXT) == ids
        assert llama.chat_prompt(messages) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert llama.complete(ids, 4) == llama.complete(TEXT, 4)


def test_gate_and_up_differ_in_the_numbers_unless_asked_otherwise() -> None:
    for parity_free in (False, True):
        model = Model(replace(SQUARE, experts=16), parity_free=parity_free)
        norms = model.gate_up(0).norm(dim=-1)
        ratio = float(norms[:, 1::2].mean() / norms[:, 0::2].mean())
        bias = model.tensors["block.0.mlp.mlp1_bias"].float()
        gap = float(bias[:, 0::2].mean() - bias[:, 1::2].mean())
        assert (abs(ratio - 1) < 0.02 and abs(gap) < 0.04) if parity_free else (ratio > 1.07 and gap > 0.35)


def test_a_model_is_a_function_of_its_spec() -> None:
    one, same, other = Model(SMALL), Model(SMALL), Model(replace(SMALL, seed=1))
    name = "block.0.mlp.mlp1_weight.blocks"
    assert torch.equal(one.tensors[name], same.tensors[name])
    assert not torch.equal(one.tensors[name], other.tensors[name])


@pytest.mark.slow
def test_a_layer_of_the_true_shape_is_made_in_seconds_and_has_the_released_size() -> None:
    layer = Model(TRUE_LAYER)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in layer.tensors.items()}
    assert sum(size for name, size in sizes.items() if name.startswith("block.0.")) == 476_863_552


@pytest.mark.slow
def test_the_true_tokenizer_is_rebuilt_byte_for_byte(true_file: Path) -> None:
    from tokenizers import Tokenizer

    assert hashlib.sha256(true_file.read_bytes()).hexdigest() == tk.TRUE_SHA256
    tokenizer = Tokenizer.from_file(str(true_file))
    assert tokenizer.encode("Hello, world!").ids == [13225, 11, 2375, 0]
    assert tokenizer.get_vocab_size() == 200019

"""The two safetensors layouts of the release: the Hugging Face one (repository root) and `original/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import safetensors_files as st
from support.model import Model, Spec, original_shapes
from support.tokenizer import CHAT_TEMPLATE, small_tokenizer, write_tokenizer
from tokenizers import Tokenizer

RENAMED = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "attn.sinks": "self_attn.sinks",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}


def hf_sources(spec: Spec) -> dict[str, tuple[str, int, int]]:
    """HF name -> (original name, first row, end row), in the order in which the release was converted."""
    rows = {
        "q": (0, spec.query_width),
        "k": (spec.query_width, spec.query_width + spec.kv_width),
        "v": (spec.query_width + spec.kv_width, spec.query_width + 2 * spec.kv_width),
    }
    result: dict[str, tuple[str, int, int]] = {}
    for name, (_, shape) in original_shapes(spec).items():
        if not name.startswith("block."):
            result[RENAMED[name]] = (name, 0, shape[0])
            continue
        _, layer, kind = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if kind.startswith("attn.qkv."):
            for part, (first, end) in rows.items():
                result[f"{prefix}self_attn.{part}_proj.{kind.rpartition('.')[2]}"] = (name, first, end)
        else:
            result[prefix + RENAMED[kind]] = (name, 0, shape[0])
    return result


def original_entries(spec: Spec) -> dict[str, st.Entry]:
    return {name: ("BF16" if kind == "BF16" else "U8", shape) for name, (kind, shape) in original_shapes(spec).items()}


def hf_entries(spec: Spec) -> dict[str, st.Entry]:
    stored = original_entries(spec)
    return {
        name: (stored[source][0], (end - first, *stored[source][1][1:]))
        for name, (source, first, end) in hf_sources(spec).items()
    }


def hf_tensors(model: Model) -> dict[str, st.Lazy]:
    return {
        name: lambda source=source, first=first, end=end: model.tensors[source][first:end]  # type: ignore[misc]
        for name, (source, first, end) in hf_sources(model.spec).items()
    }


def hf_shards(spec: Spec, limit: int | None) -> dict[str, dict[str, st.Entry]]:
    """File name -> its tensors. File numbers count from 0 and the number after "of" is the last file's."""
    entries = hf_entries(spec)
    if limit is None:
        limit = sum(map(st.size, entries.values())) * 3 // 10
    parts = st.shards(entries, limit)
    return {f"model-{i:05}-of-{len(parts) - 1:05}.safetensors": part for i, part in enumerate(parts)}


def index_text(files: dict[str, dict[str, st.Entry]]) -> str:
    """The release's index: one line, tensors in conversion order."""
    total = sum(st.size(entry) for part in files.values() for entry in part.values())
    weight_map = {name: file for file, part in files.items() for name in part}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})


def config_hf(spec: Spec) -> dict[str, Any]:
    """config.json as the release has it (no dtype, no bos_token_id)."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": spec.token_id(200002),
        "experts_per_token": spec.experts_per_token,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initial_context_length": spec.initial_context,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "layer_types": spec.layer_types,
        "max_position_embeddings": spec.max_position,
        "model_type": "gpt_oss",
        "num_attention_heads": spec.heads,
        "num_experts_per_tok": spec.experts_per_token,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "num_local_experts": spec.experts,
        "output_router_logits": False,
        "pad_token_id": spec.token_id(199999),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": spec.rms_eps,
        "rope_scaling": {
            "beta_fast": spec.beta_fast,
            "beta_slow": spec.beta_slow,
            "factor": spec.rope_factor,
            "original_max_position_embeddings": spec.initial_context,
            "rope_type": "yarn",
            "truncate": spec.truncate,
        },
        "rope_theta": spec.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": spec.sliding_window,
        "swiglu_limit": spec.swiglu_limit,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": spec.vocab,
    }


def pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def generation_config(spec: Spec) -> dict[str, Any]:
    return {
        "bos_token_id": spec.token_id(199998),
        "do_sample": True,
        "eos_token_id": [spec.token_id(official) for official in (200002, 199999, 200012)],
        "pad_token_id": spec.token_id(199999),
        "transformers_version": "4.55.0.dev0",
    }


def write_companions(spec: Spec, folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None = None) -> None:
    """The files beside the weights: configuration, generation defaults, tokenizer (by default a small one), template."""
    (folder / "config.json").write_text(pretty(config))
    (folder / "generation_config.json").write_text(pretty(generation_config(spec)))
    if tokenizer is None:
        small_tokenizer(folder, spec.vocab, spec.spare_rows)
    else:
        write_tokenizer(tokenizer, folder, spec.text_tokens)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_hf(model: Model, folder: Path, shard_limit: int | None = None, tokenizer: Tokenizer | None = None) -> None:
    """The Hugging Face layout exactly as released. By default the shards hold some 30 % each, so a layer spans two."""
    folder.mkdir(parents=True, exist_ok=True)
    files = hf_shards(model.spec, shard_limit)
    tensors = hf_tensors(model)
    for name, entries in files.items():
        st.write(folder / name, entries, tensors)
    (folder / "model.safetensors.index.json").write_text(index_text(files))
    write_companions(model.spec, folder, config_hf(model.spec), tokenizer)


def config_original(spec: Spec) -> dict[str, Any]:
    """original/config.json; it knows neither the rms epsilon nor the position limit nor any token id."""
    return {
        "num_hidden_layers": spec.layers,
        "num_experts": spec.experts,
        "experts_per_token": spec.experts_per_token,
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "swiglu_limit": spec.swiglu_limit,
        "head_dim": spec.head_dim,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "sliding_window": spec.sliding_window,
        "initial_context_length": spec.initial_context,
        "rope_theta": spec.rope_theta,
        "rope_scaling_factor": spec.rope_factor,
        "rope_ntk_alpha": int(spec.beta_slow) if float(spec.beta_slow).is_integer() else spec.beta_slow,
        "rope_ntk_beta": int(spec.beta_fast) if float(spec.beta_fast).is_integer() else spec.beta_fast,
    }


def original_shards(spec: Spec, limit: int) -> dict[str, dict[str, st.Entry]]:
    """File name -> its tensors; two hyphens, numbers from 1, and the number after "of" is the count."""
    parts = st.shards(original_entries(spec), limit)
    return {f"model--{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


DEFINITION_ORDER = (
    "attn.norm.scale", "attn.qkv.weight", "attn.qkv.bias", "attn.sinks", "attn.out.weight", "attn.out.bias",
    "mlp.norm.scale", "mlp.gate.weight", "mlp.gate.bias", "mlp.mlp1_weight.blocks", "mlp.mlp1_weight.scales",
    "mlp.mlp1_bias", "mlp.mlp2_weight.blocks", "mlp.mlp2_weight.scales", "mlp.mlp2_bias",
)  # fmt: skip


def dtypes_text(spec: Spec) -> str:
    """original/dtypes.json: logical dtypes in the order of the model's definition, layers counted up."""
    blocks = [f"block.{layer}.{kind}" for layer in range(spec.layers) for kind in DEFINITION_ORDER]
    shapes = original_shapes(spec)
    return json.dumps(
        {name: shapes[name][0] for name in ("embedding.weight", *blocks, "norm.scale", "unembedding.weight")}
    )


def write_original(model: Model, folder: Path, shards: int | None = None) -> None:
    """The original/ layout: one file, or `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = original_entries(model.spec)
    tensors: dict[str, st.Lazy] = {name: lambda t=tensor: t for name, tensor in model.tensors.items()}  # type: ignore[misc]
    if shards is None:
        st.write(folder / "model.safetensors", entries, tensors)
    else:
        limit = -(-sum(map(st.size, entries.values())) // shards)
        while len(files := original_shards(model.spec, limit)) > shards:
            limit += limit // 50 + 1
        for name, part in files.items():
            st.write(folder / name, part, tensors)
        (folder / "model.safetensors.index.json").write_text(index_text(files))
    (folder / "config.json").write_text(json.dumps(config_original(model.spec)))
    (folder / "dtypes.json").write_text(dtypes_text(model.spec))

"""GGUF, through gguf-py's writer, with the tensors and the metadata that llama.cpp's own converter gives."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from support.model import Model, Spec
from support.release import hf_tensors
from support.tokenizer import CHAT_TEMPLATE, as_text, merges, small_vocabulary, special_tokens

Dense = Literal["bf16", "f16", "f32"]
Experts = Literal["mxfp4", "bf16", "f32"]

FILE_TYPES = {"mxfp4": 38, "bf16": 32, "f32": 0}

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}


def gguf_name(name: str) -> str:
    """The GGUF name of an HF tensor outside the experts."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    layer, kind = name.removeprefix("model.layers.").split(".", 1)
    if kind == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    module, _, leaf = kind.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{leaf}"


def ggml_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Release MXFP4 [..., out, G, 16] as rows of ggml blocks: scale, then element j low and j + 16 high in byte j."""
    packed = blocks.numpy()
    codes = np.empty((*packed.shape[:-1], 32), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    result = np.empty((*packed.shape[:-1], 17), np.uint8)
    result[..., 0] = scales.numpy()
    result[..., 1:] = codes[..., :16] | codes[..., 16:] << 4
    return result.reshape(*packed.shape[:-2], -1)


def bf16_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    if kind == "bf16":
        writer.add_tensor(name, bf16_bytes(tensor), raw_dtype=Type.BF16)
    else:
        dtype = {"f32": torch.float32, "f16": torch.float16}[kind]
        writer.add_tensor(name, tensor.to(dtype).contiguous().numpy())


def _add_experts(writer: gguf.GGUFWriter, model: Model, layer: int, experts: Experts) -> None:
    prefix = f"block.{layer}.mlp."
    gate_up, down = prefix + "mlp1_weight.", prefix + "mlp2_weight."
    names = (("ffn_gate_exps", slice(0, None, 2)), ("ffn_up_exps", slice(1, None, 2)), ("ffn_down_exps", slice(None)))
    for name, rows in names:
        source = down if name == "ffn_down_exps" else gate_up
        target = f"blk.{layer}.{name}.weight"
        if experts == "mxfp4":
            blocks, scales = model.tensors[source + "blocks"], model.tensors[source + "scales"]
            writer.add_tensor(target, ggml_mxfp4(blocks[:, rows], scales[:, rows]), raw_dtype=Type.MXFP4)
        else:
            values = model.down(layer) if name == "ffn_down_exps" else model.gate_up(layer)
            _add(writer, target, values[:, rows], experts)
        bias = model.tensors[prefix + ("mlp2_bias" if name == "ffn_down_exps" else "mlp1_bias")]
        _add(writer, f"blk.{layer}.{name}.bias", bias[:, rows], "f32")


def _add_metadata(writer: gguf.GGUFWriter, spec: Spec, file_type: int) -> None:
    writer.add_type("model")
    writer.add_name("Gpt Oss Test")
    writer.add_license("apache-2.0")
    writer.add_tags(["text-generation"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_sliding_window(spec.sliding_window)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.experts_per_token)
    writer.add_expert_feed_forward_length(spec.intermediate)
    writer.add_rope_freq_base(float(spec.rope_theta))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(spec.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(spec.initial_context)
    writer.add_rope_scaling_yarn_beta_fast(spec.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(spec.beta_slow)


def _add_tokenizer(writer: gguf.GGUFWriter, spec: Spec) -> None:
    tokens = small_vocabulary(spec.text_tokens)
    listed = [as_text(token) for token in tokens]
    kinds = [int(gguf.TokenType.NORMAL)] * len(listed)
    for text in special_tokens(len(tokens)).values():
        listed.append(text)
        kinds.append(int(gguf.TokenType.CONTROL))
    for i in range(len(listed), spec.vocab):
        listed.append(f"[PAD{i}]")
        kinds.append(int(gguf.TokenType.UNUSED))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(listed)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{a} {b}" for a, b in merges({token: i for i, token in enumerate(tokens)})])
    writer.add_bos_token_id(spec.token_id(199998))
    writer.add_eos_token_id(spec.token_id(200002))
    writer.add_pad_token_id(spec.token_id(199999))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(
    model: Model,
    path: Path,
    split: int | None = None,
    *,
    dense: Dense = "bf16",
    experts: Experts = "mxfp4",
    small_first_shard: bool = False,
) -> list[Path]:
    """Write one GGUF, or `<stem>-0000i-of-0000n.gguf` of at most `split` tensors each. Returns the files written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "gpt-oss", split_max_tensors=split or 0, small_first_shard=small_first_shard)
    _add_metadata(writer, model.spec, FILE_TYPES[experts])
    _add_tokenizer(writer, model.spec)
    for name, tensor in hf_tensors(model).items():
        if ".mlp.experts." in name:
            continue
        plain = name.endswith(("bias", "sinks")) or "norm" in name or ".mlp.router." in name
        _add(writer, gguf_name(name), tensor(), "f32" if plain else dense)
    for layer in range(model.spec.layers):
        _add_experts(writer, model, layer, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def fuse_qkv(path: Path, target: Path) -> Path:
    """The same model with attn_q, attn_k and attn_v of each layer joined as attn_qkv, under `target`; `path` goes."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "gpt-oss")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, of = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, of)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        if ".attn_k." in name or ".attn_v." in name:
            continue
        parts = (
            [tensors[name.replace(".attn_q.", f".attn_{part}.")] for part in "qkv"] if ".attn_q." in name else [tensor]
        )
        data = np.concatenate([np.array(part.data) for part in parts])
        writer.add_tensor(name.replace(".attn_q.", ".attn_qkv."), data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    return target

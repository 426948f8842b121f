"""The canonical model: which tensors a gpt-oss has, what they are called in each layout, and their shapes.

Canonical names are Hugging Face's, canonical matrices are [rows, columns] = [out, in], expert stacks [E, out, in] with
gate and up rows alternating (gate even, up odd) as in the release, whatever the encoding. Letters: see config.py.

    canonical (N = layer)                        shape          original/                       GGUF (blk.N.…)
    model.embed_tokens.weight                    [V, D]         embedding.weight                token_embd.weight
    model.layers.N.input_layernorm.weight        [D]            block.N.attn.norm.scale         attn_norm.weight
    …self_attn.{q,k,v}_proj.{weight,bias}        [H·hd, D] …    block.N.attn.qkv.{weight,bias}  attn_{q,k,v}.{weight,bias}
    …self_attn.o_proj.{weight,bias}              [D, H·hd] [D]  block.N.attn.out.{weight,bias}  attn_output.{weight,bias}
    …self_attn.sinks                             [H]            block.N.attn.sinks              attn_sinks.weight
    …post_attention_layernorm.weight             [D]            block.N.mlp.norm.scale          post_attention_norm.weight
    …mlp.router.{weight,bias}                    [E, D] [E]     block.N.mlp.gate.{weight,bias}  ffn_gate_inp.{weight,bias}
    …mlp.experts.gate_up_proj                    [E, 2F, D]     block.N.mlp.mlp1_weight.*       ffn_{gate,up}_exps.weight
    …mlp.experts.gate_up_proj_bias               [E, 2F]        block.N.mlp.mlp1_bias           ffn_{gate,up}_exps.bias
    …mlp.experts.down_proj                       [E, D, F]      block.N.mlp.mlp2_weight.*       ffn_down_exps.weight
    …mlp.experts.down_proj_bias                  [E, D]         block.N.mlp.mlp2_bias           ffn_down_exps.bias
    model.norm.weight                            [D]            norm.scale                      output_norm.weight
    lm_head.weight                               [V, D]         unembedding.weight              output.weight
"""

from __future__ import annotations

from gptoss_convert.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

Shape = tuple[int, ...]

_OUTER = {
    EMBEDDING: ("embedding.weight", "token_embd.weight"),
    FINAL_NORM: ("norm.scale", "output_norm.weight"),
    HEAD: ("unembedding.weight", "output.weight"),
}
# Per layer, in HF's spelling: (original's, GGUF's); None where the correspondence is not one to one.
_INNER: dict[str, tuple[str | None, str | None]] = {
    "input_layernorm.weight": ("attn.norm.scale", "attn_norm.weight"),
    "self_attn.q_proj.weight": (None, "attn_q.weight"),
    "self_attn.q_proj.bias": (None, "attn_q.bias"),
    "self_attn.k_proj.weight": (None, "attn_k.weight"),
    "self_attn.k_proj.bias": (None, "attn_k.bias"),
    "self_attn.v_proj.weight": (None, "attn_v.weight"),
    "self_attn.v_proj.bias": (None, "attn_v.bias"),
    "self_attn.o_proj.weight": ("attn.out.weight", "attn_output.weight"),
    "self_attn.o_proj.bias": ("attn.out.bias", "attn_output.bias"),
    "self_attn.sinks": ("attn.sinks", "attn_sinks.weight"),
    "post_attention_layernorm.weight": ("mlp.norm.scale", "post_attention_norm.weight"),
    "mlp.router.weight": ("mlp.gate.weight", "ffn_gate_inp.weight"),
    "mlp.router.bias": ("mlp.gate.bias", "ffn_gate_inp.bias"),
    GATE_UP: ("mlp.mlp1_weight", None),
    GATE_UP + "_bias": ("mlp.mlp1_bias", None),
    DOWN: ("mlp.mlp2_weight", "ffn_down_exps.weight"),
    DOWN + "_bias": ("mlp.mlp2_bias", "ffn_down_exps.bias"),
}


def layer_name(layer: int, inner: str) -> str:
    """Canonical name of a layer's tensor: (3, "mlp.router.bias") → "model.layers.3.mlp.router.bias"."""
    return f"model.layers.{layer}.{inner}"


def split_name(name: str) -> tuple[int | None, str]:
    """The inverse of `layer_name`; (None, name) for the three tensors outside the layers."""
    if name in _OUTER:
        return None, name
    layer, _, inner = name.removeprefix("model.layers.").partition(".")
    return int(layer), inner


def original_name(name: str) -> str | None:
    """The name in `original/`, without .blocks/.scales; None for q, k and v, which are parts of qkv there."""
    layer, inner = split_name(name)
    if layer is None:
        return _OUTER[name][0]
    there = _INNER[inner][0]
    return None if there is None else f"block.{layer}.{there}"


def gguf_name(name: str) -> str | None:
    """The name in a GGUF; None for gate_up, which is two tensors there (`gguf_gate_up`)."""
    layer, inner = split_name(name)
    if layer is None:
        return _OUTER[name][1]
    there = _INNER[inner][1]
    return None if there is None else f"blk.{layer}.{there}"


def gguf_gate_up(name: str) -> tuple[str, str]:
    """The GGUF names (gate, up) that a canonical gate_up_proj or gate_up_proj_bias is divided into."""
    layer, inner = split_name(name)
    suffix = "bias" if inner.endswith("_bias") else "weight"
    return f"blk.{layer}.ffn_gate_exps.{suffix}", f"blk.{layer}.ffn_up_exps.{suffix}"


def is_expert_matrix(name: str) -> bool:
    """Whether the tensor is a stack of expert matrices: what MXFP4 packs in the release."""
    return name.endswith((GATE_UP, DOWN))


def is_gate_up(name: str) -> bool:
    """Whether the tensor's rows (or a bias's columns) alternate gate and up."""
    return name.endswith((GATE_UP, GATE_UP + "_bias"))


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every canonical tensor of the model and its shape, in the order of the forward pass: 17·L + 3 tensors."""
    d, f, e = config.hidden, config.intermediate, config.experts
    inner: dict[str, Shape] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (config.q_rows, d),
        "self_attn.q_proj.bias": (config.q_rows,),
        "self_attn.k_proj.weight": (config.kv_rows, d),
        "self_attn.k_proj.bias": (config.kv_rows,),
        "self_attn.v_proj.weight": (config.kv_rows, d),
        "self_attn.v_proj.bias": (config.kv_rows,),
        "self_attn.sinks": (config.heads,),
        "self_attn.o_proj.weight": (d, config.q_rows),
        "self_attn.o_proj.bias": (d,),
        "post_attention_layernorm.weight": (d,),
        "mlp.router.weight": (e, d),
        "mlp.router.bias": (e,),
        GATE_UP: (e, 2 * f, d),
        GATE_UP + "_bias": (e, 2 * f),
        DOWN: (e, d, f),
        DOWN + "_bias": (e, d),
    }
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab, d)}
    for layer in range(config.layers):
        shapes.update({layer_name(layer, name): shape for name, shape in inner.items()})
    shapes.update({FINAL_NORM: (d,), HEAD: (config.vocab, d)})
    return shapes


def as_stack(shape: Shape) -> tuple[int, int, int]:
    """(E, R, C) of a canonical shape: a matrix is a stack of one, a vector a matrix of one row."""
    if len(shape) == 1:
        return 1, 1, shape[0]
    return (1, *shape) if len(shape) == 2 else (shape[0], shape[1], shape[2])

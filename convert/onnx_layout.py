"""Which tensors an ONNX gpt-oss has, and which canonical ones they hold; what target and source have in common.

    canonical                       tensor of the graph                                   as
    embed_tokens.weight             model.embed_tokens.weight[_Qb, _scales]               f32 [V, D], or blocks
    input_layernorm.weight          model.layers.N.input_layernorm.weight                 f32 [D]
    q, k, v rows one after another  model.layers.N.attn.qkv_proj.MatMul.weight…           f32 [R, D], or blocks
    o_proj, mlp.router, lm_head     …attn.o_proj, …moe.router, lm_head .MatMul.weight…    the same
    their biases                    ….Add.bias                                            f32
    self_attn.sinks                 model.layers.N.attn.sinks                             f32 [H]
    mlp.experts.gate_up_proj        model.layers.N.moe.experts.gate_up_proj.qweight       uint8 [E, R, C·b/8]
                                    ….scales                                              f32 or E8M0 [E, R, C/32]
    model.norm.weight               model.layers.L.final_norm_layernorm.weight            f32 [D]

Blocks are `weight_Qb` uint8 [R, C/32, 4·b] and `weight_scales` f32 [R, C/32], of codecs int4_mm and int8_mm; experts are MXFP4
as released, int4_moe or int8_moe (`kernels/signed_blocks.py`). Names are those of onnxruntime-genai's builder. The embedding's
blocks are [V, C·b/8], as GatherBlockQuantized reads them. cos_cache and sin_cache come first in the data file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Shape,
    canonical_shapes,
    is_expert_matrix,
    split_name,
)
from gptoss_convert.convert.plan import BLOCKS, INT_CODES, INT_SCALES, SCALES, Slot
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.gguf import align
from gptoss_convert.formats.onnx import ALIGNMENT, E8M0, FLOAT, UINT8, Tensor
from gptoss_convert.kernels.rotary import Yarn

GROUP = 32
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
COSINES, SINES = "cos_cache", "sin_cache"
BITS = {"int4": 4, "int8": 8}
EXPERTS, DENSE = ("mxfp4", "int8", "int4"), ("f32", "int8", "int4")
METADATA = "gptoss-convert.variant"
HEAD_STEP = 16  # GroupQueryAttention turns no other widths of a head
MOST_TABLE_BYTES = 1 << 28  # a million positions of heads 64 wide; runtimes and this tool hold them in memory


@dataclass(frozen=True)
class Variant:
    """How each part is written. window_cache: layers that slide keep only their window of keys and values."""

    experts: str
    attention: str
    router: str
    embedding: str
    head: str
    window_cache: bool

    def as_json(self) -> str:
        """For the graph's metadata."""
        return json.dumps(asdict(self), sort_keys=True)


def read_variant(text: str | None, path: object) -> Variant:
    """What the metadata of a graph of ours says; BadInput for another's graph."""
    variant = None
    if text is not None:
        with contextlib.suppress(ValueError, TypeError):
            variant = Variant(**json.loads(text))
    known = variant is not None and all(
        getattr(variant, part) in (EXPERTS if part == "experts" else DENSE)
        for part in ("experts", "attention", "router", "embedding", "head")
    )
    if variant is None or not known or not isinstance(variant.window_cache, bool):
        raise BadInput(
            "an ONNX model that is not this tool's, and others are not read", file=path, found=text or "no metadata of ours",
            expected="what `convert --to onnx` wrote", remedy="take the checkpoint that it was made from",
        )  # fmt: skip
    return variant


@dataclass(frozen=True)
class Home:
    """Where a canonical tensor goes: its slots, and the tensors of the graph that they are, or are part of."""

    slots: tuple[Slot, ...]
    tensors: tuple[Tensor, ...]


def homes(config: ModelConfig, variant: Variant) -> dict[str, Home]:
    """Canonical name → home, in the order of the forward pass."""
    return {name: _home(name, shape, config, variant) for name, shape in canonical_shapes(config).items()}


def _home(name: str, shape: Shape, config: ModelConfig, variant: Variant) -> Home:
    layer, inner = split_name(name)
    if is_expert_matrix(name):
        return _experts(f"model.layers.{layer}.moe.{inner.removeprefix('mlp.')}.", shape, variant.experts)
    stem = f"model.layers.{layer}."
    part = inner.split(".")
    if inner.startswith("self_attn.") and part[1][:2] in ("q_", "k_", "v_"):
        first = {"q": 0, "k": config.q_rows, "v": config.q_rows + config.kv_rows}[part[1][0]]
        total = config.q_rows + 2 * config.kv_rows
        if part[2] == "bias":
            return _vector(stem + "attn.qkv_proj.Add.bias", (total,), first)
        return _matrix(stem + "attn.qkv_proj.MatMul.weight", (total, shape[1]), variant.attention, first)
    if inner == "self_attn.o_proj.weight":
        return _matrix(stem + "attn.o_proj.MatMul.weight", shape, variant.attention)
    if inner == "mlp.router.weight":
        return _matrix(stem + "moe.router.MatMul.weight", shape, variant.router)
    if name == HEAD:
        return _matrix("lm_head.MatMul.weight", shape, variant.head)
    if name == EMBEDDING:
        return _embedding(shape, variant.embedding)
    return _vector(_plain_name(name, inner, stem, config), shape)


def _plain_name(name: str, inner: str, stem: str, config: ModelConfig) -> str:
    if name == FINAL_NORM:
        return f"model.layers.{config.layers}.final_norm_layernorm.weight"
    if inner.endswith("_proj_bias"):
        return stem + "moe." + inner.removeprefix("mlp.").removesuffix("_bias") + ".bias"
    fixed = {"mlp.router.bias": "moe.router.Add.bias", "self_attn.o_proj.bias": "attn.o_proj.Add.bias"}
    return stem + (fixed.get(inner) or inner.replace("self_attn.", "attn."))


def _vector(name: str, shape: Shape, first: int = 0) -> Home:
    return Home((Slot(name, "f32", shape, first_row=first),), (Tensor(name, FLOAT, shape),))


def _matrix(name: str, shape: Shape, kind: str, first: int = 0) -> Home:
    """shape: of the tensor of the graph; first: the row in it where the canonical rows begin."""
    if kind == "f32":
        return _vector(name, shape, first)
    rows, columns = shape
    bits, groups = BITS[kind], _groups(name, columns)
    tensors = (
        Tensor(f"{name}_Q{bits}", UINT8, (rows, groups, GROUP * bits // 8)),
        Tensor(f"{name}_scales", FLOAT, (rows, groups)),
    )
    return Home(_fields(tensors, kind + "_mm", (rows,), groups, first), tensors)


def _embedding(shape: Shape, kind: str) -> Home:
    name = "model.embed_tokens.weight"
    if kind == "f32":
        return _vector(name, shape)
    rows, columns = shape
    bits, groups = BITS[kind], _groups(name, columns)
    tensors = (
        Tensor(f"{name}_Q{bits}", UINT8, (rows, columns * bits // 8)),
        Tensor(f"{name}_scales", FLOAT, (rows, groups)),
    )
    return Home(_fields(tensors, kind + "_mm", (rows,), groups, 0), tensors)


def _experts(stem: str, shape: Shape, kind: str) -> Home:
    experts, rows, columns = shape
    groups = _groups(stem + "qweight", columns)
    packed = columns if kind == "int8" else columns // 2
    tensors = (
        Tensor(stem + "qweight", UINT8, (experts, rows, packed)),
        Tensor(stem + "scales", E8M0 if kind == "mxfp4" else FLOAT, (experts, rows, groups)),
    )
    if kind == "mxfp4":
        halves = zip(tensors, (BLOCKS, SCALES), strict=True)
        return Home(tuple(Slot(tensor.name, codec, tensor.shape) for tensor, codec in halves), tensors)
    return Home(_fields(tensors, kind + "_moe", (experts, rows), groups, 0), tensors)


def _fields(tensors: tuple[Tensor, ...], codec: str, outer: Shape, groups: int, first: int) -> tuple[Slot, ...]:
    codes, scales = tensors
    packed = codes.nbytes // (outer[0] * (outer[1] if len(outer) > 1 else 1))
    return (
        Slot(codes.name, codec, (*outer, packed), field=INT_CODES, width=1, first_row=first),
        Slot(scales.name, codec, (*outer, groups), field=INT_SCALES, width=4, first_row=first),
    )


def _groups(name: str, columns: int) -> int:
    if columns % GROUP:
        raise Refused(
            f"blocks of {GROUP} do not divide a matrix's columns", tensor=name, found=f"{columns} columns",
            expected=f"a multiple of {GROUP}", remedy="write this part as f32",
        )  # fmt: skip
    return columns // GROUP


def require_runnable(config: ModelConfig, where: object) -> None:
    """Refuse a configuration that ONNX Runtime's operators do not compute, or whose rotary tables are beyond all measure."""
    if config.head_dim % HEAD_STEP:
        raise Refused(
            "ONNX Runtime's attention turns no heads of this width", file=where, found=f"head_dim {config.head_dim}",
            expected=f"a multiple of {HEAD_STEP}", remedy="convert to gguf, hf or bf16 instead",
        )  # fmt: skip
    if config.rope_theta <= 1:
        raise Refused(
            "YaRN has no frequencies for this base", file=where, found=f"rope_theta {config.rope_theta:g}",
            expected="more than 1", remedy="the configuration is wrong; transformers cannot compute it either",
        )  # fmt: skip
    size = sum(tensor.nbytes for tensor in cache_tensors(config))
    if size > MOST_TABLE_BYTES:
        raise Refused(
            "the rotary tables of so many positions are too large for a graph", file=where,
            found=f"max_position_embeddings {config.max_positions:,}: {size:,} bytes",
            expected=f"at most {MOST_TABLE_BYTES:,} bytes, {config.max_positions * MOST_TABLE_BYTES // size:,} positions",
            remedy="lower max_position_embeddings in config.json to what will be served",
        )  # fmt: skip


def cache_tensors(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The rotary embedding's tables, which are no weights: f32 [positions, head_dim / 2], first in the data file."""
    shape = (config.max_positions, config.head_dim // 2)
    cosines = Tensor(COSINES, FLOAT, shape)
    return cosines, Tensor(SINES, FLOAT, shape, align(cosines.nbytes, ALIGNMENT))


def yarn(config: ModelConfig) -> Yarn:
    """What the tables are made from."""
    return Yarn(
        config.head_dim, config.rope_theta, config.rope_factor, config.original_positions, config.beta_fast,
        config.beta_slow, config.truncate, config.attention_factor,
    )  # fmt: skip


def placed(config: ModelConfig, found: Mapping[str, Home]) -> list[Tensor]:
    """Every tensor of the data file with its offset: the tables, then the weights in the order of the forward pass."""
    tables = cache_tensors(config)
    unique = {tensor.name: tensor for home in found.values() for tensor in home.tensors}
    placed, at = list(tables), tables[1].offset + tables[1].nbytes
    for tensor in unique.values():
        at = align(at, ALIGNMENT)
        placed.append(Tensor(tensor.name, tensor.kind, tensor.shape, at))
        at += tensor.nbytes
    return placed

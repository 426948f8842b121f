"""metal's `model.bin` as a source: readable, and lossy in one place.

Undone on reading: the rotation of q and k rows within each head, the factors 0.5 and 0.25 folded into q and k, the 14 added
to every scale byte. Lost for good: the vocabulary rows after the last token that the file knows (for the releases 200,014 …
201,087), the chat template, and the names of reserved tokens.

Weights, each item at a multiple of 16: embedding; per block attention norm, qkv weight and bias, sinks, out weight and bias,
mlp norm, router weight and bias; final norm; unembedding; then per block, at a multiple of 16384, per expert: mlp1 blocks,
scales, bias, mlp2 blocks, scales, bias.
"""

from __future__ import annotations

import math
from pathlib import Path

from gptoss_convert.config import ModelConfig, check_consistent
from gptoss_convert.convert.names import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    HEAD,
    as_stack,
    canonical_shapes,
    layer_name,
)
from gptoss_convert.convert.source import Layout, Source, StoredTensor
from gptoss_convert.convert.tokenizer_files import vocabulary_companions
from gptoss_convert.convert.views import Packed, Rotated, RowPerExpert, RowRange, Stored
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.metal import PAGE, SPECIAL_NAMES, MetalHeader, read_header

SCALE_BIAS = 14
Q_FACTOR, K_FACTOR = 2.0, 4.0  # the inverses of what was folded in
MAX_RELEASED_ROWS = 201088


def open_metal(path: Path) -> Source:
    """Open a model.bin as a source."""
    file = SourceFile(path)
    try:
        header = read_header(file)
        config = _config(header, path)
        source = Source(path, Layout.METAL, config, {}, [file])
        end = _lay_out(source, file, header.weights_start)
        if end != file.size:
            raise BadInput("the file's size does not fit its header", file=path, found=file.size, expected=end)
    except BaseException:
        file.close()
        raise
    source.companions = vocabulary_companions(header.tokens, _special_tokens(header))
    source.losses.append(
        f"vocabulary rows from {config.vocab} on are not in the file (the release has {MAX_RELEASED_ROWS} rows)"
    )
    source.losses.append("no chat template and no generation defaults are in the file")
    source.notes.append(
        "q and k are unrotated, their folded factors and the scales' offset taken out: exact in bfloat16"
    )
    source.check_shapes()
    return source


def _config(header: MetalHeader, path: Path) -> ModelConfig:
    widths = (header.hidden, header.intermediate, header.head_dim, header.heads, header.kv_heads)
    floats = (header.swiglu_limit, header.rms_eps, header.yarn_offset, header.yarn_scale, header.interpolation_scale)
    counts = (header.blocks, header.experts, header.active_experts, header.window, header.context_length, *widths)
    scale, theta, step = header.interpolation_scale, header.rope_theta, header.yarn_scale
    plain = (
        all(map(math.isfinite, floats))
        and all(0 < count < 1 << 24 for count in counts)
        and header.blocks <= 4096
        and header.experts <= 4096
    )
    if header.head_dim != 64:  # 0.5 · 0.25 = 1/√64 is folded into q and k: the only head size the format knows
        raise BadInput("metal's format has heads of 64 only", file=path, found=header.head_dim)
    if (
        not plain
        or not 0 < scale <= 1
        or not 1 < theta < 1e12
        or not 0 < step < 1e6
        or header.hidden % 32
        or header.intermediate % 32
    ):
        raise BadInput("a number in the header is out of range", file=path, found=f"{counts}, {scale}, {theta}, {step}")
    original = round(header.context_length * scale)

    def beta(bound: float) -> float:
        # bound = (hd/2) · ln(original / (2π·beta)) / ln(theta), solved for beta; the release's 32 and 1 come out whole.
        value = original / (2 * math.pi) * theta ** (-2 * bound / header.head_dim)
        return float(f"{value:.4g}")

    low = -header.yarn_offset / step
    config = ModelConfig(
        layers=header.blocks,
        experts=header.experts,
        experts_per_token=header.active_experts,
        hidden=header.hidden,
        intermediate=header.intermediate,
        vocab=len(header.tokens) + len(header.specials),
        heads=header.heads,
        kv_heads=header.kv_heads,
        head_dim=header.head_dim,
        sliding_window=header.window,
        max_positions=header.context_length,
        original_positions=original,
        rope_theta=theta,
        rope_factor=float(f"{1 / scale:.6g}"),
        beta_fast=beta(low),
        beta_slow=beta(low + 1 / step),
        swiglu_limit=header.swiglu_limit,
        rms_eps=float(f"{header.rms_eps:.6g}"),
    )
    check_consistent(config, path)
    return config


def _special_tokens(header: MetalHeader) -> dict[int, str]:
    """Names by id: those whose UUID is known; start and end of text by their fixed places; the others as reserved."""
    first = len(header.tokens)
    fixed = {0: "<|startoftext|>", 1: "<|endoftext|>"}
    names = {first + i: SPECIAL_NAMES.get(uuid, fixed.get(i)) for i, uuid in enumerate(header.specials)}
    return {i: name or f"<|reserved_{i}|>" for i, name in names.items()}


def _lay_out(source: Source, file: SourceFile, start: int) -> int:
    """Place every tensor; returns where the last one ends."""
    config, at = source.config, start
    shapes = canonical_shapes(config)

    def place(name: str, rows: int, columns: int, aligned: bool = True) -> Stored:
        nonlocal at
        at += -at % 16 if aligned else 0
        view = Stored(file, at, "bf16", (1, rows, columns))
        at += 2 * rows * columns
        _list(source, name, "BF16", (rows, columns), 2 * rows * columns)
        return view

    def whole(name: str, aligned: bool = True) -> None:
        _, rows, columns = as_stack(shapes[name])
        source.views[name] = place(name, rows, columns, aligned)
        source.names[name] = (name,)

    whole(EMBEDDING)
    for layer in range(config.layers):
        whole(layer_name(layer, "input_layernorm.weight"))
        total = config.q_rows + 2 * config.kv_rows
        weight = place(layer_name(layer, "qkv.weight"), total, config.hidden)
        bias = place(layer_name(layer, "qkv.bias"), 1, total, aligned=False)
        _add_attention(source, layer, weight, bias)
        whole(layer_name(layer, "self_attn.sinks"))
        whole(layer_name(layer, "self_attn.o_proj.weight"))
        whole(layer_name(layer, "self_attn.o_proj.bias"), aligned=False)
        whole(layer_name(layer, "post_attention_layernorm.weight"))
        whole(layer_name(layer, "mlp.router.weight"))
        whole(layer_name(layer, "mlp.router.bias"), aligned=False)
    whole(FINAL_NORM)
    whole(HEAD)
    for layer in range(config.layers):
        at = _place_experts(source, file, layer, at + -at % PAGE)
    return at


def _list(source: Source, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    source.stored.append(StoredTensor(name, dtype, shape, nbytes, source.path.name))


def _add_attention(source: Source, layer: int, weight: Stored, bias: Stored) -> None:
    config = source.config
    first, total = 0, config.q_rows + 2 * config.kv_rows
    for part, rows, factor in (
        ("q", config.q_rows, Q_FACTOR),
        ("k", config.kv_rows, K_FACTOR),
        ("v", config.kv_rows, None),
    ):
        for suffix, base, columns in (("weight", weight, False), ("bias", bias, True)):
            name = layer_name(layer, f"self_attn.{part}_proj.{suffix}")
            view = RowRange(base, first, rows, total, columns)
            source.views[name] = view if factor is None else Rotated(view, config.head_dim, factor, columns)
            source.names[name] = (layer_name(layer, f"qkv.{suffix}"),)
        first += rows


def _place_experts(source: Source, file: SourceFile, layer: int, start: int) -> int:
    """One block's experts, record after record; views with the record's length as their stride."""
    config = source.config
    sizes = [(2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)]
    stride = sum(rows * (columns // 2 + columns // 32 + 2) for rows, columns in sizes)
    at = start
    for name, (rows, columns) in zip((GATE_UP, DOWN), sizes, strict=True):
        full = layer_name(layer, name)
        blocks_at, scales_at = at, at + rows * columns // 2
        bias_at = scales_at + rows * columns // 32
        stack = (config.experts, rows, columns)
        source.views[full] = Packed(file, blocks_at, file, scales_at, stack, stride, stride, SCALE_BIAS)
        vectors = [Stored(file, bias_at + e * stride, "bf16", (1, 1, rows)) for e in range(config.experts)]
        source.views[full + "_bias"] = RowPerExpert(vectors)
        source.names[full], source.names[full + "_bias"] = (full,), (full + "_bias",)
        _list(source, full, "MXFP4", stack, config.experts * rows * columns // 32 * 17)
        _list(source, full + "_bias", "BF16", (config.experts, rows), 2 * config.experts * rows)
        at = bias_at + 2 * rows
    return start + config.experts * stride

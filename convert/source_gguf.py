"""GGUF of architecture gpt-oss as a source: single or split, as llama.cpp's converter, its quantizer or this tool write it.

Gate and up are tensors of their own there and are read alternating; ggml's MXFP4 comes out in release order; a fused
attn_qkv is divided. Ollama's dialect (architecture "gptoss") is recognised and refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_convert.config import ModelConfig, check_consistent, default_sliding
from gptoss_convert.convert.cut import KEY_DROPPED, describe, kept_from, restore
from gptoss_convert.convert.names import as_stack, canonical_shapes, gguf_gate_up, gguf_name, is_gate_up, split_name
from gptoss_convert.convert.source import Layout, Problem, Source, StoredTensor
from gptoss_convert.convert.tokenizer_files import gguf_companions
from gptoss_convert.convert.views import Alternating, RowRange, Stored, View
from gptoss_convert.convert.widen import (
    GAINS_ROUNDED,
    KEY_GAIN,
    KEY_HIDDEN,
    KEY_INTERMEDIATE,
    gain_factor,
    narrow,
)
from gptoss_convert.errors import BadInput, Refused, printable
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import TensorInfo, Value, ValueType, read_header
from gptoss_convert.formats.gguf_split import open_split
from gptoss_convert.kernels.codecs import BY_GGML_ID, FLOATS

ARCHITECTURE = "gpt-oss"
OWN_TRUNCATE = "gptoss-convert.rope.truncate"
Tensors = Mapping[str, tuple[SourceFile, TensorInfo]]


def open_gguf(path: Path) -> Source:
    """Open a GGUF, all parts of it where it is split, as a source."""
    files: list[SourceFile] = []
    try:
        tensors: dict[str, tuple[SourceFile, TensorInfo]] = {}
        metadata: Mapping[str, Value] = {}
        for part in open_split(path):
            files.append(SourceFile(part))
            header = read_header(files[-1])
            metadata = metadata or header.metadata
            tensors.update({name: (files[-1], info) for name, info in header.tensors.items()})
        source = _build(path, metadata, tensors)
    except BaseException:
        for file in files:
            file.close()
        raise
    source.files = files
    source.check_shapes()
    return source


def _build(path: Path, metadata: Mapping[str, Value], tensors: Tensors) -> Source:
    architecture = _get(metadata, "general.architecture")
    if architecture == "gptoss":
        raise Refused(
            "this is Ollama's dialect of GGUF (architecture gptoss): other names, fused gate and up, and MXFP4 blocks "
            "whose nibbles are in another order under a type number of its own",
            file=path,
            remedy="take the official checkpoint or a GGUF of architecture gpt-oss",
        )
    if architecture != ARCHITECTURE:
        raise Refused("the GGUF is of another architecture", file=path, found=repr(architecture), expected=ARCHITECTURE)
    config = config_from_gguf(metadata, path, _vocabulary(tensors))
    source = Source(path, Layout.GGUF, config, {}, [], metadata=metadata)
    for name in canonical_shapes(config):
        _add(source, name, tensors)
    used = {stored for names in source.names.values() for stored in names}
    for name, (_, info) in tensors.items():
        if name not in used:
            source.problems.append(
                Problem("a tensor that gpt-oss does not have", name, f"{info.type_name} {info.shape}")
            )
    source.stored = [
        StoredTensor(name, info.type_name, tuple(reversed(info.shape)), info.nbytes, file.name)
        for name, (file, info) in tensors.items()
    ]
    source.companions = gguf_companions(metadata)
    if KEY_HIDDEN in metadata:
        source = _narrowed(source)
    if OWN_TRUNCATE not in metadata:
        source.notes.append(
            "GGUF does not say whether YaRN's bounds are truncated; the release's answer (no) is assumed"
        )
    return source


def _narrowed(source: Source) -> Source:
    """A wide file of ours, seen as the model it was made of."""
    wide, metadata = source.config, source.metadata
    true = [_get(metadata, key) for key in (KEY_HIDDEN, KEY_INTERMEDIATE)]
    gain = _get(metadata, KEY_GAIN)
    cut = KEY_DROPPED in metadata
    fits = all(isinstance(n, int) and 0 < n < 1 << 24 for n in true) and true[0] <= wide.hidden
    if not fits or (true[1] > wide.intermediate) != cut or gain not in FLOATS:
        raise BadInput("the keys of a widened file do not fit it", file=source.path, found=f"{true}, {gain!r}")
    source.check_shapes()
    if gain == "f32" and math.frexp(gain_factor(true[0], wide.hidden))[0] != 0.5:  # no power of two
        source.losses.append(GAINS_ROUNDED)
    if cut:
        return _restored(source, true[0], true[1], gain)
    narrowed = narrow(source, true[0], true[1], gain)
    narrowed.notes.append(
        f"the file is widened from {true[0]} to {wide.hidden} columns (experts from {true[1]} to {wide.intermediate}); "
        "it is read as the model it was made of"
    )
    return narrowed


def _restored(source: Source, hidden: int, intermediate: int, gain: str) -> Source:
    """A file whose experts were cut, in the original widths, with zeros where neurons were dropped."""
    wide = source.config
    dropped = source.metadata[KEY_DROPPED]
    kept = None
    if dropped.element_type is ValueType.UINT16:
        kept = kept_from(dropped.value, wide.layers, wide.experts, intermediate)
    if kept is None or kept[0].shape[1] != wide.intermediate:
        raise BadInput("the list of dropped neurons does not fit the file", file=source.path, tensor=KEY_DROPPED)
    restored = restore(narrow(source, hidden, wide.intermediate, gain), kept, intermediate)
    restored.losses.append(describe(intermediate, wide.intermediate))
    restored.kept = kept
    return restored


def _get(metadata: Mapping[str, Value], key: str, default: Any = None) -> Any:
    value = metadata.get(key)
    return default if value is None else value.value


def _vocabulary(tensors: Tensors) -> int:
    if "token_embd.weight" not in tensors:
        raise BadInput("the GGUF lacks a tensor", tensor="token_embd.weight", remedy="is this a vocabulary-only file?")
    return tensors["token_embd.weight"][1].shape[-1]


def config_from_gguf(metadata: Mapping[str, Value], where: object, vocab: int) -> ModelConfig:
    """The configuration from `gpt-oss.*` keys, by llama.cpp's names and defaults."""
    prefix = ARCHITECTURE + "."

    def integer(key: str, default: int | None = None) -> int:
        value = _get(metadata, prefix + key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # some writers give one number a layer
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise BadInput(
                "a metadata key is missing or out of range", file=where, tensor=prefix + key, found=repr(value)
            )
        return value

    def number(key: str, default: float) -> float:
        value = _get(metadata, prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise BadInput("a metadata key is out of range", file=where, tensor=prefix + key, found=repr(value))
        return float(str(np.float32(value)))  # the decimal that was meant: 1e-05, not 9.99999974e-06

    _refuse_strange(metadata, where)
    scaling = _get(metadata, prefix + "rope.scaling.type")
    if scaling != "yarn":
        raise BadInput("a rope scaling that gpt-oss does not have", file=where, found=repr(scaling), expected="yarn")
    layers, heads = integer("block_count"), integer("attention.head_count")
    if layers > 4096 or integer("expert_count") > 4096:
        raise BadInput("an absurd count of layers or experts", file=where, found=f"{layers}, {integer('expert_count')}")
    hidden, head_dim = integer("embedding_length"), integer("attention.key_length")
    ids = {kind: _get(metadata, f"tokenizer.ggml.{key}_token_id") for kind, key in _TOKEN_IDS.items()}
    config = ModelConfig(
        layers=layers,
        experts=integer("expert_count"),
        experts_per_token=integer("expert_used_count"),
        hidden=hidden,
        intermediate=integer("expert_feed_forward_length"),
        vocab=vocab,
        heads=heads,
        kv_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        sliding_window=integer("attention.sliding_window"),
        max_positions=integer("context_length"),
        original_positions=integer("rope.scaling.original_context_length"),
        rope_theta=number("rope.freq_base", 10000.0),
        rope_factor=number("rope.scaling.factor", 1.0),
        beta_fast=number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=number("rope.scaling.yarn_beta_slow", 1.0),
        truncate=bool(_get(metadata, OWN_TRUNCATE, False)),
        rms_eps=number("attention.layer_norm_rms_epsilon", 1e-5),
        sliding=_sliding(metadata, layers, where),
        token_ids={kind: value for kind, value in ids.items() if isinstance(value, int)},
    )
    check_consistent(config, where)
    return config


_KEYS = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
        "expert_used_count", "expert_feed_forward_length", "attention.head_count", "attention.head_count_kv",
        "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
        "attention.sliding_window_pattern", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip


def _refuse_strange(metadata: Mapping[str, Value], where: object) -> None:
    """A key of the architecture that is not understood may change what llama.cpp computes; it is not dropped in silence."""
    same_as = {
        "attention.value_length": _get(metadata, f"{ARCHITECTURE}.attention.key_length"),
        "rope.dimension_count": _get(metadata, f"{ARCHITECTURE}.attention.key_length"),
        "rope.freq_base_swa": _get(metadata, f"{ARCHITECTURE}.rope.freq_base"),
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
    }
    for key, value in metadata.items():
        own = key.removeprefix(ARCHITECTURE + ".")
        if own == key or (own in _KEYS and own not in same_as) or (own in same_as and value.value == same_as[own]):
            continue
        raise Refused(
            "a metadata key that changes what llama.cpp computes and that no other layout can say",
            file=where, tensor=key, found=repr(value.value)[:80],
        )  # fmt: skip


_TOKEN_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _sliding(metadata: Mapping[str, Value], layers: int, where: object) -> tuple[bool, ...]:
    """The window pattern as llama.cpp reads it: a period p (every p-th layer is full) or one flag a layer."""
    pattern = _get(metadata, ARCHITECTURE + ".attention.sliding_window_pattern")
    if pattern is None:
        return default_sliding(layers)
    if isinstance(pattern, list) and len(pattern) == layers:
        return tuple(bool(flag) for flag in pattern)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return tuple(n % pattern < pattern - 1 for n in range(layers))
    raise BadInput(
        "the sliding window pattern does not fit", file=where, found=repr(pattern)[:80], expected=f"{layers} flags"
    )


def _add(source: Source, name: str, tensors: Tensors) -> None:
    if is_gate_up(name):
        gate, up = gguf_gate_up(name)
        source.names[name] = tuple(there for there in (gate, up) if there in tensors)
        if len(source.names[name]) == 1:
            missing = up if gate in tensors else gate
            source.problems.append(Problem("a tensor is missing", missing))
        elif source.names[name]:
            views = [_stored(source, tensors[there]) for there in (gate, up)]
            source.views[name] = Alternating(views[0], views[1], columns=name.endswith("_bias"))
        return
    there = gguf_name(name)
    assert there is not None
    if there in tensors:
        source.names[name] = (there,)
        source.views[name] = _stored(source, tensors[there])
    elif match := re.search(r"attn_([qkv])\.(weight|bias)$", there):
        layer, _ = split_name(name)
        fused = f"blk.{layer}.attn_qkv.{match[2]}"
        if fused in tensors:
            config = source.config
            first = {"q": 0, "k": config.q_rows, "v": config.q_rows + config.kv_rows}[match[1]]
            count = config.q_rows if match[1] == "q" else config.kv_rows
            source.names[name] = (fused,)
            total = config.q_rows + 2 * config.kv_rows
            source.views[name] = RowRange(_stored(source, tensors[fused]), first, count, total, match[2] == "bias")


def _stored(source: Source, place: tuple[SourceFile, TensorInfo]) -> View:
    file, info = place
    codec = BY_GGML_ID.get(info.type)
    if codec is None:
        raise Refused(
            "a tensor's quantization cannot be read", file=file.path, tensor=info.name, found=info.type_name,
            expected=", ".join(sorted(c.name for c in BY_GGML_ID.values())),
            remedy=f"start from the checkpoint that {printable(source.path.name)} was made from",
        )  # fmt: skip
    if len(info.shape) > 3:
        raise BadInput("a tensor has too many dimensions", file=file.path, tensor=info.name, found=list(info.shape))
    return Stored(file, info.offset, codec.name, as_stack(tuple(reversed(info.shape))))

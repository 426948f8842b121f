"""The model's configuration, one form for every layout.

Letters used throughout: L layers, E experts, D hidden (residual) width, F expert (intermediate) width, V vocabulary rows,
H query heads, K key/value heads. Widths in values. Reading is by a whitelist with ranges; unknown keys are kept aside and
carried through to an HF target, never interpreted, and no key runs code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss_convert.errors import BadInput

SLIDING, FULL = "sliding_attention", "full_attention"
MXFP4_QUANTIZATION: dict[str, Any] = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass depends on. `sliding[n]`: whether layer n attends to a window only."""

    layers: int
    experts: int
    experts_per_token: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int
    max_positions: int
    original_positions: int
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None
    swiglu_limit: float = 7.0
    rms_eps: float = 1e-5
    sliding: tuple[bool, ...] = ()
    token_ids: Mapping[str, int] = field(default_factory=dict)  # bos, eos, pad where the source names them

    def __post_init__(self) -> None:
        if not self.sliding:
            object.__setattr__(self, "sliding", default_sliding(self.layers))

    @property
    def q_rows(self) -> int:
        """Rows of the query projection, H · head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key and of the value projection, K · head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """All parameters, biases, norms and sinks included."""
        d, f, e = self.hidden, self.intermediate, self.experts
        attention = self.q_rows * (d + 1) + 2 * self.kv_rows * (d + 1) + d * (self.q_rows + 1) + self.heads
        experts = e * (2 * f * (d + 1) + d * (f + 1))
        return 2 * self.vocab * d + d + self.layers * (attention + experts + e * (d + 1) + 2 * d)

    @property
    def release(self) -> str | None:
        """gpt-oss-20b or gpt-oss-120b when every width is that release's; says nothing about the weights."""
        for name, layers, experts in (("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)):
            if self == release_config(layers, experts, self):
                return name
        return None


def default_sliding(layers: int) -> tuple[bool, ...]:
    """Even layers slide, odd ones attend to everything."""
    return tuple(n % 2 == 0 for n in range(layers))


def release_config(layers: int, experts: int, like: ModelConfig | None = None) -> ModelConfig:
    """The released shape with these layers and experts; token ids, and metal's shorter vocabulary, taken from `like`."""
    vocab = like.vocab if like is not None and like.vocab == 200014 else 201088
    ids = like.token_ids if like is not None else {}
    return ModelConfig(
        layers, experts, 4, 2880, 2880, vocab, 64, 8, 64, 128, 131072, 4096, token_ids=ids,
        truncate=like.truncate if like is not None else False,
    )  # fmt: skip


class _Reader:
    """Typed, ranged access to one JSON object or metadata table."""

    def __init__(self, table: Mapping[str, Any], where: object) -> None:
        self.table, self.where = table, where

    def integer(self, *names: str, low: int = 1, high: int = 1 << 24, default: int | None = None) -> int:
        name, value = self._first(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, value, f"an integer from {low} to {high}")
        return int(value)

    def number(self, *names: str, low: float, high: float, default: float | None = None) -> float:
        name, value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self._refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.table.get(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return bool(value)

    def _first(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.table.get(name) is not None:
                return name, self.table[name]
        if default is None:
            raise BadInput("the configuration lacks a key", file=self.where, expected=" or ".join(names))
        return names[0], default

    def _refuse(self, name: str, value: object, expected: str) -> None:
        shown = repr(value) if not isinstance(value, float) or math.isfinite(value) else "not a finite number"
        raise BadInput(f"the configuration's {name} is out of range", file=self.where, found=shown, expected=expected)


def from_hf(table: Mapping[str, Any], where: object) -> ModelConfig:
    """From an HF config.json; `rope_scaling` + `rope_theta` and `rope_parameters` are both read, `dtype` may be absent."""
    if table.get("auto_map"):
        raise BadInput(
            "the configuration names code to run (auto_map)",
            file=where,
            remedy="gpt-oss needs none; remove the key if you trust the rest",
        )
    model_type = table.get("model_type", "gpt_oss")
    if model_type != "gpt_oss":
        raise BadInput("not a gpt-oss model", file=where, found=repr(model_type), expected="gpt_oss")
    read = _Reader(table, where)
    layers = read.integer("num_hidden_layers", high=4096)
    rope = _hf_rope(table, where)
    original = _Reader(rope, where).integer(
        "original_max_position_embeddings", default=read.integer("initial_context_length", default=4096)
    )
    heads, hidden = read.integer("num_attention_heads"), read.integer("hidden_size")
    config = ModelConfig(
        layers=layers,
        experts=read.integer("num_local_experts", "num_experts", high=4096),
        experts_per_token=read.integer("num_experts_per_tok", "experts_per_token", high=4096),
        hidden=hidden,
        intermediate=read.integer("intermediate_size"),
        vocab=read.integer("vocab_size"),
        heads=heads,
        kv_heads=read.integer("num_key_value_heads", default=heads),
        head_dim=read.integer("head_dim", default=hidden // heads or 1),
        sliding_window=read.integer("sliding_window", default=128),
        max_positions=read.integer("max_position_embeddings", high=1 << 30, default=131072),
        original_positions=original,
        swiglu_limit=read.number("swiglu_limit", low=0, high=1e6, default=7.0),
        rms_eps=read.number("rms_norm_eps", low=0, high=1, default=1e-5),
        sliding=_hf_layer_types(table, layers, where),
        token_ids=_token_ids(table),
        **_yarn(rope, table, where),
    )
    if table.get("attention_bias", True) is not True or table.get("swiglu_alpha", 1.702) != 1.702:
        raise BadInput(
            "gpt-oss has biases in attention and a SwiGLU with alpha 1.702",
            file=where,
            found=f"attention_bias {table.get('attention_bias')!r}, swiglu_alpha {table.get('swiglu_alpha', 1.702)!r}",
        )
    check_consistent(config, where)
    return config


_ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "original_max_position_embeddings",
    }
)  # fmt: skip


def _hf_rope(table: Mapping[str, Any], where: object) -> dict[str, Any]:
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadInput("the configuration's rope parameters are not an object", file=where, found=type(rope).__name__)
    kind = rope.get("rope_type", rope.get("type", "yarn"))
    if kind != "yarn":
        raise BadInput("a rope type that gpt-oss does not have", file=where, found=repr(kind), expected="yarn")
    strange = {k: v for k, v in rope.items() if k not in _ROPE_KEYS and v is not None}
    if strange.pop("partial_rotary_factor", 1.0) != 1.0 or strange:
        raise BadInput(
            "rope keys that change what the model computes and that gpt-oss does not have",
            file=where,
            found=", ".join(sorted(strange)) or "partial_rotary_factor",
            expected=", ".join(sorted(_ROPE_KEYS)),
        )
    # Without any rope table transformers takes the release's, whose truncate is false; within one its default is true.
    return rope or {"truncate": False, "original_max_position_embeddings": 4096}


def _yarn(rope: Mapping[str, Any], table: Mapping[str, Any], where: object) -> dict[str, Any]:
    read = _Reader(rope, where)
    return {
        "rope_theta": _Reader({**table, **rope}, where).number("rope_theta", low=1, high=1e12, default=150000.0),
        "rope_factor": read.number("factor", low=1, high=1e6, default=32.0),
        "beta_fast": read.number("beta_fast", low=1e-6, high=1e6, default=32.0),
        "beta_slow": read.number("beta_slow", low=1e-6, high=1e6, default=1.0),
        "truncate": read.flag("truncate", True),
        "attention_factor": read.number("attention_factor", low=0, high=1e6)
        if rope.get("attention_factor") is not None
        else None,
    }


def _hf_layer_types(table: Mapping[str, Any], layers: int, where: object) -> tuple[bool, ...]:
    types = table.get("layer_types")
    if types is None:
        return default_sliding(layers)
    if not isinstance(types, list) or len(types) != layers or any(t not in (SLIDING, FULL) for t in types):
        raise BadInput(
            "the configuration's layer_types do not fit",
            file=where,
            found=f"{len(types) if isinstance(types, list) else types!r} entries",
            expected=f"{layers} entries, each {SLIDING} or {FULL}",
        )
    return tuple(t == SLIDING for t in types)


def _token_ids(table: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}
    found = {kind: table.get(key) for kind, key in names.items()}
    return {kind: v for kind, v in found.items() if isinstance(v, int) and not isinstance(v, bool) and v >= 0}


def check_consistent(config: ModelConfig, where: object) -> None:
    """Refuse numbers that are each in range and do not fit together."""
    problems = {
        "experts_per_token exceeds the experts": config.experts_per_token > config.experts,
        "heads are no multiple of kv heads": config.heads % config.kv_heads != 0,
        "head_dim is odd": config.head_dim % 2 != 0,
    }
    for problem, found in problems.items():
        if found:
            raise BadInput("the configuration does not fit together", file=where, found=problem)


def from_original(table: Mapping[str, Any], where: object) -> ModelConfig:
    """From `original/config.json`: the reference code's ModelConfig fields."""
    read = _Reader(table, where)
    layers = read.integer("num_hidden_layers", high=4096)
    original = read.integer("initial_context_length", default=4096)
    factor = read.number("rope_scaling_factor", low=1, high=1e6, default=32.0)
    config = ModelConfig(
        layers=layers,
        experts=read.integer("num_experts", high=4096),
        experts_per_token=read.integer("experts_per_token", high=4096),
        hidden=read.integer("hidden_size"),
        intermediate=read.integer("intermediate_size"),
        vocab=read.integer("vocab_size"),
        heads=read.integer("num_attention_heads"),
        kv_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim"),
        sliding_window=read.integer("sliding_window"),
        max_positions=int(original * factor),
        original_positions=original,
        rope_theta=read.number("rope_theta", low=1, high=1e12),
        rope_factor=factor,
        beta_fast=read.number("rope_ntk_beta", low=1e-6, high=1e6, default=32.0),
        beta_slow=read.number("rope_ntk_alpha", low=1e-6, high=1e6, default=1.0),
        swiglu_limit=read.number("swiglu_limit", low=0, high=1e6, default=7.0),
    )
    check_consistent(config, where)
    return config


def to_original(config: ModelConfig) -> dict[str, Any]:
    """The `original/config.json` table, keys in the release's order."""
    return {
        "num_hidden_layers": config.layers,
        "num_experts": config.experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.original_positions,
        "rope_theta": _whole(config.rope_theta),
        "rope_scaling_factor": config.rope_factor,
        "rope_ntk_alpha": _whole(config.beta_slow),
        "rope_ntk_beta": _whole(config.beta_fast),
    }


def to_hf(config: ModelConfig, *, mxfp4: bool) -> dict[str, Any]:
    """The HF config.json table as the release spells it; `mxfp4` tells whether the experts are packed."""
    table: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": config.token_ids.get("eos", 200002 if config.vocab > 200002 else None),
        "experts_per_token": config.experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initial_context_length": config.original_positions,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "layer_types": [SLIDING if slides else FULL for slides in config.sliding],
        "max_position_embeddings": config.max_positions,
        "model_type": "gpt_oss",
        "num_attention_heads": config.heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_local_experts": config.experts,
        "output_router_logits": False,
        "pad_token_id": config.token_ids.get("pad", 199999 if config.vocab > 199999 else None),
        "rms_norm_eps": config.rms_eps,
        "rope_scaling": {
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.original_positions,
            "rope_type": "yarn",
            "truncate": config.truncate,
        },
        "rope_theta": _whole(config.rope_theta),
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": config.vocab,
    }
    if config.attention_factor is not None:
        table["rope_scaling"]["attention_factor"] = config.attention_factor
    if mxfp4:
        table["quantization_config"] = MXFP4_QUANTIZATION
    return table


def _whole(value: float) -> float | int:
    """An integer where the release writes one."""
    return int(value) if value.is_integer() else value

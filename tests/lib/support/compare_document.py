"""Documents as `compare` makes them, of any size, from numbers that look like a two-bit quantization's."""

from __future__ import annotations

import math
import random
from typing import Any

LAYER_TENSORS = (
    ("input_layernorm.weight", "norm", (2880,)),
    ("self_attn.q_proj.weight", "attention", (4096, 2880)),
    ("self_attn.q_proj.bias", "bias", (4096,)),
    ("self_attn.k_proj.weight", "attention", (512, 2880)),
    ("self_attn.k_proj.bias", "bias", (512,)),
    ("self_attn.v_proj.weight", "attention", (512, 2880)),
    ("self_attn.v_proj.bias", "bias", (512,)),
    ("self_attn.o_proj.weight", "attention", (2880, 4096)),
    ("self_attn.o_proj.bias", "bias", (2880,)),
    ("self_attn.sinks", "sinks", (64,)),
    ("post_attention_layernorm.weight", "norm", (2880,)),
    ("mlp.router.weight", "router", (0, 2880)),
    ("mlp.router.bias", "bias", (0,)),
    ("mlp.experts.gate_up_proj", "gate_up", (0, 5760, 2880)),
    ("mlp.experts.gate_up_proj_bias", "bias", (0, 5760)),
    ("mlp.experts.down_proj", "down", (0, 2880, 2880)),
    ("mlp.experts.down_proj_bias", "bias", (0, 2880)),
)
"""Name, part and shape of a layer's tensors; 0 stands for the number of experts."""
BITS = {
    "gate_up": (4.25, 2.625),
    "down": (4.25, 3.4375),
    "attention": (16, 8.5),
    "embedding": (16, 8.5),
    "head": (16, 8.5),
}


def large() -> dict[str, Any]:
    """A document of the 120b's size."""
    return document(36, 128)


def broken() -> dict[str, Any]:
    """A document of an artifact with NaN and infinite weights: whatever these touch is no number."""
    made = document()
    bad, worse = made["tensors"][14], made["tensors"][4]
    bad |= {"relative_rms": math.nan, "equal": False, "worst": None}
    bad["not_finite"] = {"source": 0, "artifact": 3, "expert": 5, "row": 1234, "column": 17}
    worse |= {"relative_rms": math.nan, "equal": True, "worst": None}
    worse["not_finite"] = {"source": 1, "artifact": 1, "expert": 0, "row": 300, "column": 0}
    made["experts"]["output_error"][0][5] = math.nan
    made["experts"]["output_error"][2][3] = math.inf
    made["layers"][0] |= {"output_error": math.nan, "hidden_error": math.nan}
    made["text"] |= {
        "kld": dict.fromkeys(("mean", "se", "median", "p99", "max"), math.nan),
        "top1": {"agreement": math.nan, "se": math.nan},
    }
    made["text"]["perplexity"] |= {
        "artifact": {"value": math.inf, "se": math.nan}, "ratio": {"value": math.nan, "se": math.nan},
    }  # fmt: skip
    made["gates"] = [{"metric": "tensor_rms", "limit": 0.5, "found": math.nan, "passed": False}]
    return made


def document(layers: int = 3, experts: int = 8, seed: int = 7) -> dict[str, Any]:
    """Everything there is in a document; layer 0's expert 1 saw no token, its expert 2 few."""
    rng = random.Random(seed)
    tensors = _tensors(rng, layers, experts)
    parts = {
        part: {
            side: sum(_bytes(t, i) for t in tensors if t["part"] == part)
            for i, side in enumerate(("source", "artifact"))
        }
        | {"bits_per_weight": float(BITS.get(part, (16, 32))[1])}
        for part in dict.fromkeys(t["part"] for t in tensors)
    }
    seen = _experts(rng, layers, experts)
    totals = [sum(row[side] for row in parts.values()) for side in ("source", "artifact")]
    return {
        "schema": "gptoss-convert/compare/1",
        "source": {
            "name": "gpt-oss-120b", "layout": "hf", "bytes": totals[0],
            "files": _files("model-{:05}-of-00003.safetensors", 3, totals[0], "5a"),
        },
        "artifact": {
            "name": "gpt-oss-120b-q2_k.gguf", "layout": "gguf", "bytes": totals[1],
            "files": _files("gpt-oss-120b-q2_k.gguf", 1, totals[1], "c3"), "notes": [],
            "widened": [3072, 3072], "method": "encoders of gptoss-convert, importance from calibration text",
            "losses": ["experts rounded to q2_k and q3_k", "attention, embedding and head rounded to q8_0"],
        },
        "model": {
            "layers": layers, "experts": experts, "experts_per_token": 4, "hidden": 2880, "intermediate": 2880,
            "vocab": 201088, "release": "openai/gpt-oss-120b",
        },
        "tensors": tensors,
        "experts": seen,
        "layers": [
            {"layer": i, "output_error": 0.14 + 0.03 * rng.random(), "hidden_error": 0.021 + 0.13 * ((i + 1) / layers) ** 0.7}
            for i in range(layers)
        ],
        "text": {
            "name": "wiki.test.txt", "digest": "sha256:" + "e7" * 32, "tokens": 16384, "scored": 12032, "context": 2048,
            "kld": {"mean": 0.08213, "se": 0.00141, "median": 0.0127, "p99": 0.911, "max": 6.27},
            "top1": {"agreement": 0.9137, "se": 0.0026},
            "perplexity": {
                "source": {"value": 21.417, "se": 0.31}, "artifact": {"value": 22.108, "se": 0.33},
                "ratio": {"value": 1.0323, "se": 0.0042},
            },
        },
        "sizes": {"parts": parts},
        "coverage": _coverage(seen["tokens"]),
        "gates": [
            {"metric": "kld.mean", "limit": 0.1, "found": 0.08213, "passed": True},
            {"metric": "top1.agreement", "limit": 0.9, "found": 0.9137, "passed": True},
        ],
        "versions": {"gptoss_convert": "0.1.0", "torch": "2.6.0"},
        "device": "cpu",
    }  # fmt: skip


def _files(name: str, count: int, total: int, digit: str) -> list[dict[str, Any]]:
    return [{"name": name.format(i), "bytes": total // count, "sha256": digit * 32} for i in range(1, count + 1)]


def _coverage(tokens: list[list[int]], needed: int = 64) -> dict[str, Any]:
    load = [[count / max(1, sum(row)) for count in row] for row in tokens]
    return {"needed": needed, "short": sum(count < needed for row in tokens for count in row), "router_load": load}


def _bytes(tensor: dict[str, Any], side: int) -> int:
    weights = 1
    for n in tensor["shape"]:
        weights *= n
    return int(weights * BITS.get(tensor["part"], (16, 32))[side] / 8)


def _tensors(rng: random.Random, layers: int, experts: int) -> list[dict[str, Any]]:
    names: list[tuple[str, int | None, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", None, "embedding", (201088, 2880))
    ]
    for i in range(layers):
        for suffix, part, shape in LAYER_TENSORS:
            names.append((f"model.layers.{i}.{suffix}", i, part, tuple(n or experts for n in shape)))
    names += [("model.norm.weight", None, "norm", (2880,)), ("lm_head.weight", None, "head", (201088, 2880))]
    return [_tensor(rng, *row) for row in names]


def _tensor(rng: random.Random, name: str, layer: int | None, part: str, shape: tuple[int, ...]) -> dict[str, Any]:
    error = {"gate_up": 0.21, "down": 0.12}.get(part, 0.0045 if part in BITS else 0.0) * (0.9 + 0.2 * rng.random())
    stack = part in ("gate_up", "down")
    made = {
        "name": name, "layer": layer, "part": part, "shape": list(shape),
        "source_encoding": "mxfp4" if stack else "bf16",
        "artifact_encoding": "q2_k, q3_k" if stack else "q8_0" if part in BITS else "f32",
        "bytes": 0, "relative_rms": error, "equal": error == 0, "not_finite": None,
        "worst": None if error == 0 else {
            "relative_rms": 2.2 * error, "expert": rng.randrange(shape[0]) if stack else 0, "row": rng.randrange(2880),
            "column": 256 * rng.randrange(11), "columns": 256,
        },
    }  # fmt: skip
    return made | {"bytes": _bytes(made, 1)}


def _experts(rng: random.Random, layers: int, experts: int) -> dict[str, Any]:
    tokens = [[int(rng.lognormvariate(6, 0.9)) for _ in range(experts)] for _ in range(layers)]
    tokens[0][1], tokens[0][2] = 0, 17
    drift = [0.12 + 0.05 * i / layers for i in range(layers)]
    errors = [
        [drift[i] * rng.lognormvariate(0, 0.16) if count else None for count in row] for i, row in enumerate(tokens)
    ]
    return {"tokens": tokens, "output_error": errors}

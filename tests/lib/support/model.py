"""The master copy of a gpt-oss model, from which every layout is written and against which every result is judged.

    Spec ──► Model.tensors (names, order and bits of the original/ layout) ──► write_* (see checkpoints.py)
                        └────► Model.transformers() ──► Model.logits()

Nothing here imports the product. Letters of shapes: E experts, H hidden, I intermediate, G groups of 32 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

SPECIAL_TOKENS = 21
"""Special tokens that have a name in tokenizer.json; they follow the text tokens."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Value of each MXFP4 code."""

E2M1_PAIRS = np.array([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], np.float32)
"""The two values of each packed byte: low nibble first."""

E8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.nan], np.float32)
"""Value of each scale byte; the first is subnormal, and every product with a code is exact."""

AWKWARD = ("negative_zero", "zero_scale", "zero_block", "all_codes", "small_codes", "wide_scales", "tiny_scales")
"""Kinds of rare but legal MXFP4 groups that `Model(awkward=...)` plants; every forward stays finite."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Spec:
    """Everything that a configuration file says. By default all widths differ and most numbers are not the release's.

    The clamp and the YaRN betas are the release's own because no GGUF can carry others: llama.cpp has them built in for
    this architecture. It also rounds the betas' dimensions, so only `truncate=True` agrees with it to the last digits.
    """

    layers: int = 3
    experts: int = 6
    experts_per_token: int = 2
    hidden: int = 160
    intermediate: int = 96
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 400
    spare_rows: int = 11
    sliding_window: int = 8
    max_position: int = 8192
    initial_context: int = 512
    rope_theta: float = 40000
    rope_factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    swiglu_limit: float = 7.0
    rms_eps: float = 1e-5
    seed: int = 0

    @property
    def text_tokens(self) -> int:
        """Ordinary tokens; the special ones take the ids from here on, and the last `spare_rows` rows have no token."""
        return self.vocab - SPECIAL_TOKENS - self.spare_rows

    @property
    def layer_types(self) -> list[str]:
        return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(self.layers)]

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def token_id(self, official: int) -> int:
        """The id, in this vocabulary, of the special token that has the id `official` in the release."""
        return official - 199998 + self.text_tokens


SMALL = Spec()
SQUARE = replace(SMALL, hidden=128, intermediate=128)
STEADY = replace(SMALL, truncate=True, experts_per_token=6)
"""For comparing inexact paths with llama.cpp: no dimension is rounded differently, and every expert is always taken, so
that a small error stays small. With a choice of experts it now and then flips one, and the difference jumps."""
WIDE = replace(SMALL, layers=2, hidden=512, intermediate=256)
RELEASE_20B = Spec(
    layers=24, experts=32, experts_per_token=4, hidden=2880, intermediate=2880, heads=64, kv_heads=8, vocab=201088,
    spare_rows=1069, sliding_window=128, max_position=131072, initial_context=4096, rope_theta=150000, rope_factor=32.0,
)  # fmt: skip
RELEASE_120B = replace(RELEASE_20B, layers=36, experts=128)
TRUE_LAYER = replace(RELEASE_20B, layers=1, vocab=400, spare_rows=11)


def original_shapes(spec: Spec) -> Shapes:
    """Logical dtype and shape of every tensor of the original/ layout, names in string order as in the release."""
    h, i, e = spec.hidden, spec.intermediate, spec.experts
    qkv = spec.query_width + 2 * spec.kv_width
    shapes: Shapes = {
        "embedding.weight": ("BF16", (spec.vocab, h)),
        "norm.scale": ("BF16", (h,)),
        "unembedding.weight": ("BF16", (spec.vocab, h)),
    }
    for layer in range(spec.layers):
        of_layer: Shapes = {
            "attn.norm.scale": ("BF16", (h,)),
            "attn.qkv.weight": ("BF16", (qkv, h)),
            "attn.qkv.bias": ("BF16", (qkv,)),
            "attn.sinks": ("BF16", (spec.heads,)),
            "attn.out.weight": ("BF16", (h, spec.query_width)),
            "attn.out.bias": ("BF16", (h,)),
            "mlp.norm.scale": ("BF16", (h,)),
            "mlp.gate.weight": ("BF16", (e, h)),
            "mlp.gate.bias": ("BF16", (e,)),
            "mlp.mlp1_weight.blocks": ("FP4", (e, 2 * i, h // 32, 16)),
            "mlp.mlp1_weight.scales": ("UE8", (e, 2 * i, h // 32)),
            "mlp.mlp1_bias": ("BF16", (e, 2 * i)),
            "mlp.mlp2_weight.blocks": ("FP4", (e, h, i // 32, 16)),
            "mlp.mlp2_weight.scales": ("UE8", (e, h, i // 32)),
            "mlp.mlp2_bias": ("BF16", (e, h)),
        }
        shapes |= {f"block.{layer}.{name}": value for name, value in of_layer.items()}
    return dict(sorted(shapes.items()))


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 [..., out, G, 16] and [..., out, G] as float32 [..., out, G * 32]; scale byte 255 is NaN."""
    values = np.take(E2M1_PAIRS.view(np.uint64)[:, 0], blocks.numpy()).view(np.float32)
    with np.errstate(over="ignore"):  # codes above 1.5 at scale byte 254
        values *= E8M0[scales.numpy()][..., None]
    return torch.from_numpy(values.reshape(*blocks.shape[:-2], -1))


class Model:
    """A random model whose statistics resemble the release's. `tensors` is the truth, keyed by original/ names.

    awkward: kinds of AWKWARD to plant in the experts. parity_free: gate and up rows (and their biases) are drawn alike,
    so that nothing in the numbers tells which is which.
    """

    def __init__(self, spec: Spec = SMALL, awkward: Sequence[str] = (), parity_free: bool = False) -> None:
        self.spec = spec
        self._rng = np.random.Generator(np.random.SFC64(spec.seed))
        self.tensors: dict[str, torch.Tensor] = {}
        for name, (dtype, shape) in original_shapes(spec).items():
            if dtype == "BF16":
                self.tensors[name] = self._dense(name, shape, parity_free)
            elif dtype == "FP4":
                self.tensors[name] = self._blocks(shape)
            else:
                self.tensors[name] = self._scales(shape, parity_free or "mlp2" in name)
                if awkward:
                    self._plant(self.tensors[name.replace("scales", "blocks")], self.tensors[name], awkward)

    def _dense(self, name: str, shape: tuple[int, ...], parity_free: bool) -> torch.Tensor:
        kind = name.split(".", 2)[-1] if name.startswith("block.") else name
        mean, deviation = {
            "embedding.weight": (0.0, 0.7),
            "unembedding.weight": (0.0, 2.2 / math.sqrt(self.spec.hidden)),
            "norm.scale": (1.1, 0.2),
            "attn.norm.scale": (0.9, 0.15),
            "mlp.norm.scale": (1.2, 0.15),
            "attn.sinks": (0.6, 1.0),
            "attn.qkv.weight": (0.0, 1.1 / math.sqrt(self.spec.hidden)),
            "attn.qkv.bias": (0.02, 0.4),
            "attn.out.weight": (0.0, 1.3 / math.sqrt(self.spec.query_width)),
            "attn.out.bias": (0.03, 0.15),
            "mlp.gate.weight": (0.0, 1.0 / math.sqrt(self.spec.hidden)),
            "mlp.gate.bias": (0.1, 0.4),
            "mlp.mlp1_bias": (-0.65, 0.3),
            "mlp.mlp2_bias": (-0.04, 0.2),
        }[kind]
        values = self._rng.standard_normal(shape, np.float32) * np.float32(deviation) + np.float32(mean)
        if kind == "mlp.mlp1_bias" and not parity_free:
            values[:, 0::2] += 0.2
            values[:, 1::2] -= 0.2
        return torch.from_numpy(values).to(torch.bfloat16)

    def _blocks(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Packed codes, drawn two at a time through a table of all pairs; small magnitudes are the likelier ones."""
        magnitudes = np.repeat(np.arange(8, dtype=np.uint8), (16, 24, 23, 20, 17, 14, 9, 5))  # 128 chances
        code = np.concatenate((magnitudes, magnitudes | 8))
        pairs = (code[:, None] << 4 | code[None, :]).astype(np.uint8).reshape(-1)
        blocks = np.empty(shape, np.uint8)
        for expert in blocks:
            expert[...] = pairs[self._rng.integers(0, 65536, expert.shape, np.uint16)]
        return torch.from_numpy(blocks)

    def _scales(self, shape: tuple[int, ...], alike: bool) -> torch.Tensor:
        """Scale bytes around unit gain; odd (up) rows are larger by some ten percent unless `alike`."""
        inputs = 32 * shape[-1]
        centre = 127 - math.log2(2.1 * math.sqrt(inputs)) + 0.2
        low = math.floor(centre)
        share = centre - low
        scales = np.empty(shape, np.uint8)
        for expert in scales:
            draw = self._rng.random(expert.shape, np.float32)
            expert[...] = low + (draw < share)
            expert[draw > 0.97] -= 2
            if not alike:
                expert[1::2] += self._rng.random(expert[1::2].shape, np.float32) < 0.09
        return torch.from_numpy(scales)

    def _plant(self, blocks: torch.Tensor, scales: torch.Tensor, kinds: Sequence[str]) -> None:
        groups, exponents = blocks.numpy().reshape(-1, 16), scales.numpy().reshape(-1)
        count = max(4, len(exponents) // 200)
        chosen = self._rng.choice(len(exponents), (len(AWKWARD), count), replace=False)
        for kind in kinds:
            at = chosen[AWKWARD.index(kind)]
            if kind == "negative_zero":
                groups[at] = 0x88
                groups[at[1::2]] = np.resize((0x80, 0x08, 0x18, 0x83), 16)
            elif kind == "zero_scale":
                exponents[at] = 0
            elif kind == "zero_block":
                groups[at] = 0
                exponents[at[1::2]] = 0
            elif kind == "all_codes":
                groups[at] = np.resize(np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4, 16)
            elif kind == "small_codes":
                groups[at] &= np.resize((0x99, 0xBB, 0xAA), count).astype(np.uint8)[:, None]
            elif kind == "wide_scales":
                exponents[at] = self._rng.integers(90, exponents.max() + 1, count)
            elif kind == "tiny_scales":
                exponents[at] = self._rng.integers(1, 20, count)

    def gate_up(self, layer: int) -> torch.Tensor:
        """Float32 [E, 2I, H]: even rows are the gate's, odd rows the up projection's."""
        prefix = f"block.{layer}.mlp.mlp1_weight."
        return dequantize(self.tensors[prefix + "blocks"], self.tensors[prefix + "scales"])

    def down(self, layer: int) -> torch.Tensor:
        """Float32 [E, H, I]."""
        prefix = f"block.{layer}.mlp.mlp2_weight."
        return dequantize(self.tensors[prefix + "blocks"], self.tensors[prefix + "scales"])

    def transformers(self, dtype: torch.dtype = torch.float32) -> Any:
        """A transformers GptOssForCausalLM that holds exactly these weights."""
        from support.finetunes import bf16_tensors, config_bf16
        from transformers import GptOssConfig, GptOssForCausalLM

        keys = config_bf16(self.spec, rope="parameters", with_dtype=False)
        config = GptOssConfig(**{k: v for k, v in keys.items() if k not in {"architectures", "model_type"}})
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = GptOssForCausalLM(config)
        model = model.to_empty(device="cpu")
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        state = {name: tensor().to(dtype) for name, tensor in bf16_tensors(self).items()}
        model.load_state_dict(state, strict=True, assign=True)
        model.train(False)
        return model

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 [T, V]: what the model computes in float32 after each prefix of `ids`."""
        if not hasattr(self, "_transformers"):
            self._transformers = self.transformers()
        result: torch.Tensor = self._transformers(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return result.float()

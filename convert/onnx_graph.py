"""gpt-oss as a graph of ONNX Runtime's operators: what `model.onnx` says, for a configuration and a variant.

    input_ids ─ Gather ─┬─ norm ─ q,k,v ─ GroupQueryAttention ─ o ─┬─ norm ─┬─ router ─┐
                        │            (rotary, sinks, window)       │        └── QMoE ◄─┘──┐
                        └──────────── residual ────────────────────┴───── residual ────────┴─ … ─ norm ─ head ─ logits

A matrix of floats is multiplied by FusedMatMul with its rows as they are stored (transB), one of blocks by MatMulNBits. Sinks are
GroupQueryAttention's input 11 and need no attribute. MXFP4 experts are QMoE's `fp4` form with weights_prepacked=1, which on
ONNX Runtime 1.32 and later means the release's own bytes; global scales are ones. Nodes are named as onnxruntime-genai's builder
names them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from gptoss_convert import __version__
from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.onnx_layout import BITS, COSINES, GROUP, METADATA, SINES, Variant
from gptoss_convert.formats.onnx import FLOAT, INT32, INT64, MICROSOFT, Attribute, Model, Node, Port, Tensor

PRODUCER = "gptoss-convert"
ALPHA = 1.702  # of the SwiGLU
PAST_KEY, PAST_VALUE = "past_key_values.%d.key", "past_key_values.%d.value"
PRESENT_KEY, PRESENT_VALUE = "present.%d.key", "present.%d.value"
_LENGTHS, _TOTAL = "/model/attn_mask_reformat/lengths", "/model/attn_mask_reformat/total"
ACCURACY = 4  # activations rounded to int8 where weights are integers: the builder's choice for processors
EXPERT_ONES = "model.moe.experts.global_scales"


def build(config: ModelConfig, variant: Variant, tensors: Sequence[Tensor], version: str = __version__) -> Model:
    """The whole graph. tensors: those of the data file, with their offsets; version: of the tool that wrote it."""
    graph = _Graph(config, variant)
    stream, delta = graph.embedding(), ""
    for layer in range(config.layers):
        stream, delta = graph.layer(layer, stream, delta)
    normed, _ = graph.norm(f"layers.{config.layers}/final_norm_layernorm", stream, delta, keep=False)
    graph.matmul("lm_head", "lm_head", normed, (config.vocab, config.hidden), variant.head, bias=False, output="logits")
    return Model(
        graph.nodes, [*tensors, *graph.constants.values()], _inputs(config, variant), _outputs(config, variant),
        PRODUCER, version, {METADATA: variant.as_json()},
    )  # fmt: skip


class _Graph:
    """Nodes in the order of computation; each method returns the names of its results."""

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        self.config, self.variant = config, variant
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self._lengths()

    def add(
        self, op: str, name: str, inputs: Sequence[str], *outputs: str,
        domain: str = "", **attributes: Attribute,
    ) -> str:  # fmt: skip
        """Append a node; returns its first output."""
        outputs = outputs or (f"{name}/output_0",)
        self.nodes.append(Node(op, name, inputs, outputs, attributes, domain))
        return outputs[0]

    def ints(self, *numbers: int, scalar: bool = False) -> str:
        """A constant of int64."""
        name = "/model/constants/INT64/" + (str(numbers[0]) if scalar else str(list(numbers)))
        shape = () if scalar else (len(numbers),)
        self.constants[name] = Tensor(name, INT64, shape, raw=struct.pack(f"<{len(numbers)}q", *numbers))
        return name

    def _lengths(self) -> None:
        """seqlens_k: tokens of each sequence but one; total_sequence_length: the mask's width."""
        root, one = "/model/attn_mask_reformat/attn_mask_subgraph", self.ints(1)
        counted = self.add("ReduceSum", f"{root}/ReduceSum", ["attention_mask", one], keepdims=0)
        less = self.add("Sub", f"{root}/Sub", [counted, one])
        self.add("Cast", f"{root}/Sub/Cast", [less], _LENGTHS, to=INT32)
        shape = self.add("Shape", f"{root}/Shape", ["attention_mask"])
        width = self.add("Gather", f"{root}/Gather", [shape, self.ints(1, scalar=True)], axis=0)
        self.add("Cast", f"{root}/Gather/Cast", [width], _TOTAL, to=INT32)

    def embedding(self) -> str:
        """Rows of the embedding [B, S, D]."""
        name, kind = "/model/embed_tokens/Gather", self.variant.embedding
        if kind == "f32":
            return self.add("Gather", name, ["model.embed_tokens.weight", "input_ids"])
        weight = "model.embed_tokens.weight"
        return self.add(
            "GatherBlockQuantized", name, [f"{weight}_Q{BITS[kind]}", "input_ids", f"{weight}_scales"],
            domain=MICROSOFT, gather_axis=0, quantize_axis=1, block_size=GROUP, bits=BITS[kind],
        )  # fmt: skip

    def norm(self, name: str, stream: str, delta: str, *, keep: bool = True) -> tuple[str, str]:
        """RMS norm of stream + delta: (normed, the sum); keep: whether the sum goes on."""
        path, weight = f"/model/{name}", f"model.{name.replace('/', '.')}.weight"
        epsilon = self.config.rms_eps
        if not delta:
            made = f"{path}/output_0"
            self.add(
                "SimplifiedLayerNormalization", f"{path}/LayerNorm", [stream, weight], made,
                epsilon=epsilon, axis=-1, stash_type=1,
            )  # fmt: skip
            return made, stream
        outputs = [f"{path}/output_0", *(["", "", f"{path}/output_3"] if keep else [])]
        inputs = [stream, delta, weight]
        self.add(
            "SkipSimplifiedLayerNormalization",
            f"{path}/SkipLayerNorm",
            inputs,
            *outputs,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return outputs[0], outputs[-1]

    def matmul(
        self, path: str, stem: str, x: str, shape: tuple[int, int], kind: str, *, bias: bool = True, output: str = "",
    ) -> str:  # fmt: skip
        """x · Wᵀ [+ b], W of shape [N, K]."""
        name, weight = f"/{path}/MatMul", f"{stem}.MatMul.weight"
        made = output or f"{name}/output_0"
        if kind == "f32":
            self.add("FusedMatMul", name, [x, weight], made, domain=MICROSOFT, alpha=1.0, transA=0, transB=1)
        else:
            self.add(
                "MatMulNBits", f"{name}_Q{BITS[kind]}", [x, f"{weight}_Q{BITS[kind]}", f"{weight}_scales"], made,
                domain=MICROSOFT, K=shape[1], N=shape[0], bits=BITS[kind], block_size=GROUP, accuracy_level=ACCURACY,
            )  # fmt: skip
        return self.add("Add", f"/{path}/Add", [made, f"{stem}.Add.bias"]) if bias else made

    def layer(self, layer: int, stream: str, delta: str) -> tuple[str, str]:
        """One block; returns the residual stream and what is still to be added to it."""
        path, stem = f"/model/layers.{layer}", f"model.layers.{layer}"
        normed, stream = self.norm(f"layers.{layer}/input_layernorm", stream, delta)
        attended = self._attention(layer, normed)
        normed, stream = self.norm(f"layers.{layer}/post_attention_layernorm", stream, attended)
        shape = (self.config.experts, self.config.hidden)
        routed = self.matmul(path[1:] + "/moe/router", stem + ".moe.router", normed, shape, self.variant.router)
        flat = self.add("Reshape", f"{path}/moe/router/Reshape", [routed, self.ints(-1, self.config.experts)])
        return stream, self._experts(layer, normed, flat)

    def _attention(self, layer: int, x: str) -> str:
        c, path, stem = self.config, f"/model/layers.{layer}/attn", f"model.layers.{layer}.attn"
        total, kind = c.q_rows + 2 * c.kv_rows, self.variant.attention
        packed = self.matmul(path[1:] + "/qkv_proj", stem + ".qkv_proj", x, (total, c.hidden), kind)
        slides = c.sliding[layer]
        made = self.add(
            "GroupQueryAttention", f"{path}/GroupQueryAttention",
            [packed, "", "", PAST_KEY % layer, PAST_VALUE % layer, _LENGTHS, _TOTAL, COSINES, SINES, "", "", stem + ".sinks"],
            f"{path}/GroupQueryAttention/output_0", PRESENT_KEY % layer, PRESENT_VALUE % layer, domain=MICROSOFT,
            num_heads=c.heads, kv_num_heads=c.kv_heads, scale=1 / math.sqrt(c.head_dim),
            local_window_size=c.sliding_window if slides else -1, softcap=0.0, do_rotary=1, rotary_interleaved=0,
            **({"sliding_window_cache": 1} if slides and self.variant.window_cache else {}),
        )  # fmt: skip
        return self.matmul(path[1:] + "/o_proj", stem + ".o_proj", made, (c.hidden, c.q_rows), kind)

    def _experts(self, layer: int, x: str, router: str) -> str:
        c, stem, bits = self.config, f"model.layers.{layer}.moe.experts.", BITS.get(self.variant.experts, 4)
        inputs = [x, router]
        for part in ("gate_up_proj", "down_proj"):
            inputs += [f"{stem}{part}.{kind}" for kind in ("qweight", "scales", "bias")]
        inputs += [""] * 6
        attributes: dict[str, Attribute] = {
            "activation_alpha": ALPHA, "activation_beta": 1.0, "activation_type": "swiglu", "block_size": GROUP,
            "expert_weight_bits": bits, "k": c.experts_per_token, "normalize_routing_weights": 1, "swiglu_fusion": 1,
            "swiglu_limit": c.swiglu_limit, "use_sparse_mixer": 0,
        }  # fmt: skip
        if self.variant.experts == "mxfp4":
            ones = struct.pack(f"<{c.experts}f", *[1.0] * c.experts)
            self.constants[EXPERT_ONES] = Tensor(EXPERT_ONES, FLOAT, (c.experts,), raw=ones)
            inputs += ["", EXPERT_ONES, EXPERT_ONES]
            attributes |= {"quant_type": "fp4", "weights_prepacked": 1}
        return self.add("QMoE", f"/model/layers.{layer}/moe/QMoE", inputs, domain=MICROSOFT, **attributes)


# --- inputs and outputs ------------------------------------------------------------------------------------------------


def _caches(config: ModelConfig, variant: Variant, names: Mapping[str, str], when: str) -> list[Port]:
    """Keys of all layers, then values; those of layers that slide have a length of their own where only a window is kept."""

    def shape(layer: int) -> tuple[int | str, ...]:
        window = "sliding" if config.sliding[layer] and variant.window_cache else "sequence"
        return "batch_size", config.kv_heads, f"{when}_{window}_length", config.head_dim

    return [Port(name % n, FLOAT, shape(n)) for name in names.values() for n in range(config.layers)]


def _inputs(config: ModelConfig, variant: Variant) -> list[Port]:
    own = [
        Port("input_ids", INT64, ("batch_size", "sequence_length")),
        Port("attention_mask", INT64, ("batch_size", "total_sequence_length")),
    ]
    return own + _caches(config, variant, {"key": PAST_KEY, "value": PAST_VALUE}, "past")


def _outputs(config: ModelConfig, variant: Variant) -> list[Port]:
    logits = Port("logits", FLOAT, ("batch_size", "sequence_length", config.vocab))
    return [logits, *_caches(config, variant, {"key": PRESENT_KEY, "value": PRESENT_VALUE}, "total")]

"""Integer targets for servers: compressed-tensors' numbers under the names that vLLM's own gpt-oss class reads.

    target    experts                          attention   tensors of an expert's matrix [R, C]
    int4      int4, groups of 32               the same    experts.N.w13_weight_packed I32 [R, C/8], _weight_scale BF16 [R, C/32]
    int8-g32  int8, groups of 32               bf16        experts.N.w13_weight_packed I32 [R, C/4], _weight_scale BF16 [R, C/32]
    int8      int8, a scale for each output    the same    experts.gate_up_proj I8 [E, C, R], .weight_scale F32 [E, 1, R]

w13 is gate and up, rows alternating; w2 is down. Embedding, head, router, norms, sinks and biases are bf16 as in the bf16
target. No stock loader of transformers knows these names (it would start from random experts), so a small modeling file
travels along and config.json's auto_map names it. Attention matrices of the packed targets have a `weight_shape` I64 [2],
which no step writes: it lies at the front of its file, after the header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.artifact_card import CARD, MODELING, SOURCE_CARD, artifact_card, modeling_file
from gptoss_convert.convert.companions import companion_bytes
from gptoss_convert.convert.names import DOWN, GATE_UP, Shape, canonical_shapes, is_expert_matrix, split_name
from gptoss_convert.convert.plan import INT_CODES, INT_SCALES, OutFile, Place, Plan, Slot, greedy_shards, slot_bytes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.source_safetensors import INDEX
from gptoss_convert.convert.target_safetensors import BF16_SHARD_BYTES, plan_bf16
from gptoss_convert.errors import Refused
from gptoss_convert.formats.safetensors import build_header, release_order
from gptoss_convert.kernels.int_rows import GROUP

_STREAMED = {GATE_UP: "w13", DOWN: "w2"}
_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")


@dataclass(frozen=True)
class Scheme:
    """One of the targets. attention: whether q, k, v and o are integers as well; model: the class of the modeling file."""

    target: str
    codec: str
    bits: int
    attention: bool
    model: str
    notes: tuple[str, ...]

    @property
    def grouped(self) -> bool:
        """Groups of 32 with their scales, weights only; else a scale for each output, and activations in int8 too."""
        return self.codec != "int8_channel"

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says to vLLM and to transformers."""
        form = "pack-quantized" if self.grouped else "int-quantized"
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": GROUP} if self.grouped else {"strategy": "channel"}
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            # Not self_attn: vLLM renames the module to "attn" and does not rename regular expressions.
            "ignore": ["lm_head"] if self.attention else ["lm_head", "re:.*attn.*"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": form,
                    "input_activations": None if self.grouped else token,
                    "output_activations": None,
                    "weights": weights | {"observer": "minmax"},
                }
            },
        }


_PACKED_NOTES = (
    "vLLM 0.31 or later, with --moe-backend {}: `auto` may choose a kernel that leaves out the experts' biases",
    "transformers needs trust_remote_code=True: its own class starts the experts from random numbers and only warns",
)
INT4 = Scheme(
    "int4", "int4_g32", 4, True, "GptOssPackedForCausalLM",
    tuple(note.format("humming or emulation") for note in _PACKED_NOTES),
)  # fmt: skip
INT8_G32 = Scheme(
    "int8-g32", "int8_g32", 8, False, "GptOssPackedForCausalLM",
    tuple(note.format("humming") for note in _PACKED_NOTES),
)  # fmt: skip
INT8 = Scheme(
    "int8", "int8_channel", 8, True, "GptOssInt8ForCausalLM",
    (
        "vLLM 0.29 or later, on one GPU or with --enable-expert-parallel: under plain tensor parallelism it computes with "
        "wrong scales and does not say so",
        "the runtime rounds activations to int8 as well: the proof is about the weights",
        "transformers needs trust_remote_code=True: its own class takes codes for weights and fails in the forward pass",
    ),
)  # fmt: skip


def plan_int4(source: Source, shard_bytes: int | None = None) -> Plan:
    """W4A16, groups of 32."""
    return _plan(source, INT4, shard_bytes)


def plan_int8_g32(source: Source, shard_bytes: int | None = None) -> Plan:
    """W8A16, groups of 32: every MXFP4 value exactly."""
    return _plan(source, INT8_G32, shard_bytes)


def plan_int8(source: Source, shard_bytes: int | None = None) -> Plan:
    """W8A8, a scale for each output."""
    return _plan(source, INT8, shard_bytes)


def _plan(source: Source, scheme: Scheme, shard_bytes: int | None) -> Plan:
    shapes = canonical_shapes(source.config)
    slots = {name: _slots(name, shape, scheme) for name, shape in shapes.items()}
    base = plan_bf16(source, shard_bytes)  # its small files are those of every Hugging Face folder
    plan = Plan(scheme.target, source, {"split_bytes": shard_bytes}, slots, notes=[*base.notes, *scheme.notes])
    if scheme is INT4 and all(view.encoding == "mxfp4" for n, view in source.views.items() if is_expert_matrix(n)):
        plan.notes.append(
            "MXFP4 experts are rounded, and take 4.5 bits instead of 4.25; --to hf keeps them as they are"
        )
    _lay_out(plan, shapes, shard_bytes or BF16_SHARD_BYTES)
    plan.small |= {name: data for name, data in base.small.items() if name not in (INDEX, CARD)}
    config = json.loads(base.small["config.json"])
    config["quantization_config"] = scheme.quantization_config()
    config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.{scheme.model}"}
    plan.small["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    plan.small[f"{MODELING}.py"] = modeling_file()
    theirs = source.companions.get(CARD)
    card = None if theirs is None else companion_bytes(theirs)
    if card is not None:
        plan.small[SOURCE_CARD] = card
    plan.small[CARD] = artifact_card(scheme.target, card)
    return plan


# --- tensors -----------------------------------------------------------------------------------------------------------


def _slots(name: str, shape: Shape, scheme: Scheme) -> list[Slot]:
    if is_expert_matrix(name):
        return _per_expert(name, shape, scheme) if scheme.grouped else _fused(name, shape, scheme)
    if name.endswith(_ATTENTION) and scheme.attention:
        rows, columns = shape
        if scheme.grouped:
            return _packed(name.removesuffix("weight"), rows, columns, scheme)
        return [
            Slot(name, scheme.codec, shape, field=INT_CODES, width=1),
            Slot(name + "_scale", scheme.codec, (rows, 1), field=INT_SCALES, width=4),
        ]
    return [Slot(name, "bf16", shape)]


def _per_expert(name: str, shape: Shape, scheme: Scheme) -> list[Slot]:
    """experts.N.w13_weight_packed and _scale."""
    experts, rows, columns = shape
    layer, inner = split_name(name)
    stem = f"model.layers.{layer}.mlp.experts."
    return [
        slot
        for expert in range(experts)
        for slot in _packed(f"{stem}{expert}.{_STREAMED[inner]}_", rows, columns, scheme, expert)
    ]


def _packed(stem: str, rows: int, columns: int, scheme: Scheme, expert: int | None = None) -> list[Slot]:
    if columns % GROUP:
        raise Refused(
            f"groups of {GROUP} do not divide a matrix's columns, and no other group is offered", tensor=stem + "weight",
            found=f"{columns} columns", expected=f"a multiple of {GROUP}",
            remedy="--to int8 has one scale for each output and takes any width",
        )  # fmt: skip
    per_word = 32 // scheme.bits
    return [
        Slot(
            stem + "weight_packed", scheme.codec, (rows, columns // per_word), field=INT_CODES, width=4, expert=expert
        ),
        Slot(stem + "weight_scale", scheme.codec, (rows, columns // GROUP), field=INT_SCALES, width=2, expert=expert),
    ]


def _fused(name: str, shape: Shape, scheme: Scheme) -> list[Slot]:
    """experts.gate_up_proj [E, in, out], as in bf16."""
    experts, rows, columns = shape
    return [
        Slot(name, scheme.codec, (experts, columns, rows), transposed=True, field=INT_CODES, width=1),
        Slot(name + ".weight_scale", scheme.codec, (experts, 1, rows), field=INT_SCALES, width=4),
    ]


def _dtype(slot: Slot) -> str:
    if not slot.field:
        return "BF16"
    return {4: "I32", 1: "I8"}[slot.width] if slot.field == INT_CODES else {2: "BF16", 4: "F32"}[slot.width]


# --- files -------------------------------------------------------------------------------------------------------------


def _lay_out(plan: Plan, shapes: dict[str, Shape], limit: int) -> None:
    """Shards as transformers names them, and the index where there are several."""
    flat = {slot.name: slot for name in shapes for slot in plan.slots[name]}
    matrices = {slots[0].name: shapes[name] for name, slots in plan.slots.items() if name.endswith(_ATTENTION)}
    parts = list(greedy_shards([(name, slot_bytes(slot)) for name, slot in flat.items()], limit))
    where, total = {}, 0
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        constants = {
            name.removesuffix("packed") + "shape": b"".join(size.to_bytes(8, "little") for size in matrices[name])
            for name in part
            if name in matrices and name.endswith("weight_packed")
        }
        specs = [(name, _dtype(flat[name]), flat[name].shape) for name in part]
        specs += [(name, "I64", (len(data) // 8,)) for name, data in constants.items()]
        head, entries = build_header(release_order(specs), {"format": "pt"})
        for entry in sorted(entries.values(), key=lambda entry: entry.offset):
            where[entry.name] = file
            total += entry.nbytes
            if entry.name in constants:  # the largest elements, hence first: no tensor's data lies before them
                assert entry.offset == len(head)
                head += constants[entry.name]
            else:
                plan.places[entry.name] = Place(index, entry.offset, entry.nbytes)
        plan.files.append(OutFile(file, head, max(entry.offset + entry.nbytes for entry in entries.values())))
    if len(parts) > 1:
        plan.small[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": where}).encode()

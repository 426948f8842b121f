"""Safetensors targets: the official HF layout, `original/`, and canonical bf16.

    hf        experts MXFP4 as *_blocks and *_scales, the rest BF16; shards counted from 0, "of" the last index
    original  the reference code's names, qkv fused; one model.safetensors, or model--0000i-of-0000n beyond the limit
    bf16      experts as fused BF16 [E, in, out], gate and up alternating in the last axis; transformers' shard names

hf and original reproduce OpenAI's files byte for byte, headers, shard boundaries, index and config included: the order of
the shards is the order in which the original conversion met the tensors (`_conversion_order`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoss_convert.config import MXFP4_QUANTIZATION, ModelConfig, to_hf, to_original
from gptoss_convert.convert.companions import TOKENIZER, companion_bytes
from gptoss_convert.convert.names import (
    Shape,
    canonical_shapes,
    is_expert_matrix,
    original_name,
    split_name,
)
from gptoss_convert.convert.plan import BLOCKS, SCALES, OutFile, Place, Plan, Slot, greedy_shards, slot_bytes
from gptoss_convert.convert.source import Layout, Source
from gptoss_convert.convert.tokens import special_ids
from gptoss_convert.errors import Refused
from gptoss_convert.formats.safetensors import build_header, release_order

HF_SHARD_BYTES = 4_800_000_000  # what the release was divided at
ORIGINAL_SHARD_BYTES = 10 << 30
BF16_SHARD_BYTES = 5_000_000_000
_DTYPES = {BLOCKS: "U8", SCALES: "U8", "bf16": "BF16", "f16": "F16", "f32": "F32"}

# The release's HF shards of 120b were made from seven original shards met in this order (a listing's, not sorted).
_MET_120B = (4, 3, 6, 2, 1, 7, 5)


def plan_hf(source: Source, shard_bytes: int | None = None) -> Plan:
    """The official HF layout."""
    shapes = canonical_shapes(source.config)
    _require_blocks(source.config)
    slots = {name: _hf_slots(name, shape) for name, shape in shapes.items()}
    plan = Plan("hf", source, {"split_bytes": shard_bytes}, slots)
    shards = _shards(slots, _conversion_order(source.config), shard_bytes or HF_SHARD_BYTES)
    last = len(shards) - 1
    names = [f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(len(shards))] if last else ["model.safetensors"]
    _lay_out(plan, names, shards, None)
    if last:
        plan.small["model.safetensors.index.json"] = _index(plan, shards, names).encode()
    plan.small["config.json"] = _hf_config(source, mxfp4=True)
    _add_companions(plan, source)
    return plan


def plan_bf16(source: Source, shard_bytes: int | None = None) -> Plan:
    """Canonical bf16: the form that transformers holds in memory."""
    shapes = canonical_shapes(source.config)
    slots = {name: [_bf16_slot(name, shape)] for name, shape in shapes.items()}
    plan = Plan("bf16", source, {"split_bytes": shard_bytes}, slots)
    shards = _shards(slots, list(shapes), shard_bytes or BF16_SHARD_BYTES)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    _lay_out(plan, names, shards, {"format": "pt"})
    if count > 1:
        plan.small["model.safetensors.index.json"] = _index(plan, shards, names).encode()
    plan.small["config.json"] = _hf_config(source, mxfp4=False)
    _add_companions(plan, source)
    return plan


def plan_original(source: Source, shard_bytes: int | None = None) -> Plan:
    """The reference code's layout."""
    config = source.config
    _require_original(source)
    _require_blocks(config)
    slots = {name: _original_slots(name, shape, config) for name, shape in canonical_shapes(config).items()}
    plan = Plan("original", source, {"split_bytes": shard_bytes}, slots)
    unique = {slot.name: slot for group in slots.values() for slot in group}
    parts = list(
        greedy_shards([(n, slot_bytes(unique[n])) for n in sorted(unique)], shard_bytes or ORIGINAL_SHARD_BYTES)
    )
    # 20b is one file of 13.8 GB all the same: the limit divides only what 120b's many experts make.
    if shard_bytes is None and sum(map(slot_bytes, unique.values())) < 2 * ORIGINAL_SHARD_BYTES:
        parts = [sorted(unique)]
    shards = [[unique[name] for name in part] for part in parts]
    count = len(shards)
    names = [f"model--{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    _lay_out(plan, names, shards, None)
    if count > 1:
        plan.small["model.safetensors.index.json"] = _index(plan, shards, names).encode()
    plan.small["config.json"] = json.dumps(to_original(config)).encode()
    plan.notes.append("original/ holds no tokenizer and no template, as in the release: they lie in the folder above")
    plan.small["dtypes.json"] = json.dumps(_logical_dtypes(unique)).encode()
    return plan


def _require_blocks(config: ModelConfig) -> None:
    for width, name in ((config.hidden, "hidden size"), (config.intermediate, "intermediate size")):
        if width % 32:
            raise Refused(
                "MXFP4 blocks do not divide the experts' rows", found=f"{name} {width}", expected="a multiple of 32"
            )


def _require_original(source: Source) -> None:
    """The reference code has no key for these, so only its built-in values can be expressed."""
    config = source.config
    plain = ModelConfig(**{**vars(config), "sliding": ()})
    problems = {
        "layers that slide": (config.sliding, plain.sliding),
        "rms_norm_eps": (config.rms_eps, 1e-5),
        "rope truncate": (config.truncate, False),
        "rope attention_factor": (config.attention_factor, None),
        "max_position_embeddings": (config.max_positions, int(config.original_positions * config.rope_factor)),
    }
    for key, (found, built_in) in problems.items():
        if found != built_in:
            raise Refused(
                f"original/config.json cannot express this model's {key}",
                file=source.path,
                found=found,
                expected=built_in,
            )


def _hf_slots(name: str, shape: Shape) -> list[Slot]:
    if not is_expert_matrix(name):
        return [Slot(name, "bf16", shape)]
    experts, rows, columns = shape
    return [
        Slot(name + "_blocks", BLOCKS, (experts, rows, columns // 32, 16)),
        Slot(name + "_scales", SCALES, (experts, rows, columns // 32)),
    ]


def _bf16_slot(name: str, shape: Shape) -> Slot:
    if not is_expert_matrix(name):
        return Slot(name, "bf16", shape)
    experts, rows, columns = shape
    return Slot(name, "bf16", (experts, columns, rows), transposed=True)


def _original_slots(name: str, shape: Shape, config: ModelConfig) -> list[Slot]:
    there = original_name(name)
    if there is None:
        layer, inner = split_name(name)
        first = {"q": 0, "k": config.q_rows, "v": config.q_rows + config.kv_rows}[inner.split(".")[1][0]]
        total = config.q_rows + 2 * config.kv_rows
        return [Slot(f"block.{layer}.attn.qkv.{inner.rsplit('.', 1)[1]}", "bf16", (total, *shape[1:]), first_row=first)]
    if not is_expert_matrix(name):
        return [Slot(there, "bf16", shape)]
    blocks, scales = _hf_slots(name, shape)
    return [Slot(there + ".blocks", BLOCKS, blocks.shape), Slot(there + ".scales", SCALES, scales.shape)]


def _conversion_order(config: ModelConfig) -> list[str]:
    """Canonical names as the release's conversion met them: original/ names sorted as text, qkv becoming q, k, v in place;
    for 120b shard by shard of its seven.
    """
    names: dict[str, list[str]] = {}
    for name, shape in canonical_shapes(config).items():
        for slot in _original_slots(name, shape, config):
            names.setdefault(slot.name, []).append(name)
    ordered = sorted(names)
    if config.release == "gpt-oss-120b":
        unique = {s.name: s for n, sh in canonical_shapes(config).items() for s in _original_slots(n, sh, config)}
        parts = list(greedy_shards([(n, slot_bytes(unique[n])) for n in ordered], ORIGINAL_SHARD_BYTES))
        ordered = [name for number in _MET_120B for name in parts[number - 1]]
    return list(dict.fromkeys(canonical for name in ordered for canonical in names[name]))


def _shards(slots: Mapping[str, list[Slot]], order: list[str], limit: int) -> list[list[Slot]]:
    """Slots in conversion order, divided greedily."""
    flat = {slot.name: slot for name in order for slot in slots[name]}
    parts = greedy_shards([(slot.name, slot_bytes(slot)) for slot in flat.values()], limit)
    return [[flat[name] for name in part] for part in parts]


def _lay_out(plan: Plan, names: list[str], shards: list[list[Slot]], metadata: Mapping[str, str] | None) -> None:
    for index, (file_name, shard) in enumerate(zip(names, shards, strict=True)):
        specs = release_order([(slot.name, _DTYPES[slot.codec], slot.shape) for slot in shard])
        head, entries = build_header(specs, metadata)
        for entry in entries.values():
            plan.places[entry.name] = Place(index, entry.offset, entry.nbytes)
        plan.files.append(OutFile(file_name, head, max(e.offset + e.nbytes for e in entries.values())))


def _index(plan: Plan, shards: list[list[Slot]], names: list[str]) -> str:
    total = sum(place.nbytes for place in plan.places.values())
    where = {slot.name: names[index] for index, shard in enumerate(shards) for slot in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where})


def _logical_dtypes(slots: Mapping[str, Slot]) -> dict[str, str]:
    logical = {BLOCKS: "FP4", SCALES: "UE8"}
    return {name: logical.get(slots[name].codec, "BF16") for name in slots}


def _hf_config(source: Source, *, mxfp4: bool) -> bytes:
    """config.json: the source's own where it has one, with quantization_config and dtype put right; else the release's."""
    if source.config_table:
        table = dict(source.config_table)
    else:
        ids = {**special_ids(source.companions), **source.config.token_ids}
        table = to_hf(replace(source.config, token_ids=ids), mxfp4=mxfp4)
    if mxfp4:
        packed = table.get("quantization_config")
        if not isinstance(packed, dict) or packed.get("quant_method") != "mxfp4":
            table["quantization_config"] = MXFP4_QUANTIZATION
    else:
        table.pop("quantization_config", None)
        if "torch_dtype" not in table:
            table["dtype"] = "bfloat16"
    for key in {"dtype", "torch_dtype"} & table.keys():
        table[key] = "bfloat16"
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


def _add_companions(plan: Plan, source: Source) -> None:
    for name, companion in source.companions.items():
        plan.small[name] = companion_bytes(companion)
    if TOKENIZER not in plan.small:
        plan.notes.append("no tokenizer is written: the source has none that a tokenizer.json can be made from")
    if "generation_config.json" not in plan.small and source.layout in (Layout.ORIGINAL, Layout.METAL, Layout.GGUF):
        defaults = _generation_defaults(source.config)
        if defaults:
            plan.small["generation_config.json"] = (json.dumps(defaults, indent=2, sort_keys=True) + "\n").encode()
            plan.notes.append("generation_config.json is made from the special tokens' ids; the source has none")


def _generation_defaults(config: ModelConfig) -> dict[str, Any]:
    """The release's generation_config.json, for the released vocabulary only: other ids are not ours to guess."""
    if config.vocab not in (201088, 200014):
        return {}
    return {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": [200002, 199999, 200012],
        "pad_token_id": 199999,
        "transformers_version": "4.55.0.dev0",
    }

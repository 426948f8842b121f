"""GGUF as a target: what llama.cpp's own converter writes for gpt-oss, tensor for tensor and key for key.

Norms, biases, sinks and the router are F32; experts take the codec asked for; embedding, head and attention matrices the
dense one. Tensors lie in the order of the forward pass, so that a split or a memory map follows the layers. No key of the
file depends on a path, a clock or a machine.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gptoss_convert.config import ModelConfig, default_sliding
from gptoss_convert.convert.companions import companion_bytes
from gptoss_convert.convert.gguf_widths import Neurons, change_widths, is_own_description
from gptoss_convert.convert.model_card import card_metadata
from gptoss_convert.convert.names import (
    Shape,
    canonical_shapes,
    gguf_gate_up,
    gguf_name,
    is_gate_up,
    split_name,
)
from gptoss_convert.convert.plan import OutFile, Place, Plan, Slot, greedy_shards, slot_bytes
from gptoss_convert.convert.source import Layout, Source
from gptoss_convert.convert.source_gguf import ARCHITECTURE, OWN_TRUNCATE
from gptoss_convert.convert.tokens import PRE, Vocabulary, read_vocabulary
from gptoss_convert.errors import BadInput, Refused, UsageError, printable
from gptoss_convert.formats.gguf import Value, ValueType, array, boolean, build_header, f32, string, u32
from gptoss_convert.formats.gguf_split import split_metadata
from gptoss_convert.formats.gguf_split import split_name as part_name
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.quant.recipe import TYPES, Recipe, plain

ALIGNMENT = 32
# llama.cpp's LLAMA_FTYPE, by the type's name; of a mixture of one's own by the codec of most experts.
FILE_TYPE = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21, "iq3_xxs": 23,
    "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "bf16": 32, "mxfp4": 38, "nvfp4": 39, "q2_0": 41,
    "q3_k_l": 13, "iq3_xs": 22, "iq3_m": 27, "iq2_m": 29,
    "q3_k": 11, "q4_k": 14, "q5_k": 16,
}  # fmt: skip
GUESSED = 1024  # llama.cpp's flag for a mixture that it has no number for
QUANTIZATION_VERSION = 2


def plan_gguf(
    source: Source,
    recipe: Recipe,
    *,
    name: str | None = None,
    split_bytes: int | None = None,
    stem: str = "",
    widening: str = "auto",
    neurons: Neurons,
    more: Sequence[tuple[str, Value]] = (),
) -> Plan:
    """The plan of a GGUF by a recipe: one file, or parts of at most `split_bytes` of tensor data named after `stem`.

    widening: see gguf_widths.py; neurons: chooses those that a cut keeps; more: further metadata.
    """
    require_expressible(source.config, source)
    slots = gguf_slots(source.config, recipe)
    general = general_metadata(source, slots, name)
    changed = change_widths(source, slots, recipe, widening, neurons, {key for key, _ in general})
    if changed.source is not source:
        source, slots = changed.source, gguf_slots(changed.source.config, recipe)
    tensors = [slot for group in slots.values() for slot in group]
    metadata = [*general, *model_metadata(source, file_type(recipe.name, source.config, slots)), *changed.keys, *more]
    if split_bytes is None:
        parts = [[slot.name for slot in tensors]]
        names = [stem]
    else:
        parts = list(greedy_shards([(slot.name, slot_bytes(slot)) for slot in tensors], split_bytes))
        names = [part_name(stem, i, len(parts)) for i in range(len(parts))]
    options = {"recipe": recipe.as_dict(), "widen": widening, "name": name, "split_bytes": split_bytes}
    plan = Plan("gguf", source, options, slots, notes=changed.notes, losses=changed.losses)
    by_name = {slot.name: slot for slot in tensors}
    for index, part in enumerate(parts):
        keys = metadata if index == 0 else []
        if split_bytes is not None:
            keys = [*keys, *split_metadata(index, len(parts), len(tensors))]
        _lay_out(plan, names[index], keys, [by_name[tensor] for tensor in part])
    return plan


def require_expressible(config: ModelConfig, source: Source) -> None:
    """Refuse what llama.cpp would compute differently: numbers that it has built in and no GGUF key can change."""
    problems = {
        "swiglu_limit": (config.swiglu_limit, 7.0),
        "rope beta_fast": (config.beta_fast, 32.0),
        "rope beta_slow": (config.beta_slow, 1.0),
        "rope attention_factor": (config.attention_factor, None),
    }
    if not any(config.sliding):
        raise Refused(
            "llama.cpp's gpt-oss aborts on a model without sliding layers", file=source.path, found="layer_types: all full",
            remedy="choose --to hf or --to bf16",
        )  # fmt: skip
    for key, (found, built_in) in problems.items():
        if found != built_in and not (key.endswith("attention_factor") and _is_default_factor(config)):
            raise Refused(
                f"llama.cpp computes gpt-oss with another {key}, and no GGUF key changes it",
                file=source.path, found=found, expected=built_in,
                remedy="this model cannot be run faithfully by llama.cpp; choose --to hf or --to bf16",
            )  # fmt: skip


def _is_default_factor(config: ModelConfig) -> bool:
    default = 0.1 * np.log(config.rope_factor) + 1
    return config.attention_factor is not None and bool(np.isclose(config.attention_factor, default, rtol=1e-9))


def gguf_slots(config: ModelConfig, recipe: Recipe) -> dict[str, list[Slot]]:
    """The output tensors of every canonical one, with the codecs that the recipe gives them."""
    return {name: _slots(name, shape, recipe, config.layers) for name, shape in canonical_shapes(config).items()}


def gguf_tensors(config: ModelConfig) -> dict[str, int | None]:
    """The name of every output tensor, and its layer."""
    slots = gguf_slots(config, plain("f32", "f32"))
    return {slot.name: split_name(name)[0] for name, group in slots.items() for slot in group}


def _slots(name: str, shape: Shape, recipe: Recipe, layers: int) -> list[Slot]:
    layer, _ = split_name(name)
    if is_gate_up(name):
        halved = (shape[0], shape[1] // 2, *shape[2:])
        parts = zip(gguf_gate_up(name), ("gate", "up"), strict=True)
        return [Slot(there, recipe.codec(there, layer, layers), halved, part) for there, part in parts]
    there = gguf_name(name)
    assert there is not None
    return [Slot(there, recipe.codec(there, layer, layers), shape)]


def _lay_out(plan: Plan, file_name: str, keys: Sequence[tuple[str, Value]], slots: Sequence[Slot]) -> None:
    infos = [(slot.name, CODECS[slot.codec].ggml_id, tuple(reversed(slot.shape))) for slot in slots]
    head, placed = build_header(keys, infos, ALIGNMENT)
    for info in placed:
        plan.places[info.name] = Place(len(plan.files), info.offset, info.nbytes)
    end = max(info.offset + info.nbytes for info in placed)
    plan.files.append(OutFile(file_name, head, end + -end % ALIGNMENT))


# --- metadata ----------------------------------------------------------------------------------------------------------


def file_type(name: str, config: ModelConfig, slots: Mapping[str, list[Slot]]) -> int:
    """general.file_type: of a known type its own, else of the codec that most experts' weights have.

    Known is the type called `name`, or else any, that gives every tensor the codec it has.
    """
    tensors = [(slot, split_name(canonical)[0]) for canonical, group in slots.items() for slot in group]
    for kind in sorted(TYPES, key=lambda kind: kind != name):
        if all(TYPES[kind].codec(slot.name, layer, config.layers) == slot.codec for slot, layer in tensors):
            return FILE_TYPE[kind]
    counts = Counter(slot.codec for slot, _ in tensors if "_exps.weight" in slot.name)
    return FILE_TYPE.get(counts.most_common(1)[0][0], GUESSED)


def model_metadata(source: Source, kind: int) -> list[tuple[str, Value]]:
    """The keys after the general ones: architecture and tokenizer. source: in the widths of the file."""
    return [*_model(source.config, kind), *_tokenizer(source)]


def general_metadata(source: Source, slots: Mapping[str, list[Slot]], name: str | None) -> list[tuple[str, Value]]:
    """general.name … of a model, which no width of a file changes. slots: in the model's own widths."""
    keys = [("general.architecture", string(ARCHITECTURE)), ("general.type", string("model"))]
    if name is not None and (not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)):
        raise UsageError("--name is not plain text", found=ascii(name), expected="a name without control characters")
    if source.layout is Layout.GGUF:
        skipped = {
            "general.architecture", "general.type", "general.file_type", "general.quantization_version",
            "general.alignment",
        }  # fmt: skip
        kept = {
            k: v
            for k, v in source.metadata.items()
            if k.startswith("general.") and k not in skipped and not is_own_description(k, v)
        }
        if name is not None:
            named = {"general.name": string(name)}
            kept = {**kept, **named} if "general.name" in kept else {**named, **kept}
        return keys + list(kept.items())
    card = source.companions.get("README.md")
    return keys + card_metadata(companion_bytes(card) if card else b"", name, source.config, _counts(slots))


def _counts(slots: Mapping[str, list[Slot]]) -> tuple[int, int, int]:
    """Parameters outside the experts, of one expert of every layer, and experts: what a size label is made of."""
    shared = per_expert = experts = 0
    for slot in (slot for group in slots.values() for slot in group):
        size = int(np.prod(slot.shape, dtype=np.int64))
        if "_exps." in slot.name:
            experts = slot.shape[0]
            per_expert += size // experts
        else:
            shared += size
    return shared, per_expert, experts


def _model(config: ModelConfig, kind: int) -> list[tuple[str, Value]]:
    own: list[tuple[str, Value]] = [
        ("block_count", u32(config.layers)),
        ("context_length", u32(config.max_positions)),
        ("embedding_length", u32(config.hidden)),
        ("feed_forward_length", u32(config.intermediate)),
        ("attention.head_count", u32(config.heads)),
        ("attention.head_count_kv", u32(config.kv_heads)),
        ("rope.scaling.type", string("yarn")),
        ("rope.scaling.factor", f32(config.rope_factor)),
        ("rope.scaling.original_context_length", u32(config.original_positions)),
        ("rope.scaling.yarn_beta_fast", f32(config.beta_fast)),
        ("rope.scaling.yarn_beta_slow", f32(config.beta_slow)),
        ("rope.freq_base", f32(config.rope_theta)),
        ("attention.layer_norm_rms_epsilon", f32(config.rms_eps)),
        ("expert_count", u32(config.experts)),
        ("expert_used_count", u32(config.experts_per_token)),
        ("attention.key_length", u32(config.head_dim)),
        ("attention.value_length", u32(config.head_dim)),
        ("attention.sliding_window", u32(config.sliding_window)),
        ("expert_feed_forward_length", u32(config.intermediate)),
    ]
    if config.sliding != default_sliding(config.layers):
        own.append(("attention.sliding_window_pattern", array(ValueType.BOOL, list(config.sliding))))
    keys = [(f"{ARCHITECTURE}.{key}", value) for key, value in own]
    keys.append(("general.file_type", u32(kind)))
    keys.append(("general.quantization_version", u32(QUANTIZATION_VERSION)))
    if config.truncate:  # llama.cpp always truncates YaRN's bounds; kept so that a way back exists
        keys.append((OWN_TRUNCATE, boolean(True)))
    return keys


def _tokenizer(source: Source) -> list[tuple[str, Value]]:
    if source.layout is Layout.GGUF:
        kept = [(key, value) for key, value in source.metadata.items() if key.startswith("tokenizer.")]
        for key, value in kept:
            if key.endswith("_token_id"):
                _check_token_id(source, key, value.value)
        return kept
    for role, index in source.config.token_ids.items():
        _check_token_id(source, f"{role}_token_id", index)
    shortened = source.layout in (Layout.METAL, Layout.ORIGINAL)
    vocabulary = read_vocabulary(source.companions, source.config.vocab, source.path, shortened=shortened)
    if vocabulary.left_out:
        note = (
            f"{len(vocabulary.left_out)} special tokens are left out, because the model has no rows for them "
            f"(it has {source.config.vocab}): {printable(', '.join(vocabulary.left_out), 200)}"
        )
        if note not in source.notes:
            source.notes.append(note)
    return vocabulary_keys(vocabulary, {**source.config.token_ids, **vocabulary.ids})


def _check_token_id(source: Source, key: str, index: object) -> None:
    rows = source.config.vocab
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < rows:
        raise BadInput(
            "a special token's id is none of the model's rows",
            file=source.path,
            tensor=key,
            found=repr(index)[:80],
            expected=f"an id below {rows}",
        )


def vocabulary_keys(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, Value]]:
    """The tokenizer's keys; bos and eos are never added by themselves, the template decides."""
    keys: list[tuple[str, Value]] = [
        ("tokenizer.ggml.model", string("gpt2")),
        ("tokenizer.ggml.pre", string(PRE)),
        ("tokenizer.ggml.tokens", array(ValueType.STRING, vocabulary.tokens)),
        ("tokenizer.ggml.token_type", array(ValueType.INT32, vocabulary.types)),
        ("tokenizer.ggml.merges", array(ValueType.STRING, vocabulary.merges)),
    ]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if role in ids:
            keys.append((f"tokenizer.ggml.{key}_token_id", u32(ids[role])))
    keys.append(("tokenizer.ggml.add_bos_token", boolean(False)))
    keys.append(("tokenizer.ggml.add_eos_token", boolean(False)))
    if vocabulary.template is not None:
        keys.append(("tokenizer.chat_template", string(vocabulary.template)))
    return keys

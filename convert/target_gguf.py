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
from gptoss_convert.convert.cut import KEY_DROPPED, choose, cut, describe, dropped_list
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
from gptoss_convert.convert.widen import (
    KEY_GAIN,
    KEY_HIDDEN,
    KEY_INTERMEDIATE,
    SUPER_BLOCK,
    Widening,
    Widths,
    is_gain,
    required,
    widen,
)
from gptoss_convert.errors import BadInput, Refused, UsageError, printable
from gptoss_convert.formats.gguf import Value, ValueType, array, boolean, build_header, f32, string, u32
from gptoss_convert.formats.gguf_split import split_metadata
from gptoss_convert.formats.gguf_split import split_name as part_name
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.quant.recipe import Recipe

ALIGNMENT = 32
# llama.cpp's LLAMA_FTYPE, by what the experts are.
FILE_TYPE = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16,
    "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "bf16": 32,
    "mxfp4": 38, "nvfp4": 39, "q2_0": 41,
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
    threads: int = 1,
) -> Plan:
    """The plan of a GGUF by a recipe: one file, or parts of at most `split_bytes` of tensor data named after `stem`.

    Where the recipe's codecs do not divide the rows, the model is widened ("auto"), or its experts are cut to the next lower
    multiple and only the residual stream is widened ("cut"), or the recipe is refused ("none").
    """
    require_expressible(source.config, source)
    slots = gguf_slots(source.config, recipe)
    changed, note, losses, keys = _change_widths(source, slots, widening, (recipe.hidden, recipe.intermediate), threads)
    if changed is not source:
        source, slots = changed, gguf_slots(changed.config, recipe)
    tensors = [slot for group in slots.values() for slot in group]
    metadata = build_metadata(source, tensors, name) + keys
    if split_bytes is None:
        parts = [[slot.name for slot in tensors]]
        names = [stem]
    else:
        parts = list(greedy_shards([(slot.name, slot_bytes(slot)) for slot in tensors], split_bytes))
        names = [part_name(stem, i, len(parts)) for i in range(len(parts))]
    options = {"recipe": recipe.as_dict(), "widen": widening, "name": name, "split_bytes": split_bytes}
    plan = Plan("gguf", source, options, slots, notes=[note] if note else [], losses=losses)
    by_name = {slot.name: slot for slot in tensors}
    for index, part in enumerate(parts):
        keys = metadata if index == 0 else []
        if split_bytes is not None:
            keys = [*keys, *split_metadata(index, len(parts), len(tensors))]
        _lay_out(plan, names[index], keys, [by_name[tensor] for tensor in part])
    return plan


def _change_widths(
    source: Source, slots: Mapping[str, list[Slot]], widening: str, asked: Widths, threads: int
) -> tuple[Source, str, list[str], list[tuple[str, Value]]]:
    """The source in widths that the slots' codecs divide, what to say of it, what it loses, and the keys that undo it."""
    true = source.config
    wide = required(true, {slot.name: slot.codec for group in slots.values() for slot in group}, asked)
    if wide is None:
        return source, "", [], []
    if widening == "none":
        _refuse_rows(slots)
        raise Refused("the recipe asks for other widths, and --widen none forbids them", found=f"{wide}")
    keys, losses = widening_keys(source), []
    lower = true.intermediate - true.intermediate % SUPER_BLOCK
    if widening == "cut" and wide.intermediate > true.intermediate and lower and asked[1] is None:
        wide = Widening(wide.hidden, lower)
    if wide.intermediate < true.intermediate:
        _refuse_deep_cut(true.intermediate, wide.intermediate)
        kept = choose(source, wide.intermediate, threads)
        keys.append((KEY_DROPPED, array(ValueType.UINT16, dropped_list(kept, true.intermediate))))
        losses.append(describe(true.intermediate, wide.intermediate))
        source = cut(source, kept)
    why = "as the recipe asks" if any(asked) else "because blocks of 256 do not divide the rows"
    note = (
        f"widened from {true.hidden} to {wide.hidden} columns (experts from {true.intermediate} to {wide.intermediate}), "
        f"{why}; what is added is zeros and changes nothing"
    )
    return widen(source, wide), note, losses, keys


def _refuse_deep_cut(width: int, kept: int) -> None:
    """More than a quarter of the neurons by weight norm leaves another model, whose proof would mean nothing."""
    if 4 * kept < 3 * width:
        raise Refused(
            "too many neurons would be cut", found=f"{kept} of {width} kept", expected=f"at least {-(-3 * width // 4)}"
        )


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


def _slots(name: str, shape: Shape, recipe: Recipe, layers: int) -> list[Slot]:
    layer, _ = split_name(name)
    if is_gate_up(name):
        halved = (shape[0], shape[1] // 2, *shape[2:])
        parts = zip(gguf_gate_up(name), ("gate", "up"), strict=True)
        return [Slot(there, recipe.codec(there, layer, layers), halved, part) for there, part in parts]
    there = gguf_name(name)
    assert there is not None
    return [Slot(there, recipe.codec(there, layer, layers), shape)]


def _refuse_rows(slots: Mapping[str, list[Slot]]) -> None:
    """Name the first tensor whose rows its codec does not divide."""
    for group in slots.values():
        for slot in group:
            if not CODECS[slot.codec].fits(slot.shape[-1]):
                raise Refused(
                    "the codec's blocks do not divide the tensor's rows",
                    tensor=slot.name,
                    found=f"{slot.shape[-1]} columns",
                    expected=f"a multiple of {CODECS[slot.codec].block} for {slot.codec}",
                    remedy="let the model be widened (--widen auto), or choose a type with blocks of 32",
                )


def widening_keys(true: Source) -> list[tuple[str, Value]]:
    """What a wide file says of the model it was made of."""
    gain = next(view.encoding for name, view in true.views.items() if is_gain(name))
    return [
        (KEY_HIDDEN, u32(true.config.hidden)),
        (KEY_INTERMEDIATE, u32(true.config.intermediate)),
        (KEY_GAIN, string(gain)),
    ]


def _lay_out(plan: Plan, file_name: str, keys: Sequence[tuple[str, Value]], slots: Sequence[Slot]) -> None:
    _refuse_rows({slot.name: [slot] for slot in slots})
    infos = [(slot.name, CODECS[slot.codec].ggml_id, tuple(reversed(slot.shape))) for slot in slots]
    head, placed = build_header(keys, infos, ALIGNMENT)
    for info in placed:
        plan.places[info.name] = Place(len(plan.files), info.offset, info.nbytes)
    end = max(info.offset + info.nbytes for info in placed)
    plan.files.append(OutFile(file_name, head, end + -end % ALIGNMENT))


# --- metadata ----------------------------------------------------------------------------------------------------------


def build_metadata(source: Source, tensors: Sequence[Slot], name: str | None) -> list[tuple[str, Value]]:
    """All keys, in the converter's order: general, architecture, tokenizer."""
    return [*_general(source, tensors, name), *_model(source.config, _expert_codec(tensors)), *_tokenizer(source)]


def _expert_codec(tensors: Sequence[Slot]) -> str:
    """The codec that most experts' weights have: what a file's type is named after."""
    counts = Counter(slot.codec for slot in tensors if "_exps.weight" in slot.name)
    return counts.most_common(1)[0][0]


def _general(source: Source, tensors: Sequence[Slot], name: str | None) -> list[tuple[str, Value]]:
    keys = [("general.architecture", string(ARCHITECTURE)), ("general.type", string("model"))]
    if name is not None and (not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)):
        raise UsageError("--name is not plain text", found=ascii(name), expected="a name without control characters")
    if source.layout is Layout.GGUF:
        skipped = {
            "general.architecture", "general.type", "general.file_type", "general.quantization_version",
            "general.alignment",
        }  # fmt: skip
        kept = {k: v for k, v in source.metadata.items() if k.startswith("general.") and k not in skipped}
        if name is not None:
            named = {"general.name": string(name)}
            kept = {**kept, **named} if "general.name" in kept else {**named, **kept}
        return keys + list(kept.items())
    card = source.companions.get("README.md")
    return keys + card_metadata(companion_bytes(card) if card else b"", name, source.config, _counts(tensors))


def _counts(tensors: Sequence[Slot]) -> tuple[int, int, int]:
    """Parameters outside the experts, of one expert of every layer, and experts: what a size label is made of."""
    shared = per_expert = experts = 0
    for slot in tensors:
        size = int(np.prod(slot.shape, dtype=np.int64))
        if "_exps." in slot.name:
            experts = slot.shape[0]
            per_expert += size // experts
        else:
            shared += size
    return shared, per_expert, experts


def _model(config: ModelConfig, experts: str) -> list[tuple[str, Value]]:
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
    keys.append(("general.file_type", u32(FILE_TYPE.get(experts, GUESSED))))
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

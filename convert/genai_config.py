"""genai_config.json: what onnxruntime-genai, and Foundry Local through it, must know of a model beside its graph."""

from __future__ import annotations

import json
from typing import Any

from gptoss_convert.convert.companions import companion_bytes
from gptoss_convert.convert.onnx_graph import PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE
from gptoss_convert.convert.onnx_layout import MODEL_FILE, Variant
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.tokens import added_ids, special_ids
from gptoss_convert.formats.files import parse_json

END_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")
GENERATION = "generation_config.json"


def genai_config(source: Source, variant: Variant) -> tuple[bytes, list[str]]:
    """The file, and notes on what it lacks."""
    ends, notes = _end_tokens(source)
    ids = {**special_ids(source.companions), **source.config.token_ids}
    text = added_ids(source.companions)
    bos, pad = ids.get("bos", text.get("<|startoftext|>")), ids.get("pad", text.get("<|endoftext|>"))
    known = {"bos_token_id": bos, "eos_token_id": ends or None, "pad_token_id": pad}
    model: dict[str, Any] = {
        **{key: value for key, value in known.items() if value is not None},
        "context_length": source.config.max_positions,
        "decoder": _decoder(source, variant),
        "type": "gptoss",
        "vocab_size": source.config.vocab,
    }
    sampling, unread = _sampling(source)
    table = {"model": model, "search": {**_search(source.config.max_positions), **sampling}}
    return (json.dumps(table, indent=4) + "\n").encode(), notes + unread


def _decoder(source: Source, variant: Variant) -> dict[str, Any]:
    config = source.config
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": PAST_KEY,
            "past_value_names": PAST_VALUE,
        },
        "outputs": {"logits": "logits", "present_key_names": PRESENT_KEY, "present_value_names": PRESENT_VALUE},
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
    }
    layers = [n for n, slides in enumerate(config.sliding) if slides]
    if variant.window_cache and layers:
        decoder["sliding_window"] = {
            "window_size": config.sliding_window,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": layers,
            "cache_slack": 0,
        }
    return decoder


def _search(context: int) -> dict[str, Any]:
    return {
        "diversity_penalty": 0.0,
        "do_sample": True,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": context,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 0,  # no cut: OpenAI's sampling, where transformers and the builder cut at 50
        "top_p": 1.0,
    }


def _sampling(source: Source) -> tuple[dict[str, Any], list[str]]:
    """What the source's own generation_config.json says of sampling, and notes on what of it genai would not take."""
    table, vocab = _generation(source), source.config.vocab
    found: dict[str, Any] = {}
    notes = []
    if isinstance(table.get("do_sample"), bool):
        found["do_sample"] = table["do_sample"]
    for key, low, high in (
        ("temperature", 0, 100),
        ("top_p", 0, 1),
        ("repetition_penalty", 0, 100),
        ("top_k", -1, 1 << 31),
    ):
        value = table.get(key)
        if value is None:
            continue
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        if wrong or (value == 0 and key in ("top_p", "repetition_penalty")) or (key == "top_k" and value != int(value)):
            notes.append(f"genai_config.json has its own {key}: {GENERATION}'s is out of range, {str(value)[:20]!r}")
        elif key == "top_k":
            found[key] = int(value) if 0 < value < vocab else 0
        else:
            found[key] = float(value)
    return found, notes


def _generation(source: Source) -> dict[str, Any]:
    """generation_config.json, empty where there is none."""
    if GENERATION not in source.companions:
        return {}
    return parse_json(companion_bytes(source.companions[GENERATION]), GENERATION)


def _end_tokens(source: Source) -> tuple[list[int], list[str]]:
    """Ids that end a generation: harmony's three, and what generation_config.json adds to them."""
    by_text = added_ids(source.companions)
    found = [by_text[text] for text in END_TOKENS if text in by_text]
    missing = [text for text in END_TOKENS if text not in by_text]
    listed: Any = _generation(source).get("eos_token_id")
    more = listed if isinstance(listed, list) else [listed, source.config.token_ids.get("eos")]
    found += [i for i in more if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < source.config.vocab]
    notes = [f"genai_config.json cannot name {', '.join(missing)}: the tokenizer does not have it"] if missing else []
    return list(dict.fromkeys(found)), notes

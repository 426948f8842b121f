"""The tokenizer, from tokenizer.json to the arrays that a GGUF carries. The way back is in tokenizer_files.py.

Tokens in id order (rows without a token are named `[PAD<id>]`, type unused, as llama.cpp's converter does), their types, merges
as "left right". A tokenizer that does not split text as llama.cpp's `gpt-4o` does is refused. Templates are never rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Companion, companion_bytes
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.files import parse_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
PRE = "gpt-4o"  # llama.cpp's name for the o200k split
SPECIALS = ("bos", "eos", "pad")

_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# o200k's split expression, as tiktoken publishes it.
SPLIT = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer: tokens and types by id, merges, ids by role, the template's text.

    left_out: special tokens that the model has no row for.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    template: str | None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Added:
    text: str
    id: int
    special: bool


def read_vocabulary(
    companions: Mapping[str, Companion], rows: int, path: object, *, shortened: bool = False
) -> Vocabulary:
    """The tokenizer of a source with tokenizer.json, for a model of `rows` vocabulary rows.

    shortened: the source's layout has dropped the last rows, so that added tokens beyond them are left out.
    """
    if TOKENIZER not in companions:
        raise Refused(
            "the source has no tokenizer, which a GGUF must carry",
            file=path,
            expected=TOKENIZER,
            remedy="give the folder that holds it: --tokenizer FOLDER",
        )
    table = parse_json(companion_bytes(companions[TOKENIZER]), TOKENIZER)
    settings = _settings(companions)
    added = _added(table)
    beyond = [token for token in added if shortened and token.id >= rows]
    added = [token for token in added if not shortened or token.id < rows]
    tokens, types = _tokens(table, added, rows)
    _require_same_splits(table)
    template = _template(companions, settings)
    ids = _ids({token.text: token.id for token in added}, settings)
    return Vocabulary(tokens, types, _merges(table), ids, template, tuple(token.text for token in beyond))


def _added(table: Mapping[str, Any]) -> list[_Added]:
    listed = table.get("added_tokens", [])
    if not isinstance(listed, list):
        raise BadInput("the tokenizer's added_tokens is not a list", file=TOKENIZER, found=type(listed).__name__)
    added = []
    for token in listed:
        text, index = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(index, int) or isinstance(index, bool):
            raise BadInput(
                "an added token of the tokenizer is malformed", file=TOKENIZER, found=repr(token)[:80],
                expected="an object with content and id",
            )  # fmt: skip
        looks_special = text.startswith("<|") and text.endswith("|>")
        added.append(_Added(text, index, bool(token.get("special")) or looks_special))
    return added


def _tokens(table: Mapping[str, Any], added: Sequence[_Added], rows: int) -> tuple[list[str], list[int]]:
    model = table.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise BadInput("the tokenizer is not byte-level BPE", file=TOKENIZER, expected="model.type BPE with a vocab")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, index in model["vocab"].items():
        _check_id(index, rows, text)
        if types[index] != UNUSED:
            raise _twice("two tokens of the tokenizer have one id", f"{tokens[index]!r} and {text!r}, id {index}")
        tokens[index], types[index] = text, NORMAL
    for token in added:
        _check_id(token.id, rows, token.text)
        if types[token.id] != UNUSED and (types[token.id] != NORMAL or tokens[token.id] != token.text):
            raise _twice(
                "two tokens of the tokenizer have one id", f"{tokens[token.id]!r} and {token.text!r}, id {token.id}"
            )
        tokens[token.id], types[token.id] = token.text, CONTROL if token.special else USER_DEFINED
    require_distinct(tokens, TOKENIZER)
    return tokens, types


def require_distinct(tokens: Sequence[str], file: object) -> None:
    """llama.cpp aborts where two ids have one text."""
    if len(set(tokens)) == len(tokens):
        return
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if seen.setdefault(text, index) != index:
            raise _twice("two ids of the tokenizer have one text", f"{text!r}, ids {seen[text]} and {index}", file)


def _twice(what: str, found: str, file: object = TOKENIZER) -> BadInput:
    return BadInput(what, file=file, found=found, expected="one id a token, one token an id")


def _require_same_splits(table: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that llama.cpp's "gpt-4o" would not be: it has the split expression and all else built in."""
    model = table["model"]
    changed = {
        "pre_tokenizer": _splits_otherwise(table.get("pre_tokenizer")),
        "normalizer": table.get("normalizer") is not None,
        **{
            f"model.{key}": bool(model.get(key)) if key != "unk_token" else model.get(key) is not None
            for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
        },
    }
    for key, differs in changed.items():
        if differs:
            own = table.get(key) if "." not in key else model.get(key.removeprefix("model."))
            raise Refused(
                f"llama.cpp would tokenize differently: this tokenizer's {key} is not that of gpt-oss",
                file=TOKENIZER,
                found=json.dumps(own)[:300],
                expected="Split by the o200k expression, then ByteLevel" if key == "pre_tokenizer" else "null",
                remedy="choose --to hf or --to bf16, which keep the tokenizer as it is",
            )


def _splits_otherwise(found: object) -> bool:
    steps = _steps(found)
    if len(steps) != 2:
        return True
    split, levels = steps
    return (
        split.get("type") != "Split"
        or split.get("pattern") != {"Regex": SPLIT}
        or split.get("behavior") != "Isolated"
        or split.get("invert", False) is not False
        or levels.get("type") != "ByteLevel"
        or levels.get("add_prefix_space") is not False
        or levels.get("use_regex") is not False
    )


def _steps(found: object) -> list[Mapping[str, Any]]:
    """A pre-tokenizer's steps in order, sequences within sequences laid flat."""
    if not isinstance(found, dict):
        return [{}]
    inner = found.get("pretokenizers")
    if found.get("type") != "Sequence" or not isinstance(inner, list):
        return [found]
    return [step for part in inner for step in _steps(part)]


def _check_id(index: object, rows: int, text: object) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < rows or not isinstance(text, str):
        raise BadInput(
            "the tokenizer has a token that the model has no row for", file=TOKENIZER,
            found=f"{text!r} with id {index!r}", expected=f"ids below {rows}",
        )  # fmt: skip


def _merges(table: Mapping[str, Any]) -> list[str]:
    merges = table["model"].get("merges")
    if not isinstance(merges, list):
        raise BadInput("the tokenizer has no merges", file=TOKENIZER)
    if all(isinstance(merge, str) for merge in merges):
        return merges
    try:
        # A space inside a part is written as its byte symbol, so that the joining space is the only one.
        texts = [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
    except (AttributeError, TypeError, ValueError):
        texts = []
    if not texts or not all(isinstance(merge, list) for merge in merges):
        raise BadInput("the tokenizer's merges are neither texts nor pairs of texts", file=TOKENIZER)
    return texts


def _ids(by_text: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, int]:
    ids = {}
    for role in SPECIALS:
        text = settings.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in by_text:
            ids[role] = by_text[text]
    return ids


def special_ids(companions: Mapping[str, Companion]) -> dict[str, int]:
    """bos, eos and pad by tokenizer_config.json alone: a tokenizer.json may have to be made, which takes long."""
    settings = _settings(companions)
    listed = settings.get("added_tokens_decoder")
    by_text = {}
    for index, token in listed.items() if isinstance(listed, dict) else ():
        if not re.fullmatch("[0-9]{1,9}", index):
            raise BadInput("not a token's id", file=TOKENIZER_CONFIG, tensor="added_tokens_decoder", found=index[:40])
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            by_text[token["content"]] = int(index)
    return _ids(by_text, settings)


def added_ids(companions: Mapping[str, Companion]) -> dict[str, int]:
    """The ids of the added tokens by text; none without a tokenizer.json."""
    if TOKENIZER not in companions:
        return {}
    return {token.text: token.id for token in _added(parse_json(companion_bytes(companions[TOKENIZER]), TOKENIZER))}


def _settings(companions: Mapping[str, Companion]) -> dict[str, Any]:
    if TOKENIZER_CONFIG not in companions:
        return {}
    return parse_json(companion_bytes(companions[TOKENIZER_CONFIG]), TOKENIZER_CONFIG)


def _template(companions: Mapping[str, Companion], settings: Mapping[str, Any]) -> str | None:
    if TEMPLATE in companions:
        try:
            return companion_bytes(companions[TEMPLATE]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput("the chat template is not UTF-8", file=TEMPLATE, found=error) from error
    inline = settings.get("chat_template")
    return inline if isinstance(inline, str) else None

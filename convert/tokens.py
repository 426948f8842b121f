"""The tokenizer, between tokenizer.json and the arrays that GGUF and metal carry.

tokenizer.json → GGUF: tokens in id order (rows without a token are named `[PAD<id>]`, type unused, as llama.cpp's converter
does), their types, merges as "left right". GGUF or metal → tokenizer.json: byte-level BPE with the o200k split expression and
`ignore_merges`, which for the released vocabulary gives OpenAI's tokenizer.json byte for byte. Nothing is ever rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Companion, companion_bytes
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.files import parse_json
from gptoss_convert.formats.gguf import Value, ValueType

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
    """What a GGUF says of a tokenizer: tokens and types by id, merges, ids by role, the template's text."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    template: str | None


def read_vocabulary(companions: Mapping[str, Companion], rows: int, path: object) -> Vocabulary:
    """The tokenizer of a source with tokenizer.json, for a model of `rows` vocabulary rows."""
    if TOKENIZER not in companions:
        raise Refused(
            "the source has no tokenizer, which a GGUF must carry",
            file=path,
            expected=TOKENIZER,
            remedy="give the folder that holds it: --tokenizer FOLDER",
        )
    table = parse_json(companion_bytes(companions[TOKENIZER]), TOKENIZER)
    settings = _settings(companions)
    tokens, types = _tokens(table, rows)
    template = _template(companions, settings)
    return Vocabulary(tokens, types, _merges(table), _ids(table, settings), template)


def _tokens(table: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    model, added = table.get("model"), table.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise BadInput("the tokenizer is not byte-level BPE", file=TOKENIZER, expected="model.type BPE with a vocab")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, index in model["vocab"].items():
        _check_id(index, rows, text)
        tokens[index], types[index] = text, NORMAL
    for token in added if isinstance(added, list) else []:
        text, index = token.get("content"), token.get("id")
        _check_id(index, rows, text)
        looks_special = str(text).startswith("<|") and str(text).endswith("|>")
        tokens[index], types[index] = text, CONTROL if token.get("special") or looks_special else USER_DEFINED
    return tokens, types


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
    if not all(isinstance(merge, list) for merge in merges):
        raise BadInput("the tokenizer's merges are of mixed kinds", file=TOKENIZER)
    try:
        joined = [f"{left} {right}" for left, right in merges]
        plain = "".join(map("".join, merges))  # raises TypeError for what is not text
    except (TypeError, ValueError) as error:
        raise BadInput("the tokenizer's merges are neither texts nor pairs of texts", file=TOKENIZER) from error
    if " " in plain:  # inside a part a space is written as its byte symbol, so that the joining one is the only one
        joined = [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]
    return joined


def _ids(table: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    by_text = {token["content"]: token["id"] for token in table.get("added_tokens", [])}
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
    tokens = [
        {"content": token["content"], "id": int(index)}
        for index, token in (listed.items() if isinstance(listed, dict) else ())
        if index.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
    ]
    return _ids({"added_tokens": tokens}, settings)


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


# --- back to tokenizer.json --------------------------------------------------------------------------------------------


def gguf_companions(metadata: Mapping[str, Value]) -> dict[str, Companion]:
    """The companions that a GGUF's metadata hold: tokenizer files, template, generation defaults; made when asked for."""

    def field(key: str, kind: ValueType, of: ValueType | None = None) -> Any:
        value = metadata.get(f"tokenizer.{key}")
        if value is None:
            return None
        if value.type is not kind or value.element_type is not of:
            raise BadInput("a metadata key has the wrong type", tensor=f"tokenizer.{key}", found=value.type.name)
        return value.value

    texts = (ValueType.ARRAY, ValueType.STRING)
    companions: dict[str, Companion] = {}
    template = field("chat_template", ValueType.STRING)
    if template is not None:
        companions[TEMPLATE] = template.encode("utf-8", "surrogateescape")
    tokens, merges = field("ggml.tokens", *texts), field("ggml.merges", *texts)
    types = field("ggml.token_type", ValueType.ARRAY, ValueType.INT32)
    kind = (field("ggml.model", ValueType.STRING), field("ggml.pre", ValueType.STRING))
    if kind != ("gpt2", PRE) or not tokens or not merges or not types:
        return companions
    special = {i: text for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    normal = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == NORMAL}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    ids = {
        role: field(f"ggml.{key}_token_id", ValueType.UINT32)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    roles = {role: special[i] for role, i in ids.items() if i in special}
    return {**companions, **_tokenizer_files(lambda: build_tokenizer(normal, pairs, special), special, roles)}


def vocabulary_companions(tokens: Sequence[bytes], special: Mapping[int, str]) -> dict[str, Companion]:
    """Companions from the tokens' bytes in id order, merges worked out; special tokens by id (metal)."""

    def make() -> bytes:
        ranks = {token: i for i, token in enumerate(tokens)}
        normal = {as_symbols(token): i for token, i in ranks.items()}
        return build_tokenizer(normal, all_merges(ranks), special)

    names = {"bos": "<|startoftext|>", "eos": "<|return|>", "pad": "<|endoftext|>"}
    return _tokenizer_files(make, special, {r: text for r, text in names.items() if text in special.values()})


def _tokenizer_files(
    make: Callable[[], bytes], special: Mapping[int, str], roles: Mapping[str, str]
) -> dict[str, Companion]:
    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings: dict[str, Any] = {
        "added_tokens_decoder": {str(i): {"content": text, **options} for i, text in sorted(special.items())},
        **{f"{role}_token": text for role, text in roles.items()},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    settings["added_tokens_decoder"] = {k: dict(sorted(v.items())) for k, v in settings["added_tokens_decoder"].items()}
    names = {f"{role}_token": text for role, text in roles.items()}
    return {
        TOKENIZER: make,
        TOKENIZER_CONFIG: json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n",
        "special_tokens_map.json": json.dumps(names, indent=2).encode() + b"\n",
    }


def build_tokenizer(normal: Mapping[str, int], merges: Sequence[Any], special: Mapping[int, str]) -> bytes:
    """tokenizer.json of a byte-level BPE tokenizer: tokens and merges in byte symbols, special tokens by id."""
    import tempfile
    from pathlib import Path

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    if sorted(special) != list(range(len(normal), len(normal) + len(special))):
        raise Refused("the special tokens do not follow the others, so no tokenizer.json can hold the ids")
    try:
        bpe = models.BPE(dict(normal), list(merges), fuse_unk=False, byte_fallback=False, ignore_merges=True)
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        raise BadInput("the tokenizer's merges do not fit its tokens", found=str(error)[:200]) from error
    tokenizer = Tokenizer(bpe)
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    # The stubs do not know that a decoder takes the options which the release's file has.
    byte_level: Any = decoders.ByteLevel
    tokenizer.decoder = byte_level(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.add_special_tokens([AddedToken(special[i], normalized=False, special=True) for i in sorted(special)])
    with tempfile.TemporaryDirectory() as folder:  # `save` is the only writer of the indented form
        path = Path(folder) / TOKENIZER
        tokenizer.save(str(path), pretty=True)
        return path.read_bytes()


def _symbols() -> dict[int, str]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


SYMBOLS = _symbols()


def as_symbols(token: bytes) -> str:
    """A token's bytes as byte-level BPE spells them: printable Latin-1 as itself, the rest from U+0100 on."""
    return "".join(map(SYMBOLS.__getitem__, token))


def all_merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens: by the token's rank, then by the halves' ranks."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [
            (ranks[token[:i]], ranks[token[i:]], i)
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges.extend((as_symbols(token[:i]), as_symbols(token[i:])) for _, _, i in sorted(splits))
    return merges

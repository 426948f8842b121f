"""The tokenizer, between tokenizer.json and the arrays that GGUF and metal carry.

tokenizer.json → GGUF: tokens in id order (rows without a token are named `[PAD<id>]`, type unused, as llama.cpp's converter
does), their types, merges as "left right". GGUF or metal → tokenizer.json: byte-level BPE with the o200k split expression and
`ignore_merges`, which for the released vocabulary gives OpenAI's tokenizer.json byte for byte. Nothing is ever rendered.
"""

from __future__ import annotations

import json
import re
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
    _require_distinct(tokens, TOKENIZER)
    return tokens, types


def _require_distinct(tokens: Sequence[str], file: object) -> None:
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
    plain = {i: text for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == USER_DEFINED}

    def make() -> bytes:
        _require_all_kept(tokens, types)
        normal = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
        return build_tokenizer(normal, [tuple(merge.split(" ", 1)) for merge in merges], special, plain)

    ids = {
        role: field(f"ggml.{key}_token_id", ValueType.UINT32)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    added = special | plain
    roles = {role: added[i] for role, i in ids.items() if i in added}
    return {**companions, **_tokenizer_files(make, special, roles, plain)}


def _require_all_kept(tokens: Sequence[str], types: Sequence[int]) -> None:
    """Refuse a vocabulary of which a tokenizer.json would lose a token; rows that only pad it are no tokens."""
    if len(tokens) != len(types):
        raise BadInput(
            "the GGUF has not one type a token",
            tensor="tokenizer.ggml.token_type",
            found=len(types),
            expected=len(tokens),
        )
    _require_distinct(tokens, "tokenizer.ggml.tokens")
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in (NORMAL, CONTROL, USER_DEFINED) and not (kind == UNUSED and text.startswith("[PAD")):
            raise Refused(
                "no tokenizer.json can hold a token of this type",
                tensor="tokenizer.ggml.tokens",
                found=f"{text!r}, id {index}, type {kind}",
                expected="normal, control or user-defined tokens, and [PAD…] rows",
            )


def vocabulary_companions(tokens: Sequence[bytes], special: Mapping[int, str]) -> dict[str, Companion]:
    """Companions from the tokens' bytes in id order, merges worked out; special tokens by id (metal)."""

    def make() -> bytes:
        ranks = {token: i for i, token in enumerate(tokens)}
        normal = {as_symbols(token): i for token, i in ranks.items()}
        return build_tokenizer(normal, all_merges(ranks), special)

    names = {"bos": "<|startoftext|>", "eos": "<|return|>", "pad": "<|endoftext|>"}
    return _tokenizer_files(make, special, {r: text for r, text in names.items() if text in special.values()})


def _tokenizer_files(
    make: Callable[[], bytes],
    special: Mapping[int, str],
    roles: Mapping[str, str],
    plain: Mapping[int, str] | None = None,
) -> dict[str, Companion]:
    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = sorted({**special, **(plain or {})}.items())
    settings: dict[str, Any] = {
        "added_tokens_decoder": {str(i): {"content": text, **options, "special": i in special} for i, text in added},
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


def build_tokenizer(
    normal: Mapping[str, int],
    merges: Sequence[Any],
    special: Mapping[int, str],
    plain: Mapping[int, str] | None = None,
) -> bytes:
    """tokenizer.json of a byte-level BPE tokenizer: tokens and merges in byte symbols, added tokens by id.

    plain: added tokens that are not special.
    """
    import itertools
    import tempfile
    from pathlib import Path

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    added = {**special, **(plain or {})}
    count = len(normal) + len(added)
    if sorted(added) != list(range(len(normal), count)) or sorted(normal.values()) != list(range(len(normal))):
        raise Refused("the added tokens do not follow the others, so no tokenizer.json can hold the ids")
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
    for is_special, group in itertools.groupby(sorted(added), special.__contains__):
        run = [AddedToken(added[i], normalized=False, special=is_special) for i in group]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(run)
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

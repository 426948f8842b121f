"""Back to tokenizer.json: the files of a tokenizer from the arrays that a GGUF or metal's model.bin carries.

Byte-level BPE with the o200k split expression and `ignore_merges`: for the released vocabulary that gives OpenAI's own
tokenizer.json byte for byte. Merges that a file does not list are worked out: every split of a token into two tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Companion
from gptoss_convert.convert.tokens import CONTROL, NORMAL, PRE, SPLIT, UNUSED, USER_DEFINED, require_distinct
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.gguf import Value, ValueType


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
    require_distinct(tokens, "tokenizer.ggml.tokens")
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

"""Tokenizers: a small one with the structure of the true one, and the true one rebuilt from a public package.

Both come out of `harmony_tokenizer(ranks)`: byte-level BPE whose merges are every split of a token into two tokens, in
rank order, and the 21 special tokens. That the true one comes out with the published digest proves the function.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TRUE_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TRUE_TEXT_TOKENS = 199998

_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""The o200k split expression."""

NAMED = {
    0: "<|startoftext|>",
    1: "<|endoftext|>",
    4: "<|return|>",
    5: "<|constrain|>",
    7: "<|channel|>",
    8: "<|start|>",
    9: "<|end|>",
    10: "<|message|>",
    14: "<|call|>",
    20: "<|endofprompt|>",
}
"""Special tokens by their distance from the first one; the other eleven are reserved."""

CHAT_TEMPLATE = """\
{#- A small invented template with the control tokens of harmony. -#}
{{- "<|start|>system<|message|>" + (model_identity or "A test model.") + "<|end|>" -}}
{%- for message in messages -%}
{{- "<|start|>" + message.role -}}
{%- if message.role == "assistant" -%}{{- "<|channel|>final" -}}{%- endif -%}
{{- "<|message|>" + message.content + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""

TRAINING_TEXT = """\
The weights of a model are numbers, and a converter moves them from one file to another without changing what they mean.
A checkpoint has layers; a layer has attention and experts; an expert has a gate, an up and a down projection.
Hello, world! Hello there. It's what they've said: we'll see, you're right, I'd wait, he's gone, don't go, I'm here.
Reading is the first step, checking the second, writing the third, and proving the last and the longest of them all.
def convert(source, target):
    for name, tensor in source.items():
        if name.endswith("weight") and tensor.shape[0] == 2880:
            target[name] = tensor.reshape(-1, 32)
    return {"layers": 24, "experts": 32, "hidden": 2880}
In 2025 there were 1, 22, 333 and 4444 reasons; 199998 text tokens; 0.5, 1.5 and -6.0 as values; 100% of 3 + 4 = 7.
Der schnelle braune Fuchs springt über den faulen Hund. Les élèves étaient déjà partis où l'été commence.
¿Qué pasó mañana?
Быстрая лиса прыгает через ленивую собаку. Η γρήγορη αλεπού. 你好，世界。模型的权重是数字。こんにちは世界。
안녕하세요 세계. नमस्ते दुनिया। مرحبا بالعالم. שלום עולם. 🙂🚀👩‍👩‍👧 → ≠ ≤ ∑ “quoted” — dashed… naïve café
<html><body class="main">&nbsp;</body></html> https://example.org/path?query=value&other=1#part user@example.org
SELECT * FROM tensors WHERE dtype = 'BF16' AND size > 1024 ORDER BY name; -- all of them, please\t\ttabs\t
WARNING: The NEXT Layers ARE CamelCase and snake_case and kebab-case and SCREAMING_CASE and mixedCase123.
"""


@cache
def byte_symbols() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE: itself when printable, else U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def as_text(token: bytes) -> str:
    symbols = byte_symbols()
    return "".join(symbols[byte] for byte in token)


def special_tokens(first: int) -> dict[int, str]:
    """Id -> special token, for a vocabulary whose text tokens end before `first`."""
    return {first + i: NAMED.get(i, f"<|reserved_{first + i}|>") for i in range(21)}


def merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two tokens: by the token's rank, then by the ranks of the halves."""
    result: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        result += [(as_text(a), as_text(b)) for a, b in halves]
    return result


def harmony_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """A tokenizer with the structure of the release's tokenizer.json."""
    vocabulary = {as_text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges(ranks), fuse_unk=False, byte_fallback=False, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in special_tokens(len(ranks)).values()]
    )
    return tokenizer


@cache
def small_vocabulary(text_tokens: int) -> tuple[bytes, ...]:
    """The text tokens of a small vocabulary in id order: the 256 bytes, then what training on TRAINING_TEXT merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=text_tokens,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(ordered) != text_tokens:
        raise ValueError(f"the training text yields {len(ordered)} text tokens (256 at least), not {text_tokens}")
    return tuple(bytes(byte_of[c] for c in text) for text, _ in ordered)


def tokenizer_config(first: int) -> dict[str, Any]:
    """tokenizer_config.json as the release has it."""
    return {
        "added_tokens_decoder": {
            str(i): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, text in special_tokens(first).items()
        },
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


SPECIAL_TOKENS_MAP = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}


def small_tokenizer(folder: Path, vocab: int, spare_rows: int = 11) -> Path:
    """Write the three tokenizer files for a model of `vocab` rows, of which the last `spare_rows` have no token."""
    tokens = small_vocabulary(vocab - 21 - spare_rows)
    return write_tokenizer(harmony_tokenizer({token: i for i, token in enumerate(tokens)}), folder, len(tokens))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, text_tokens: int) -> Path:
    """Write a tokenizer of harmony's structure with its two configuration files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path), pretty=True)
    for name, value in (
        ("tokenizer_config.json", tokenizer_config(text_tokens)),
        ("special_tokens_map.json", SPECIAL_TOKENS_MAP),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    return path


def true_ranks(package: Path) -> dict[bytes, int]:
    """The o200k_base ranks out of the npm package: lines of a tag, the first id and base64 tokens, as one JS string."""
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/dist/ranks/o200k_base.js")
        if member is None:
            raise ValueError(f"{package} has no o200k_base ranks")
        source = member.read().decode()
    found = re.search(r'"bpe_ranks":\s*("(?:[^"\\]|\\.)*")|bpe_ranks:\s*("(?:[^"\\]|\\.)*")', source)
    if found is None:
        raise ValueError(f"{package}: the ranks are not where version 1.0.21 has them")
    lines = []
    for line in json.loads(found[1] or found[2]).splitlines():
        _, first, *tokens = line.split(" ")
        lines += [f"{token} {int(first) + i}" for i, token in enumerate(tokens)]
    text = "\n".join(lines) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != RANKS_SHA256:
        raise ValueError("the ranks of the npm package are not o200k_base")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split(" ") for line in lines)}


no_true_tokenizer = ""
"""Why the last `true_tokenizer` returned None."""


def true_tokenizer(cache: Path) -> Path | None:
    """The release's tokenizer.json, rebuilt into `cache` (and kept there). None when the npm package cannot be had."""
    global no_true_tokenizer  # noqa: PLW0603
    target = cache / "tokenizer.json"
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == TRUE_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    package = cache / "js-tiktoken-1.0.21.tgz"
    if not package.exists():
        if which("npm") is None:
            no_true_tokenizer = "npm is not installed"
            return None
        command = ["npm", "pack", "js-tiktoken@1.0.21", "--pack-destination", str(cache.resolve())]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            no_true_tokenizer = f"npm pack failed: {getattr(error, 'stderr', None) or error}"
            return None
    part = target.with_suffix(".part")
    harmony_tokenizer(true_ranks(package)).save(str(part), pretty=True)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    if digest != TRUE_SHA256:
        raise AssertionError(f"rebuilt tokenizer.json has sha256 {digest}, not the release's")
    return part.replace(target)

"""What chat needs beside the weights: tokenizer and template as they are, end tokens, harmony's vocabulary where no net is.

`require_chat` refuses an artifact that would be served without them. `harmony_vocabulary` makes o200k_base.tiktoken, which vLLM's
harmony parser otherwise downloads, from tokenizer.json: its text tokens in id order are that file, and a pinned digest says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.package import Package
from gptoss_convert.convert.tokenizer_files import SYMBOLS
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.files import parse_json

GENERATION, SPECIALS = "generation_config.json", "special_tokens_map.json"
END_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")  # in the order of the release's generation_config.json
VOCABULARY, VARIABLE = "o200k_base.tiktoken", "TIKTOKEN_ENCODINGS_BASE"  # the folder of the first, in the environment
# OpenAI's own file, as tiktoken 0.14.0 and openai-harmony 0.0.8 pin it (read 2026-11-22).
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
NO_VOCABULARY = (
    "the tokenizer is not the release's, so the vocabulary that vLLM's chat parser wants is not in the package: "
    "the container downloads it when it starts and needs the internet"
)
_BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


@dataclass
class Chat:
    """replaced: small files to write in place of the artifact's own, or that it lacks; notes: why."""

    table: Mapping[str, Any]  # tokenizer.json
    replaced: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put_into(self, package: Package, folder: str) -> None:
        """Into a package that has the artifact's files in this folder."""
        package.files.update({folder + name: data for name, data in self.replaced.items()})
        package.notes.extend(self.notes)


def require_chat(artifact: Artifact, platform: str) -> Chat:
    """Refuse an artifact without tokenizer or template; see that generation stops at all three end tokens."""
    for name in (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE):
        if name not in artifact.files:
            raise Refused(
                f"{platform} would serve this artifact without chat: a file is missing", file=artifact.path, expected=name,
                remedy="convert again with --tokenizer FOLDER, which holds tokenizer.json, its config and chat_template.jinja",
            )  # fmt: skip
    chat = Chat(parse_json(_small(artifact, TOKENIZER), TOKENIZER))
    _require_end_tokens(artifact, chat)
    if SPECIALS not in artifact.files:
        settings = parse_json(_small(artifact, TOKENIZER_CONFIG), TOKENIZER_CONFIG)
        roles = {f"{role}_token": settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
        chat.replaced[SPECIALS] = as_json({key: text for key, text in roles.items() if text is not None})
        chat.notes.append(f"{SPECIALS} is made from {TOKENIZER_CONFIG}; the artifact has none")
    return chat


def _require_end_tokens(artifact: Artifact, chat: Chat) -> None:
    listed = chat.table.get("added_tokens")
    added = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    ids = {token.get("content"): token.get("id") for token in added}
    missing = [text for text in END_TOKENS if not isinstance(ids.get(text), int)]
    if missing:
        raise Refused(
            "the tokenizer has no such end token, so that a conversation would not stop", file=artifact.path,
            found=", ".join(missing), expected=" ".join(END_TOKENS), remedy="export with gpt-oss's own tokenizer",
        )  # fmt: skip
    ends = [ids[text] for text in END_TOKENS]
    own = artifact.small(GENERATION)
    table = parse_json(own, GENERATION) if own is not None else {"do_sample": True}
    have = table.get("eos_token_id")
    kept = have if isinstance(have, list) else [] if have is None else [have]
    if set(ends) <= set(kept):
        return
    table = {**table, "eos_token_id": [*kept, *(i for i in ends if i not in kept)]}
    chat.replaced[GENERATION] = (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
    chat.notes.append(
        f"{GENERATION} stops at {', '.join(END_TOKENS)}; the artifact's own "
        + ("is missing" if own is None else f"had eos_token_id {have}")
    )


def harmony_vocabulary(table: Mapping[str, Any]) -> bytes | None:
    """o200k_base.tiktoken from a tokenizer.json, or None where its text tokens are not those."""
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return None
    try:
        tokens = sorted((index, bytes(map(_BYTES.__getitem__, text))) for text, index in vocabulary.items())
    except (KeyError, TypeError):
        return None  # a token that is no text in byte symbols
    made = b"".join(b"%s %d\n" % (base64.b64encode(token), index) for index, token in tokens)
    return made if hashlib.sha256(made).hexdigest() == VOCABULARY_SHA256 else None


def _small(artifact: Artifact, name: str) -> bytes:
    data = artifact.small(name)
    if data is None:
        raise BadInput(
            "a small file lies where it is not read", file=artifact.path, expected=f"{name} beside the weights"
        )
    return data

"""What chat needs beside the weights: tokenizer and template as they are, end tokens, harmony's vocabulary where no net is.

`require_chat_files` refuses a folder that would be served without them. `harmony_vocabulary` makes o200k_base.tiktoken, which
vLLM's harmony parser otherwise downloads, from tokenizer.json: its text tokens in id order are that file, and a digest says so.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss_convert.convert.certificate import FOLDER_NAME
from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.exports.amended import amended_certificate
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.chat import END_TOKENS, GENERATION, generation_config, require_chat
from gptoss_convert.convert.exports.package import Package
from gptoss_convert.convert.tokenizer_files import SYMBOLS
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.files import parse_json

SPECIALS = "special_tokens_map.json"
VOCABULARY, VARIABLE = "o200k_base.tiktoken", "TIKTOKEN_ENCODINGS_BASE"  # the folder of the first, in the environment
# OpenAI's own file, as tiktoken 0.14.0 and openai-harmony 0.0.8 pin it (read 2026-11-22).
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
NO_VOCABULARY = (
    "the tokenizer is not the release's, so the vocabulary that vLLM's chat parser wants is not in the package: "
    "the container downloads it when it starts and needs the internet"
)
_BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


@dataclass
class ChatFiles:
    """replaced: small files to write in place of the artifact's own, or that it lacks; notes: why; ends: token → id."""

    table: Mapping[str, Any]  # tokenizer.json
    ends: Mapping[str, int]
    replaced: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put_into(self, package: Package, folder: str) -> None:
        """Into a package that has the artifact's files in this folder."""
        package.files.update({folder + name: data for name, data in self.replaced.items()})
        package.notes.extend(self.notes)


def require_chat_files(artifact: Artifact, platform: str) -> ChatFiles:
    """Refuse a folder without tokenizer or template (chat.py); see that generation stops at all three end tokens."""
    chat = require_chat(artifact, platform)
    for name in (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE):
        if name not in artifact.files:
            raise Refused(
                f"{platform} cannot hold a conversation with this artifact: it lacks {name}", file=artifact.path, expected=name,
                remedy="convert again with --tokenizer FOLDER, which holds tokenizer.json, its config and chat_template.jinja",
            )  # fmt: skip
    made = ChatFiles(parse_json(_small(artifact, TOKENIZER), TOKENIZER), chat.ends)
    settings = parse_json(_small(artifact, TOKENIZER_CONFIG), TOKENIZER_CONFIG)
    if (defaults := generation_config(artifact, chat)) is not None:
        made.replaced[GENERATION] = defaults
        made.notes.append(f"{GENERATION} stops at {', '.join(END_TOKENS)}; the artifact's own is missing or did not")
    if SPECIALS not in artifact.files:
        roles = {f"{role}_token": settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
        made.replaced[SPECIALS] = as_json({key: text for key, text in roles.items() if text is not None})
        made.notes.append(f"{SPECIALS} is made from {TOKENIZER_CONFIG}; the artifact has none")
    if made.replaced and (certificate := amended_certificate(artifact, made.replaced, platform)) is not None:
        made.replaced[FOLDER_NAME] = certificate
    return made


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

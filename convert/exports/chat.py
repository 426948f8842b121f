"""What a chat needs and every export carries: the tokenizer, the template unchanged, and the tokens that end a turn.

A template is compared and copied, never rendered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.official import official_name_of
from gptoss_convert.convert.tokens import CONTROL
from gptoss_convert.errors import Refused
from gptoss_convert.formats.files import parse_json

END_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")  # in the order of the release's generation_config.json
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Chat:
    """template: its bytes; official: the name of the release's file with these bytes, if there is one; ends: token → id."""

    template: bytes
    official: str | None
    ends: dict[str, int]

    @property
    def knows_effort(self) -> bool:
        """Whether the template takes `reasoning_effort`."""
        return b"reasoning_effort" in self.template

    @property
    def origin(self) -> str:
        """A sentence for a README."""
        digest = hashlib.sha256(self.template).hexdigest()
        known = "OpenAI's own, byte for byte" if self.official else "not one of OpenAI's files"
        return f"The chat template is {known} (SHA-256 {digest})."


def require_chat(artifact: Artifact, platform: str) -> Chat:
    """The artifact's chat, or Refused with what is missing."""
    gguf = artifact.kind == "gguf"
    ids = _gguf_tokens(artifact, platform) if gguf else _folder_tokens(artifact, platform)
    template = _template(artifact)
    if not template:
        raise _missing(artifact, platform, "tokenizer.chat_template" if gguf else TEMPLATE)
    for token in END_TOKENS:
        if token not in ids:
            raise _missing(artifact, platform, token)
    _require_unchanged(artifact, template)
    digest = hashlib.sha256(template).hexdigest()
    return Chat(template, official_name_of(digest), {token: ids[token] for token in END_TOKENS})


def generation_config(artifact: Artifact, chat: Chat) -> bytes | None:
    """A generation_config.json with every end token, or None where the folder's own has them all."""
    found = artifact.small(GENERATION)
    table: dict[str, Any] = {"do_sample": True}
    if found is not None:
        table = parse_json(found, GENERATION)
        ends = table.get("eos_token_id")
        known = ends if isinstance(ends, list) else [ends]
        if all(end in known for end in chat.ends.values()):
            return None
    made = {"bos_token_id": None, **table, "eos_token_id": list(chat.ends.values())}
    made = {key: value for key, value in made.items() if value is not None}
    return (json.dumps(made, indent=2, sort_keys=True) + "\n").encode()


def _template(artifact: Artifact) -> bytes | None:
    if (template := artifact.small(TEMPLATE)) is not None:
        return template
    settings = artifact.small(TOKENIZER_CONFIG)
    inner = None if settings is None else parse_json(settings, TOKENIZER_CONFIG).get("chat_template")
    return inner.encode() if isinstance(inner, str) else None


def _gguf_tokens(artifact: Artifact, platform: str) -> dict[str, int]:
    """Control tokens of a GGUF by text; the end of the turn must be what the file says ends it."""
    held = {key: value.value for key, value in artifact.source.metadata.items() if key.startswith("tokenizer.")}
    for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        if held.get(f"tokenizer.ggml.{key}") in (None, [], ""):
            raise _missing(artifact, platform, f"tokenizer.ggml.{key}")
    tokens, kinds = held["tokenizer.ggml.tokens"], held["tokenizer.ggml.token_type"]
    ids = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL}
    if ids.get(END_TOKENS[0]) != held["tokenizer.ggml.eos_token_id"]:
        raise _missing(artifact, platform, f"{END_TOKENS[0]} as tokenizer.ggml.eos_token_id")
    return ids


def _folder_tokens(artifact: Artifact, platform: str) -> dict[str, int]:
    tokenizer = artifact.small(TOKENIZER)
    if tokenizer is None:
        raise _missing(artifact, platform, TOKENIZER)
    added = parse_json(tokenizer, TOKENIZER).get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return {
        e["content"]: e["id"] for e in entries if isinstance(e.get("content"), str) and isinstance(e.get("id"), int)
    }


def _require_unchanged(artifact: Artifact, template: bytes) -> None:
    """Against the certificate: the template that the source had."""
    source = {} if artifact.certificate is None else artifact.certificate["source"]
    promised = (source.get("template") or {}).get("sha256")
    digest = hashlib.sha256(template).hexdigest()
    if promised is not None and promised != digest:
        raise Refused(
            "the chat template is not the one that the model was converted with", file=artifact.path, found=digest,
            expected=promised, remedy="convert again from the source",
        )  # fmt: skip


def _missing(artifact: Artifact, platform: str, what: str) -> Refused:
    return Refused(
        f"{platform} cannot hold a conversation with this artifact: it lacks {what}", file=artifact.path, found="no such part",
        expected="tokenizer, chat template and the end tokens " + ", ".join(END_TOKENS),
        remedy="gptoss-convert convert SRC OUT --to … --tokenizer FOLDER, a folder with the release's tokenizer and template",
    )  # fmt: skip

"""metal's `model.bin`: the bytes before the weights. Little-endian.

    offset  bytes  content
    0       16     magic: "GPT-OSS v1.0" and four zero bytes
    16      16     model UUID
    32      68     17 numbers: u32 context length, blocks, experts, active experts, embedding width, mlp width; f32 swiglu
                   limit; u32 head dim, heads, kv heads, attention window; f32 rope theta, interpolation scale, yarn offset,
                   yarn scale, yarn multiplier, rmsnorm epsilon
    100     16     layout UUID (Apple GPU)
    116     16     tokenizer UUID (tiktoken)
    132     16     u32 special tokens, text tokens, bytes of the split expression, bytes of the tokens
    148     16·S   one UUID a special token, in id order; zeros where there is none
    …              split expression, NUL-terminated; per text token u16 length and bytes; zeros to a multiple of 16384

From openai/gpt-oss: gpt_oss/metal/scripts/create-local-model.py and source/include/internal. The length of a token is the
whole u16 (the reference reader takes one byte of it, though one o200k token has 128).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from uuid import UUID

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile

MAGIC = b"GPT-OSS v1.0\0\0\0\0"
MODEL = UUID("df52dc86-1789-4ed0-a295-66f10508145b").bytes
APPLE_GPU = UUID("229177a8-5775-4268-bfd8-d588b351c56d").bytes
TIKTOKEN = UUID("7401aded-2a95-40cb-b782-9ccebaafe72b").bytes
_IDENTIFIERS = ((0, MAGIC, "magic"), (16, MODEL, "model"), (100, APPLE_GPU, "layout"), (116, TIKTOKEN, "tokenizer"))
PAGE = 16384
MAX_TOKENS, MAX_SECTION = 1 << 20, 64 << 20
_NUMBERS = struct.Struct("<6If4I6f")
_COUNTS = struct.Struct("<4I")

SPECIAL_NAMES = {
    UUID("55a77c2f-8a01-4c54-8ac2-313bfc7e208d").bytes: "<|start|>",
    UUID("16e40431-f47f-4b22-b59b-8b278fc30a54").bytes: "<|message|>",
    UUID("fcac2f6d-4705-4f6b-b228-642accac7238").bytes: "<|end|>",
    UUID("f799ff69-1992-43c4-a3d8-d831f475dc75").bytes: "<|return|>",
    UUID("c0bb14c7-6022-49da-ad08-792d67e8b470").bytes: "<|constrain|>",
    UUID("fd3dda11-c8ab-4033-876e-d93deb172c93").bytes: "<|channel|>",
    UUID("1220f796-e388-4de5-b487-fe2eb5fe03c0").bytes: "<|call|>",
}


@dataclass(frozen=True)
class MetalHeader:
    """The description, the vocabulary, and where the weights start (bytes)."""

    context_length: int
    blocks: int
    experts: int
    active_experts: int
    hidden: int
    intermediate: int
    swiglu_limit: float
    head_dim: int
    heads: int
    kv_heads: int
    window: int
    rope_theta: float
    interpolation_scale: float
    yarn_offset: float
    yarn_scale: float
    yarn_multiplier: float
    rms_eps: float
    tokens: tuple[bytes, ...]
    specials: tuple[bytes, ...]
    weights_start: int


def read_header(file: SourceFile) -> MetalHeader:
    """Everything before the weights, each count checked against the file before it is believed."""
    head = bytes(file.read(0, min(148, file.size)))
    for at, expected, what in _IDENTIFIERS:
        if head[at : at + 16] != expected:
            raise BadInput(
                f"the {what} identifier is not gpt-oss's",
                file=file.path, found=head[at : at + 16].hex(), expected=expected.hex(),
            )  # fmt: skip
    if len(head) < 148:
        raise BadInput("the file ends inside its header", file=file.path, found=f"{file.size} bytes")
    special_count, text_count, regex_bytes, tokens_bytes = _COUNTS.unpack_from(head, 132)
    if special_count > 4096 or text_count > MAX_TOKENS or regex_bytes > 1 << 16 or tokens_bytes > MAX_SECTION:
        raise BadInput("absurd counts in the tokenizer section", file=file.path, found=f"{special_count}, {text_count}")
    at = 148 + 16 * special_count
    specials = bytes(file.read(148, 16 * special_count))
    section = bytes(file.read(at + regex_bytes, tokens_bytes))
    end = at + regex_bytes + tokens_bytes
    uuids = tuple(specials[i : i + 16] for i in range(0, len(specials), 16))
    values = (*_NUMBERS.unpack_from(head, 32), _tokens(section, text_count, file), uuids, end + -end % PAGE)
    return MetalHeader(**dict(zip((f.name for f in fields(MetalHeader)), values, strict=True)))


def _tokens(section: bytes, count: int, file: SourceFile) -> tuple[bytes, ...]:
    tokens, at = [], 0
    for _ in range(count):
        if at + 2 > len(section):
            raise BadInput("the token list is shorter than its count", file=file.path, expected=f"{count} tokens")
        length = int.from_bytes(section[at : at + 2], "little")
        tokens.append(section[at + 2 : at + 2 + length])
        at += 2 + length
    if at != len(section):
        raise BadInput("the token list does not end where it should", file=file.path, found=at, expected=len(section))
    return tuple(tokens)

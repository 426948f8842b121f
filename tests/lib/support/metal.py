"""`metal/model.bin`: one file for Apple GPUs with header, tokenizer and weights, little-endian throughout.

    magic | model UUID, 17 numbers | layout UUID | tokenizer UUID, 4 counts | special-token UUIDs | split regex | tokens
    | zeros to 16384 | embedding | blocks without experts | final norm | unembedding
    | per block: zeros to 16384, experts

Every weight item begins at a multiple of 16; a bias follows its weight at once. Only rows of text tokens and of the
first 16 special tokens are kept. The bits differ from original/ in three ways: order of q and k rows, their magnitude,
scale bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import torch
from support import safetensors_files as st
from support.model import Model, Spec
from support.release import original_entries
from support.tokenizer import SPLIT, small_vocabulary

KEPT_SPECIALS = 16
SCALE_OFFSET = 14
PAGE = 16384

MODEL = UUID("df52dc86-1789-4ed0-a295-66f10508145b").bytes
APPLE_GPU = UUID("229177a8-5775-4268-bfd8-d588b351c56d").bytes
TIKTOKEN = UUID("7401aded-2a95-40cb-b782-9ccebaafe72b").bytes
SPECIALS = {
    2: UUID("07d7da55-b346-4cff-8b37-7cefacf8a3e8").bytes,  # untrusted
    4: UUID("f799ff69-1992-43c4-a3d8-d831f475dc75").bytes,  # return
    5: UUID("c0bb14c7-6022-49da-ad08-792d67e8b470").bytes,  # constrain
    7: UUID("fd3dda11-c8ab-4033-876e-d93deb172c93").bytes,  # channel
    8: UUID("55a77c2f-8a01-4c54-8ac2-313bfc7e208d").bytes,  # start
    9: UUID("fcac2f6d-4705-4f6b-b228-642accac7238").bytes,  # end
    10: UUID("16e40431-f47f-4b22-b59b-8b278fc30a54").bytes,  # message
    14: UUID("1220f796-e388-4de5-b487-fe2eb5fe03c0").bytes,  # call
    15: UUID("e15ba702-28c4-4292-ab8f-ffa434709128").bytes,  # refusal
}
"""Distance from the first special token -> UUID; the others are zeros."""

Part = tuple[str, int | None]
"""An original/ tensor, whole (its kept rows) or the slice of one expert."""


def items(spec: Spec) -> Iterator[tuple[int, list[Part]]]:
    """The weights in file order: (alignment, parts that follow each other without padding)."""
    yield 16, [("embedding.weight", None)]
    for layer in range(spec.layers):
        b = f"block.{layer}."
        yield 16, [(b + "attn.norm.scale", None)]
        yield 16, [(b + "attn.qkv.weight", None), (b + "attn.qkv.bias", None)]
        yield 16, [(b + "attn.sinks", None)]
        yield 16, [(b + "attn.out.weight", None), (b + "attn.out.bias", None)]
        yield 16, [(b + "mlp.norm.scale", None)]
        yield 16, [(b + "mlp.gate.weight", None), (b + "mlp.gate.bias", None)]
    yield 16, [("norm.scale", None)]
    yield 16, [("unembedding.weight", None)]
    for layer in range(spec.layers):
        yield PAGE, []
        for expert in range(spec.experts):
            for matrix in ("mlp1", "mlp2"):
                for kind in ("_weight.blocks", "_weight.scales", "_bias"):
                    yield 16, [(f"block.{layer}.mlp.{matrix}{kind}", expert)]


def part_size(spec: Spec, entries: dict[str, st.Entry], part: Part) -> int:
    name, expert = part
    total = st.size(entries[name])
    if expert is not None:
        return total // spec.experts
    if "embedding" in name:
        return total // spec.vocab * (spec.text_tokens + KEPT_SPECIALS)
    return total


def offsets(spec: Spec, prefix: int) -> tuple[dict[Part, int], int]:
    """Where each part begins, and the file's size, when header and tokenizer take `prefix` bytes."""
    entries = original_entries(spec)
    result: dict[Part, int] = {}
    at = prefix + -prefix % PAGE
    for alignment, parts in items(spec):
        at += -at % alignment
        for part in parts:
            result[part] = at
            at += part_size(spec, entries, part)
    return result, at


def prefix_size(tokens_bytes: int) -> int:
    """Bytes of header and tokenizer; `tokens_bytes` counts each token's two length bytes."""
    return 148 + 16 * KEPT_SPECIALS + len(SPLIT) + 1 + tokens_bytes


def header(spec: Spec) -> bytes:
    """The first 116 bytes: magic, model description, layout."""
    low, high = (
        spec.head_dim / 2 * math.log(spec.initial_context / (beta * 2 * math.pi)) / math.log(spec.rope_theta)
        for beta in (spec.beta_fast, spec.beta_slow)
    )
    counts = (
        int(spec.initial_context * spec.rope_factor),
        spec.layers,
        spec.experts,
        spec.experts_per_token,
        spec.hidden,
        spec.intermediate,
    )
    attention = (spec.head_dim, spec.heads, spec.kv_heads, spec.sliding_window)
    rope = (
        spec.rope_theta,
        1 / spec.rope_factor,
        -low / (high - low),
        1 / (high - low),
        0.1 * math.log(spec.rope_factor) + 1,
        spec.rms_eps,
    )
    numbers = (
        struct.pack("<6I", *counts) + struct.pack("<f", spec.swiglu_limit) + struct.pack("<4I6f", *attention, *rope)
    )
    return b"GPT-OSS v1.0" + bytes(4) + MODEL + numbers + APPLE_GPU


def tokenizer_section(tokens: tuple[bytes, ...]) -> bytes:
    listed = b"".join(struct.pack("<H", len(token)) + token for token in tokens)
    specials = b"".join(SPECIALS.get(i, bytes(16)) for i in range(KEPT_SPECIALS))
    split = SPLIT.encode("ascii") + b"\0"
    return (
        TIKTOKEN + struct.pack("<4I", KEPT_SPECIALS, len(tokens), len(split), len(listed)) + specials + split + listed
    )


def rotated(spec: Spec, qkv: torch.Tensor) -> torch.Tensor:
    """q and k rows of each head brought from (first half, second half) to adjacent pairs; q halved, k quartered."""
    result = qkv.clone()
    half = spec.head_dim // 2
    for head in range(spec.heads + spec.kv_heads):
        first = head * spec.head_dim
        factor = 0.5 if head < spec.heads else 0.25
        for i in range(half):
            for j in range(2):
                result[first + 2 * i + j] = qkv[first + half * j + i] * factor
    return result


def part_bytes(model: Model, part: Part) -> torch.Tensor:
    name, expert = part
    tensor = model.tensors[name]
    if expert is not None:
        tensor = tensor[expert]
        if name.endswith("scales"):
            tensor = tensor + SCALE_OFFSET  # uint8: wraps, as the release's script does
    elif "embedding" in name:
        tensor = tensor[: model.spec.text_tokens + KEPT_SPECIALS]
    elif "attn.qkv" in name:
        tensor = rotated(model.spec, tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_metal(model: Model, path: Path) -> None:
    """Write model.bin. The factors of q and k are fixed by the format, so only head_dim 64 means the same model."""
    if model.spec.head_dim != 64:
        raise ValueError("model.bin exists only for head_dim 64")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header(model.spec))
        file.write(tokenizer_section(small_vocabulary(model.spec.text_tokens)))
        file.write(bytes(-file.tell() % PAGE))
        for alignment, parts in items(model.spec):
            file.write(bytes(-file.tell() % alignment))
            for part in parts:
                file.write(part_bytes(model, part).numpy().data)

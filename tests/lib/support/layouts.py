"""Every layout that is read, by name, and how to write a model in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.checkpoints import (
    Model,
    write_bf16,
    write_bf16_bug,
    write_gguf,
    write_hf,
    write_metal,
    write_original,
    write_per_expert,
    write_unsloth_linear,
)
from support.gguf_files import fuse_qkv

LAYOUTS: dict[str, Callable[[Model, Path], object]] = {
    "hf": lambda model, folder: write_hf(model, folder, shard_limit=200_000),
    "original": lambda model, folder: write_original(model, folder / "original"),
    "original split": lambda model, folder: write_original(model, folder / "original", shards=3),
    "metal": lambda model, folder: write_metal(model, folder / "model.bin"),
    "bf16": lambda model, folder: write_bf16(model, folder, rope="parameters"),
    "bf16 of transformers 4": lambda model, folder: write_bf16(model, folder, rope="scaling", with_dtype=False),
    "bf16 misnamed": write_bf16_bug,
    "linearised": write_unsloth_linear,
    "per expert": lambda model, folder: write_per_expert(model, folder, meaning="deinterleaved"),
    "per expert, halves": lambda model, folder: write_per_expert(model, folder, meaning="halves"),
    "gguf": lambda model, folder: write_gguf(model, folder / "model.gguf"),
    "gguf, f16 and f32": lambda model, folder: write_gguf(model, folder / "model.gguf", dense="f16", experts="f32"),
    "gguf split": lambda model, folder: write_gguf(model, folder / "model.gguf", split=17),
    "gguf, fused qkv": lambda model, folder: fuse_qkv(
        *write_gguf(model, folder / "unfused.gguf"), folder / "fused.gguf"
    ),
}
INSIDE = {"original": "original", "original split": "original", "metal": "model.bin"}


def write_layout(name: str, model: Model, folder: Path) -> Path:
    """Write the model in one layout below `folder`; returns what to open."""
    LAYOUTS[name](model, folder / name)
    return folder / name / INSIDE.get(name, "")


def written(model: Model, folder: Path) -> dict[str, Path]:
    """The model in every layout: name → what to open."""
    return {name: write_layout(name, model, folder) for name in LAYOUTS}

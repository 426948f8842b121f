"""One small model in every layout, its tokens and what transformers says of it: made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from end_to_end.judges import TEXT, convert, in_transformers
from support.checkpoints import (
    STEADY,
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
from support.tokenizer import small_tokenizer
from tokenizers import Tokenizer

SOURCES: dict[str, Callable[[Model, Path], object]] = {
    "hf": write_hf,
    "original": write_original,
    "bf16": write_bf16,
    "bf16-misnamed": write_bf16_bug,
    "linearised": write_unsloth_linear,
    "per-expert": write_per_expert,
    "halves": lambda model, folder: write_per_expert(model, folder, meaning="halves"),
    "metal": lambda model, folder: write_metal(model, folder / "model.bin"),
    "gguf": lambda model, folder: write_gguf(model, folder / "model.gguf"),
}


@pytest.fixture(scope="session")
def steady() -> Model:
    """A model whose small errors stay small: all experts are always taken, and llama.cpp rounds none of its numbers."""
    return Model(STEADY)


@pytest.fixture(scope="session")
def sources(steady: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in each layout, by name."""
    folder = tmp_path_factory.mktemp("sources")
    for name, write in SOURCES.items():
        write(steady, folder / name)
    small_tokenizer(folder / "original", STEADY.vocab, STEADY.spare_rows)
    return folder


@pytest.fixture(scope="session")
def ids(sources: Path) -> list[int]:
    """The tokens of TEXT."""
    return list(Tokenizer.from_file(str(sources / "hf" / "tokenizer.json")).encode(TEXT).ids)


@pytest.fixture(scope="session")
def logits(sources: Path, ids: list[int]) -> torch.Tensor:
    """What transformers computes of the source, float32 [T, V]."""
    return in_transformers(sources / "hf", ids)


@pytest.fixture(scope="session")
def gguf_file(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's layout converted with default options."""
    return convert(sources / "hf", tmp_path_factory.mktemp("gguf") / "model.gguf", "gguf")

"""One small model in every layout, its tokens and what transformers says of it: made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    SMALL,
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
from support.judges import TEXT, convert, in_transformers
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


def write_sources(model: Model, folder: Path) -> Path:
    """The model in each layout, by name."""
    for name, write in SOURCES.items():
        write(model, folder / name)
    small_tokenizer(folder / "original", model.spec.vocab, model.spec.spare_rows)
    return folder


@pytest.fixture(scope="session")
def sources(steady: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `steady` in each layout."""
    return write_sources(steady, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def small_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in each layout that says of YaRN what the release says, which every layout can express."""
    return write_sources(Model(SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def ids(sources: Path) -> list[int]:
    """The tokens of TEXT."""
    return list(Tokenizer.from_file(str(sources / "hf" / "tokenizer.json")).encode(TEXT).ids)


@pytest.fixture(scope="session")
def logits(sources: Path, ids: list[int]) -> torch.Tensor:
    """What transformers computes of `steady`, float32 [T, V]."""
    return in_transformers(sources / "hf", ids)


@pytest.fixture(scope="session")
def small_logits(small_sources: Path, ids: list[int]) -> torch.Tensor:
    """What transformers computes of the model in `small_sources`, float32 [T, V]."""
    return in_transformers(small_sources / "hf", ids)


@pytest.fixture(scope="session")
def gguf_file(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's layout converted with default options."""
    return convert(sources / "hf", tmp_path_factory.mktemp("gguf") / "model.gguf", "gguf")

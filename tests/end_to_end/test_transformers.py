"""Written folders in real transformers: `from_pretrained` finds every key, and the logits are the source's bit by bit.

Bit by bit because the weights that it loads are the same numbers and the arithmetic is the same code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import SMALL
from support.judges import convert, in_transformers

SOURCES = ["hf", "original", "bf16", "bf16-misnamed", "linearised", "per-expert", "halves", "gguf/model.gguf"]


def options(name: str) -> list[str]:
    """What a source needs to be understood."""
    return ["--gate-proj", "halves"] if name == "halves" else []


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("to", ["hf", "bf16"])
def test_written_folder_computes_the_same_logits(
    name: str, to: str, small_sources: Path, ids: list[int], small_logits: torch.Tensor, tmp_path: Path
) -> None:
    folder = convert(small_sources / name, tmp_path / "out", to, *options(name))
    assert torch.equal(in_transformers(folder, ids), small_logits)


def test_original_folder_and_back(
    small_sources: Path, ids: list[int], small_logits: torch.Tensor, tmp_path: Path
) -> None:
    """transformers does not read original/, so it is read back as HF."""
    original = convert(small_sources / "hf", tmp_path / "original", "original")
    folder = convert(original, tmp_path / "hf", "hf", "--tokenizer", str(small_sources / "hf"))
    assert torch.equal(in_transformers(folder, ids), small_logits)


def test_metal_keeps_all_but_the_rows_without_a_token(
    small_sources: Path, ids: list[int], small_logits: torch.Tensor, tmp_path: Path
) -> None:
    folder = convert(small_sources / "metal" / "model.bin", tmp_path / "hf", "hf")
    assert torch.equal(in_transformers(folder, ids), small_logits[:, : SMALL.text_tokens + 16])


def test_split_folder_is_the_same_model(
    small_sources: Path, ids: list[int], small_logits: torch.Tensor, tmp_path: Path
) -> None:
    folder = convert(small_sources / "hf", tmp_path / "out", "hf", "--split-size", "200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(in_transformers(folder, ids), small_logits)

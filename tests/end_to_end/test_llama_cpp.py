"""Converted GGUFs in real llama.cpp, against the source in real transformers.

How near the two can come is llama.cpp's own rounding. With float32 weights both compute in single precision and only the
order of sums differs: 2e-5 in a log-probability was measured, 1e-4 is allowed. With any other weights llama.cpp rounds the
activations it multiplies them with: to eight bits for MXFP4, Q8_0 and Q5_0 (KL 8e-4 on average and 2e-3 at most were
measured), to bfloat16 for BF16 (1e-4, 3e-4). A conversion that is wrong anywhere gives a KL of the order of 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import AWKWARD, STEADY, Model, write_hf
from support.judges import convert, divergence, in_llama, log_softmax

SINGLE = 1e-4
EIGHT_BITS, EIGHT_BITS_AT_MOST = 2e-3, 1e-2


@pytest.fixture(scope="module")
def default(gguf_file: Path, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the default conversion: experts MXFP4, the rest BF16 and F32."""
    return in_llama(gguf_file, ids)


def test_default_conversion_agrees_within_the_rounding_of_activations(
    default: np.ndarray, logits: torch.Tensor
) -> None:
    kl = divergence(log_softmax(logits), default)
    assert kl.mean() < EIGHT_BITS
    assert kl.max() < EIGHT_BITS_AT_MOST


@pytest.mark.parametrize("through_gguf", [False, True], ids=["from hf", "from our mxfp4 gguf"])
def test_float32_gguf_agrees_to_the_last_digits(
    through_gguf: bool, sources: Path, gguf_file: Path, ids: list[int], logits: torch.Tensor, tmp_path: Path
) -> None:
    """Through our own MXFP4 file as well: so its very values, not only its rough behaviour, are the source's."""
    source = gguf_file if through_gguf else sources / "hf"
    path = convert(source, tmp_path / "f32.gguf", "gguf", "--experts", "f32", "--dense", "f32")
    assert np.abs(in_llama(path, ids) - log_softmax(logits)).max() < SINGLE


def test_awkward_mxfp4_groups_agree_to_the_last_digits(tmp_path: Path, ids: list[int]) -> None:
    """Negative zeros, scale byte 0, blocks of zeros, all sixteen codes, scales far apart."""
    model = Model(STEADY, awkward=AWKWARD)
    write_hf(model, tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "f32.gguf", "gguf", "--experts", "f32", "--dense", "f32")
    assert np.abs(in_llama(path, ids) - log_softmax(model.logits(ids))).max() < SINGLE


@pytest.mark.parametrize("codec", ["q8_0", "q5_0"])
def test_experts_transcoded_exactly_run_like_mxfp4(
    codec: str, sources: Path, ids: list[int], default: np.ndarray, tmp_path: Path
) -> None:
    """The values are MXFP4's and llama.cpp rounds the activations alike, so only the order of sums may differ."""
    path = convert(sources / "hf", tmp_path / "model.gguf", "gguf", "--experts", codec)
    assert np.abs(in_llama(path, ids) - default).max() < SINGLE


@pytest.mark.parametrize(
    ("experts", "dense", "mean", "most"),
    [("bf16", "bf16", 5e-4, 2e-3), ("f16", "f16", 1e-4, 1e-3), ("mxfp4", "q8_0", 1e-2, 5e-2)],
)
def test_other_codecs_agree_within_their_rounding(
    experts: str,
    dense: str,
    mean: float,
    most: float,
    sources: Path,
    ids: list[int],
    logits: torch.Tensor,
    tmp_path: Path,
) -> None:
    """--dense q8_0 rounds the weights themselves to eight bits."""
    path = convert(sources / "hf", tmp_path / "model.gguf", "gguf", "--experts", experts, "--dense", dense)
    kl = divergence(log_softmax(logits), in_llama(path, ids))
    assert kl.mean() < mean
    assert kl.max() < most


@pytest.mark.parametrize(
    "name", ["original", "bf16", "bf16-misnamed", "linearised", "per-expert", "halves", "gguf/model.gguf"]
)
def test_every_source_gives_the_same_distributions(
    name: str, sources: Path, ids: list[int], default: np.ndarray, tmp_path: Path
) -> None:
    """bfloat16 experts that came out of MXFP4 go back into it unchanged, so llama.cpp does the very same arithmetic."""
    options = ["--experts", "mxfp4", "--dense", "bf16"]
    options += ["--gate-proj", "halves"] if name == "halves" else []
    path = convert(sources / name, tmp_path / "model.gguf", "gguf", *options)
    assert np.array_equal(in_llama(path, ids), default)


def test_metal_gives_the_same_distributions_over_the_tokens_it_keeps(
    sources: Path, ids: list[int], default: np.ndarray, tmp_path: Path
) -> None:
    path = convert(sources / "metal" / "model.bin", tmp_path / "model.gguf", "gguf")
    kept = default[:, : STEADY.text_tokens + 16]
    kept = kept - np.log(np.exp(kept).sum(-1, keepdims=True))
    assert np.abs(in_llama(path, ids) - kept).max() < SINGLE


def test_split_gguf_is_the_same_model(sources: Path, ids: list[int], default: np.ndarray, tmp_path: Path) -> None:
    folder = convert(sources / "hf", tmp_path / "parts", "gguf", "--split-size", "200KB")
    parts = sorted(folder.glob("parts-*-of-*.gguf"))
    assert len(parts) > 2
    assert np.array_equal(in_llama(parts[0], ids), default)


def test_a_round_trip_is_the_same_model(gguf_file: Path, ids: list[int], default: np.ndarray, tmp_path: Path) -> None:
    """GGUF → HF → bfloat16 → GGUF."""
    hf = convert(gguf_file, tmp_path / "hf", "hf")
    bf16 = convert(hf, tmp_path / "bf16", "bf16")
    back = convert(bf16, tmp_path / "back.gguf", "gguf", "--experts", "mxfp4")
    assert np.array_equal(in_llama(back, ids), default)

"""How a result is judged: converted by the public command, run by real transformers and real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from support.llama import load

from gptoss_convert.cli import cli

F64 = NDArray[np.float64]

TEXT = "The weights of a model are numbers. def f(x):\n    return {'layers': 24}  # 你好 🙂 2025"


def convert(source: Path, target: Path, to: str, *options: str) -> Path:
    """`gptoss-convert convert`, in this process; returns the target."""
    cli.main(["convert", str(source), str(target), "--to", to, *options], standalone_mode=False)
    return target


def in_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] of a folder as `from_pretrained` loads it; every key of model and file must meet the other."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    packed = "quantization_config" in (folder / "config.json").read_text()
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **quantization
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits: torch.Tensor = model.float()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def in_llama(path: Path, ids: list[int]) -> F64:
    """Log-probabilities [T, V] in llama.cpp."""
    with load(path) as llama:
        return llama.logprobs(ids).astype(np.float64)


def log_softmax(logits: torch.Tensor) -> F64:
    """Logits [T, V] → log-probabilities."""
    result: F64 = logits.double().log_softmax(-1).numpy()
    return result


def divergence(want: F64, got: F64) -> F64:
    """KL(want ‖ got) in nats after each token, [T]."""
    result: F64 = (np.exp(want) * (want - got)).sum(-1)
    return result

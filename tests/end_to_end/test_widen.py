"""Native and widened files of one model in llama.cpp: the same function, within what its kernels round.

With float32 weights the two agree to float32's summation (measured: mean KL divergence 1e-9, log-probabilities to 9e-6). With
MXFP4 experts llama.cpp rounds activations to int8 in blocks of 32, which the added columns do not disturb where the widths are
multiples of 32 (measured: 5e-5 at most).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import STEADY, Model, write_hf
from support.llama import load

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.progress import silent

IDS = [int(i) for i in np.random.default_rng(1).integers(0, 300, 32)]


@pytest.mark.parametrize(("experts", "dense", "bound"), [("f32", "f32", 1e-6), ("mxfp4", "bf16", 1e-3)])
def test_the_widened_file_computes_what_the_native_one_computes(
    tmp_path: Path, experts: str, dense: str, bound: float
) -> None:
    write_hf(Model(STEADY), tmp_path / "source")
    options = Options(to="gguf", experts=experts, dense=dense)
    convert(tmp_path / "source", tmp_path / "native.gguf", options, silent)
    convert(tmp_path / "source", tmp_path / "wide.gguf", replace(options, widen="256x128"), silent)
    found = []
    for name in ("native", "wide"):
        with load(tmp_path / f"{name}.gguf") as llama:
            found.append(llama.logprobs(IDS))
    divergence = (np.exp(found[0]) * (found[0] - found[1])).sum(-1)
    assert divergence.mean() < bound

"""The trained small model, rounded by GPTQ: real llama.cpp computes from the file what our own forward pass does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import llama

from gptoss_convert.convert.calibration import Wish
from gptoss_convert.convert.compare import compare
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.forward import Walk, Weights
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.texts import read_texts

TRAINED = Path(__file__).parents[1] / "data" / "trained"
TOKENS = 20480


def made(folder: Path, method: str, name: str = "q3_k_s") -> Path:
    target = folder / f"{method}.gguf"
    wish = Wish() if method == "round" else Wish(method, str(TRAINED / "calibration.txt"), context=512, tokens=TOKENS)
    convert(TRAINED, target, Options(to="gguf", type=name, rounding=wish, allow_larger=True), silent)
    return target


def divergence(artifact: Path) -> float:
    with open_source(TRAINED) as source, open_source(artifact) as found:
        texts = read_texts(TRAINED / "heldout.txt", source, 512, 4096)
        return float(compare(source, found, texts, context=512, show=silent)["text"]["kld"]["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q3_k_s", "iq3_xxs"])
def test_on_a_trained_model_gptq_is_nearer_than_importance_and_llama_cpp_runs_the_file(
    tmp_path: Path, name: str
) -> None:
    files = {method: made(tmp_path, method, name) for method in ("round", "importance", "gptq")}
    distances = {method: divergence(path) for method, path in files.items()}
    assert distances["importance"] < 0.95 * distances["round"]
    assert distances["gptq"] < 0.75 * distances["importance"]
    with open_source(files["gptq"]) as source:
        ids = read_texts(TRAINED / "heldout.txt", source, 64, 64).sequences[0]
        walk = Walk(Weights(source), [ids])
        walk.run()
        ours = walk.logits(torch.arange(len(ids))).log_softmax(-1).numpy()
    with llama.load(files["gptq"]) as runtime:
        theirs = runtime.logprobs(ids[:24].tolist())
    kld = (np.exp(ours[:24]) * (ours[:24] - theirs)).sum(axis=1)
    # llama.cpp rounds activations to 8 bits for these types, and YaRN's bounds to whole dimensions.
    assert kld.mean() < 0.1 * distances["gptq"] + 2e-3
    assert (ours[:24].argmax(1) == theirs.argmax(1)).mean() > 0.9


def test_the_trained_model_is_natively_mxfp4_and_unevenly_routed() -> None:
    with open_source(TRAINED) as source:
        assert {v.encoding for n, v in source.views.items() if n.endswith(("gate_up_proj", "down_proj"))} == {"mxfp4"}
        assert source.config.layers >= 3
        assert source.config.experts >= 12
        for width in (source.config.hidden, source.config.intermediate):
            assert width % 32 == 0 < width % 256
        walk = Walk(Weights(source), read_texts(TRAINED / "heldout.txt", source, 512, 4096).sequences)
        walk.run()
        scores = walk.logits(torch.arange(0, 511)).log_softmax(-1)
        surprise = -scores.gather(1, walk.ids[1:512, None])[:, 0].mean()
    assert surprise < 4.0  # 7.3 is to know nothing
    load = torch.bincount(walk.experts.reshape(-1), minlength=12).double()  # of the last layer
    assert load.max() > 1.5 * load.median() > 0
    assert sum(p.stat().st_size for p in TRAINED.iterdir()) < 15_000_000

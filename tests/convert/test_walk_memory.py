"""Memory of the torch forward: forecast, measured on the true widths, and held under 8 GiB for gpt-oss-120b."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import TRUE_LAYER, Model, write_hf
from support.sparse import write_sparse_layers

from gptoss_convert.config import release_config
from gptoss_convert.convert import walk_memory
from gptoss_convert.convert.calibration import CONTEXT, TOKENS
from gptoss_convert.convert.walk_memory import walk_bytes
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels import products

GIB = 1 << 30

BEGIN = """
import json, re, resource, sys
from pathlib import Path

# Enforced by the kernel, on top of being measured: private memory beyond this is refused.
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
import numpy as np
from gptoss_convert.convert.source import open_source

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""

FORWARD = (
    BEGIN
    + """
import torch
from gptoss_convert.convert.forward import Walk, Weights
random = np.random.default_rng(0)
texts = [random.integers(0, 199000, 2048).astype(np.int32) for _ in range(2)]
with open_source(Path(sys.argv[1])) as source:
    walk = Walk(Weights(source), texts)
    walk.run()
    logits = walk.logits(torch.arange(300))
print(json.dumps({"peak": peak(), "shape": list(logits.shape), "finite": bool(logits.isfinite().all())}))
"""
)

COMMAND = (
    BEGIN
    + """
from gptoss_convert.cli import cli
try:
    cli.main(args=sys.argv[1:], standalone_mode=False)
finally:
    print(json.dumps({"peak": peak()}))
"""
)


def run(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (36, 128)])
def test_no_pass_of_a_release_is_forecast_to_need_8_gib(layers: int, experts: int) -> None:
    config = release_config(layers, experts)
    for more in ({}, {"hessians": True}, {"gptq": True}, {"sides": 2}):
        for context in (512, CONTEXT, 8192):
            assert walk_bytes(config, TOKENS, context, **more) < 8 * GIB  # type: ignore[arg-type]


def test_a_million_tokens_need_no_more_than_the_default_but_for_their_ids() -> None:
    config = release_config(36, 128)
    assert walk_bytes(config, 1_000_000, CONTEXT) - walk_bytes(config, TOKENS, CONTEXT) < 100 * 1_000_000


def test_the_forecast_knows_the_bound_of_attentions_scores() -> None:
    assert walk_memory.SCORES_AT_ONCE == maths.SCORES_AT_ONCE
    assert walk_memory.MOST_THREADS == products.MOST_THREADS


@pytest.mark.slow
def test_layers_of_120b_run_in_8_gib_and_in_what_was_forecast(tmp_path: Path) -> None:
    write_sparse_layers(2, 128, tmp_path / "sparse")
    found = run(FORWARD, tmp_path / "sparse")
    assert found["shape"] == [300, 201088]
    assert found["finite"]
    assert found["peak"] <= walk_bytes(release_config(2, 128), 4096, 2048)


@pytest.mark.slow
def test_calibration_and_gptq_of_a_true_layer_need_no_more_than_forecast(tmp_path: Path) -> None:
    model = Model(replace(TRUE_LAYER, experts=1, experts_per_token=1))
    write_hf(model, tmp_path / "source")
    (tmp_path / "text.txt").write_text("The weights of a model are numbers, and they move from file to file.\n" * 60)
    common = ("--context", 512, "--tokens", 512)
    config = replace(release_config(1, 1), vocab=TRUE_LAYER.vocab)
    found = run(
        COMMAND, "calibrate", tmp_path / "source", tmp_path / "s.gguf", "--text", tmp_path / "text.txt",
        "--hessians", tmp_path / "h", *common,
    )  # fmt: skip
    assert found["peak"] <= walk_bytes(config, 512, 512, hessians=True)
    found = run(
        COMMAND, "convert", tmp_path / "source", tmp_path / "q.gguf", "--to", "gguf", "--type", "q4_0", "--allow-larger",
        "--no-proof", "--method", "gptq", "--calibration", tmp_path / "text.txt", *common,
    )  # fmt: skip
    assert found["peak"] <= walk_bytes(config, 512, 512, gptq=True)

"""One layer of the released width as an ONNX folder: its logits, and the memory that writing it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import TRUE_LAYER, Model, write_bf16, write_hf
from support.onnx_runtime import logits

from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.dry_run import foresee

MIB = 1 << 20
IDS = [int(i) for i in np.random.default_rng(2).integers(0, 360, 150)]  # the window is 128

COMMAND = """
import json, re, sys
from pathlib import Path
from gptoss_convert.cli import cli
cli.main(args=["convert", *sys.argv[1:], "--json"], standalone_mode=False)
print(json.dumps(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024))
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TRUE_LAYER)


@pytest.fixture(scope="module")
def sources(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hf/: as released; bf16/: the same values as fused floats, which are read a whole expert at a time."""
    folder = tmp_path_factory.mktemp("true")
    write_hf(model, folder / "hf")
    write_bf16(model, folder / "bf16")
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "experts", "dense"), [("hf", "mxfp4", "f32"), ("hf", "int4", "int4"), ("bf16", "int8", "int8")]
)
def test_a_true_layer_is_written_in_less_memory_than_forecast(
    sources: Path, tmp_path: Path, source: str, experts: str, dense: str
) -> None:
    given = [str(sources / source), str(tmp_path / "onnx"), "--to", "onnx", "--experts", experts, "--dense", dense]
    forecast = foresee(sources / source, tmp_path / "onnx", Options(to="onnx", experts=experts, dense=dense, threads=2))
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *given, "--threads", "2"], capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak <= forecast["peak_memory_bytes"]
    assert peak < 1024 * MIB


@pytest.mark.slow
def test_a_true_layer_computes_what_transformers_computes(
    model: Model, sources: Path, tmp_path: Path, convert: object
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert callable(convert)
    convert(sources / "hf", tmp_path / "onnx", "onnx")
    got = logits(tmp_path / "onnx", IDS, 120)
    want = np.asarray(model.logits(IDS).numpy())
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()

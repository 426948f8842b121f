"""The folders of onnxruntime-genai's own builder beside ours: the same initializers, where ours does not mean to be better."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoints import SMALL, Model, write_hf
from support.onnx_runtime import initializers

Tensors = dict[str, NDArray[Any]]
NEEDS = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "accelerate")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the builder needs {', '.join(MISSING)}")
CACHES = {"cos_cache", "sin_cache"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release's layout, with blocks of zeros and other rare ones left out: experts as a training leaves them."""
    folder = tmp_path_factory.mktemp("builder") / "hf"
    write_hf(Model(SMALL), folder)
    return folder


def built(source: Path, folder: Path, precision: str) -> Tensors:
    """The builder's initializers, without its constants."""
    command = [
        sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder),
        "-p", precision, "-e", "cpu", "-c", str(folder.parent / "cache"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return initializers(folder)


def ours(source: Path, folder: Path, convert: Any, **options: Any) -> Tensors:
    convert(source, folder, "onnx", **options)
    return {name: value for name, value in initializers(folder).items() if not name.startswith("/model/constants/")}


def differing(theirs: Tensors, mine: Tensors) -> set[str]:
    assert theirs.keys() == mine.keys()
    return {
        name for name, value in theirs.items()
        if value.shape != mine[name].shape or value.dtype != mine[name].dtype or value.tobytes() != mine[name].tobytes()
    }  # fmt: skip


def test_int4_initializers_are_the_builders(source: Path, tmp_path: Path, convert: Any) -> None:
    """All 60 but the rotary tables, whose last place is torch's there (see kernels/rotary.py)."""
    theirs = built(source, tmp_path / "theirs", "int4")
    mine = ours(source, tmp_path / "ours", convert, experts="int4", dense="int4")
    assert len(theirs) == 60
    assert differing(theirs, mine) <= CACHES
    for name in CACHES:
        assert (theirs[name] == mine[name]).mean() > 0.95
        assert np.abs(theirs[name] - mine[name]).max() < 1.2e-7


def test_int8_initializers_are_the_builders_but_for_experts_which_are_exact(
    source: Path, tmp_path: Path, convert: Any
) -> None:
    theirs = built(source, tmp_path / "theirs", "int8")
    mine = ours(source, tmp_path / "ours", convert, experts="int8", dense="int8")
    changed = differing(theirs, mine) - CACHES
    assert changed == {name for name in theirs if name.endswith((".qweight", "_proj.scales"))}
    error, size = 0.0, 0.0
    for name in (name for name in changed if name.endswith(".qweight")):
        a, b = (_values(tensors, name) for tensors in (theirs, mine))
        error, size = error + float(np.square(a - b).sum()), size + float(np.square(b).sum())
    assert 0.003 < (error / size) ** 0.5 < 0.006  # what the builder loses of MXFP4; ours holds its very values


def _values(tensors: Tensors, name: str) -> NDArray[np.float64]:
    scales = tensors[name.replace("qweight", "scales")].astype(np.float64)
    codes = tensors[name].astype(np.float64) - 128
    found: NDArray[np.float64] = codes.reshape(*scales.shape, 32) * scales[..., None]
    return found

"""Integer folders in vLLM's own gpt-oss class and weight loader, where a vLLM is at hand: VLLM_PYTHON names its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.judges import convert

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_loader.py"
PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed, and VLLM_PYTHON names no interpreter that has it")
@pytest.mark.parametrize("to", ["int4", "int8", "int8-g32"])
def test_every_parameter_of_vllms_model_is_the_files(to: str, small_sources: Path, tmp_path: Path) -> None:
    folder = convert(small_sources / "hf", tmp_path / to, to)
    command = [str(PYTHON), "-P", str(SCRIPT), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "experts.routed_experts.w13_bias" in result.stdout
    assert "DIFFERENT" not in result.stdout

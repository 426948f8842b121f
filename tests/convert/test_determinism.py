"""The same input and options give the same bytes, certificate included, whatever machine, place or number of threads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import SMALL, Model, write_bf16

RUNS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("exact", "m.gguf", "gguf", {}),
    ("exact", "bf16", "bf16", {"split_bytes": 300_000}),
    ("noisy", "lossy.gguf", "gguf", {"experts": "mxfp4", "dense": "q8_0"}),
    ("noisy", "hf", "hf", {}),
    ("exact", "onnx", "onnx", {}),
    ("noisy", "onnx-rounded", "onnx", {"experts": "int8", "dense": "int4", "embedding": "int8"}),
]

DRIVER = """
import json, sys
from pathlib import Path
from gptoss_convert.convert import conversion
from gptoss_convert.convert.progress import silent


sources, target, threads, runs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
for source, name, to, more in runs:
    conversion.convert(sources / source, target / name, conversion.Options(to, threads=threads, **more), silent)
"""


@pytest.fixture(scope="module")
def sources(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """exact/: as released. noisy/: bf16 experts that MXFP4 does not hold."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(hf_folder, folder / "exact")
    write_bf16(Model(SMALL), folder / "noisy")
    generator = torch.Generator().manual_seed(1)
    for path in (folder / "noisy").glob("*.safetensors"):
        tensors = load_file(path)
        noisy = {n: t * (1 + 0.1 * torch.randn(t.shape, generator=generator)) for n, t in tensors.items()}
        save_file({n: t.to(torch.bfloat16) for n, t in noisy.items()}, path, metadata={"format": "pt"})
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def reference(sources: Path, tmp_path_factory: pytest.TempPathFactory, convert: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reference")
    for source, name, to, options in RUNS:
        convert(sources / source, folder / name, to, threads=1, **options)
    found = digests(folder)
    assert {"m.gguf.certificate.json", "bf16/gptoss-certificate.json", "hf/gptoss-certificate.json"} <= found.keys()
    lossy = json.loads((folder / "lossy.gguf.certificate.json").read_text())
    assert 0 < lossy["proof"]["worst_expert_output_error"] < 0.5
    return found


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_nothing(
    threads: int, sources: Path, reference: Any, tmp_path: Path, convert: Any
) -> None:
    for source, name, to, options in RUNS:
        convert(sources / source, tmp_path / name, to, threads=threads, **options)
    assert digests(tmp_path) == reference


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "a seed of hashing and C": {"PYTHONHASHSEED": "1", "LC_ALL": "C", "OPENBLAS_NUM_THREADS": "1"},
    "another seed and Turkish": {
        "PYTHONHASHSEED": "4242",
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "Pacific/Apia",
        "COLUMNS": "20",
    },
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_neither_environment_nor_place_nor_time_changes_anything(
    name: str, sources: Path, reference: Any, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where" / "ü-7B"
    shutil.copytree(sources, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (tmp_path / "out").mkdir()
    command = [
        sys.executable,
        "-P",
        "-c",
        DRIVER,
        os.path.relpath(elsewhere, tmp_path / "out"),
        ".",
        "3",
        json.dumps(RUNS),
    ]
    subprocess.run(command, cwd=tmp_path / "out", env=os.environ | ENVIRONMENTS[name], check=True, timeout=120)
    assert digests(tmp_path / "out") == reference


def test_going_over_a_split_source_is_going_over_a_whole_one(
    sources: Path, reference: Any, tmp_path: Path, convert: Any
) -> None:
    """Shards are another input, so the certificate differs; the artifact may not."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "whole"
    shutil.copytree(sources / "exact", folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "m.gguf", "gguf")
    assert hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest() == reference["m.gguf"]

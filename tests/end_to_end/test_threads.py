"""What is computed with torch has the same bytes for any number of threads, whatever the environment asks torch to take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINED = Path(__file__).resolve().parent.parent / "data" / "trained"
CALIBRATED = ("--calibration", str(TRAINED / "calibration.txt"), "--tokens", "1500", "--context", "300")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("calibrate", ("s.gguf", "--text", *CALIBRATED[1:], "--hessians", "h")),
        ("convert", ("q.gguf", "--to", "gguf", "--type", "q4_0", "--allow-larger", "--method", "gptq", *CALIBRATED)),
        ("convert", ("i.gguf", "--to", "gguf", "--type", "iq2_xs", "--method", "importance", *CALIBRATED)),
        ("convert", ("int4", "--to", "int4", "--method", "gptq", *CALIBRATED)),
    ],
)
def test_threads_change_no_byte(verb: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    made = []
    for threads in (1, 2, 3):
        folder = tmp_path / str(threads)
        folder.mkdir()
        environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL")}}
        command = [
            sys.executable,
            "-P",
            "-m",
            "gptoss_convert",
            verb,
            str(TRAINED),
            *arguments,
            "--threads",
            str(threads),
        ]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=600)
        made.append(files(folder))
    assert made[0].keys() == made[1].keys()
    for other in made[1:]:
        assert [name for name in made[0] if made[0][name] != other[name]] == []

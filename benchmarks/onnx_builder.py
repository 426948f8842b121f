"""MXFP4 → ONNX with int4 weights: ours beside onnxruntime-genai's builder, seconds and memory; and ours on the releases' shapes.

    python -P benchmarks/onnx_builder.py [--rounds N] [--dir FOLDER] [--patience SECONDS] [--releases FOLDER] [--json]

Layers of the release's width with a small vocabulary: one of 8 experts, four of 8, one of 32. Both sides write 4-bit experts and
4-bit matrices for processors, whole commands in processes of their own, rounds in turn. From one and four layers follows what
memory a further layer takes. Memory is the largest resident set, in which pages of mapped files count.

--releases FOLDER also writes the whole of 20b's shapes and two layers of 120b's, zeros for weights, vocabulary and proof
included, and tells our memory; FOLDER must have 20 GB. The builder is not run on these: it would need more than the machine has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from convert_speed import Quiet, Run, run, summary
from support.checkpoints import TRUE_LAYER, Model, write_hf
from support.sparse import write_sparse_layers

CASES = ((1, 8), (4, 8), (1, 32))  # layers, experts
PLAIN, PROVED, BUILDER = "ours, --no-proof", "ours, with proof", "the builder"
INT4 = ("--experts", "int4", "--dense", "int4")
RELEASES = {
    "20b, 24 layers, mxfp4 + f32": (24, 32, ()),
    "120b, 2 layers, mxfp4 + f32": (2, 128, ()),
    "120b, 2 layers, int8 + int8": (2, 128, ("--experts", "int8", "--dense", "int8", "--embedding", "int8")),
    "120b, 2 layers, int4 + int4": (2, 128, (*INT4, "--embedding", "int4")),
}


def ours(source: Path, target: Path, *options: str) -> list[str]:
    """Our command line."""
    return [sys.executable, "-P", "-m", "gptoss_convert", "convert", str(source), str(target), "--to", "onnx", *options]


def builder(source: Path, target: Path) -> list[str]:
    """The builder's."""
    given = ["-i", str(source), "-o", str(target), "-p", "int4", "-e", "cpu", "-c", str(target.parent / "cache")]
    return [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", *given]


def measure_beside(folder: Path, layers: int, experts: int, rounds: int, quiet: Quiet) -> dict[str, Any]:
    """The three sides on so many layers of so many experts."""
    source = folder / "source"
    spec = replace(TRUE_LAYER, layers=layers, experts=experts)
    write_hf(Model(spec), source)
    out = quiet.work / "out"
    actions: dict[str, Callable[[], Run]] = {
        PLAIN: lambda: run(ours(source, out, *INT4, "--no-proof")),
        PROVED: lambda: run(ours(source, out, *INT4)),
        BUILDER: lambda: run(builder(source, out)),
    }
    quiet.run(actions[PROVED])  # compiles the kernels
    taken: dict[str, list[Run]] = {side: [] for side in actions}
    for _ in range(rounds):
        for side, action in actions.items():
            taken[side].append(quiet.run(action))
    shutil.rmtree(source)
    parameters = spec.layers * experts * 3 * spec.hidden * spec.intermediate
    what = {"layers": layers, "experts": experts, "parameters": parameters}
    return {**what, **{side: summary(runs) for side, runs in taken.items()}}


def measure_releases(folder: Path) -> dict[str, Any]:
    """Our memory and seconds on the releases' shapes."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="onnx-builder-", dir=folder) as name:
        for what, (layers, experts, options) in RELEASES.items():
            source, target = Path(name) / "source", Path(name) / "out"
            write_sparse_layers(layers, experts, source)
            taken = run(ours(source, target, *options))
            size = sum(path.stat().st_size for path in target.iterdir())
            found[what] = {"bytes": size, **summary([taken])}
            shutil.rmtree(source)
            shutil.rmtree(target)
    return found


def measure(folder: Path, rounds: int, patience: float, releases: Path | None) -> dict[str, Any]:
    """All figures."""
    quiet = Quiet(folder / "work", patience)
    rows = [measure_beside(folder, layers, experts, rounds, quiet) for layers, experts in CASES]
    few, many = rows[:2]
    slope = {
        side: (many[side]["memory"] - few[side]["memory"]) / (many["parameters"] - few["parameters"])
        for side in (PLAIN, PROVED, BUILDER)
    }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "peer": f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}",
        "rounds": rounds,
        "rows": rows,
        "bytes_a_parameter": slope,
        "releases": {} if releases is None else measure_releases(releases),
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        f"{result['rounds']} rounds; {result['machine']}; peer: the builder of {result['peer']}",
        "",
        "| layers | experts | | wall median, s | CPU, s | peak resident, MB | others' share of the machine |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        lines += [
            f"| {row['layers']} | {row['experts']} | {side} | {row[side]['wall_median']:.1f} | {row[side]['cpu_median']:.1f} "
            f"| {row[side]['memory'] / 1e6:.0f} | {row[side]['others']:.0%} |"
            for side in (PLAIN, PROVED, BUILDER)
        ]
    last = result["rows"][-1]
    lines += ["", "| builder / ours, a layer of 32 experts | wall | CPU | memory |", "| --- | ---: | ---: | ---: |"]
    for side in (PLAIN, PROVED):
        ratios = [last[BUILDER][key] / last[side][key] for key in ("wall_median", "cpu_median", "memory")]
        lines.append(f"| {side} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    grown = ", ".join(f"{side} {value:.2f}" for side, value in result["bytes_a_parameter"].items())
    lines += ["", f"Memory that a further layer takes, bytes for each parameter of its experts: {grown}."]
    if result["releases"]:
        lines += [
            "",
            "| ours, zeros for weights | GB written | wall, s | peak resident, MB |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {what} | {row['bytes'] / 1e9:.2f} | {row['wall_median']:.0f} | {row['memory'] / 1e6:.0f} |"
            for what, row in result["releases"].items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    shared = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait, in all, for a quiet machine")
    parser.add_argument("--releases", type=Path, help="a folder with 20 GB for the releases' shapes")
    parser.add_argument("--json", action="store_true", help="one JSON document after the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnx-builder-", dir=options.dir) as name:
        result = measure(Path(name), options.rounds, options.patience, options.releases)
    print(markdown(result))
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

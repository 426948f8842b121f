"""What calibration and GPTQ cost: one layer with the release's matrices measured, 20b and 120b extrapolated from it.

    python -P benchmarks/calibration_cost.py [--device cpu] [--tokens A B] [--dir FOLDER] [--json]

The layer has 4 experts of the true shape (2880 × 5760 and 2880 × 2880), all of which every token takes, attention of the true
shape and a small vocabulary. Each command runs as a process of its own with two numbers of tokens, so that a cost splits into

    seconds = a · (matrices of experts) + b · (tokens · experts of a token)          processor seconds, for gptq with q4_k

from which a model of L layers, E experts, k of a token and N tokens costs L · (a · E + b · (N · k + others)) at this machine's
speed; others: E · max(0, 2 · C − N · k / E), what experts that are short take of the layer's other tokens if the router is even.
What is not the experts' (attention, embedding, head: under a tenth) is counted into both. Memory is the largest resident set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from convert_speed import run
from support.checkpoints import TRUE_LAYER, Model, write_hf

from gptoss_convert.quant.shrinkage import tokens_wanted

EXPERTS = 4
MODELS = {"gpt-oss-20b": (24, 32, 4), "gpt-oss-120b": (36, 128, 4)}
TOKENS = 131_072
COLUMNS = 2880


def passed(experts: int, chosen: int) -> float:
    """Tokens through experts of a layer."""
    each = TOKENS * chosen / experts
    return experts * max(each, tokens_wanted(COLUMNS))


def commands(source: Path, work: Path, text: Path, tokens: int, device: str) -> dict[str, list[str]]:
    """Both commands."""
    ours = [sys.executable, "-P", "-m", "gptoss_convert"]
    common = ["--context", "512", "--tokens", str(tokens), "--device", device, "--overwrite"]
    return {
        "calibrate": [*ours, "calibrate", str(source), str(work / "s.gguf"), "--text", str(text), *common],
        "gptq": [
            *ours, "convert", str(source), str(work / "q.gguf"), "--to", "gguf", "--type", "q4_k_s", "--allow-larger",
            "--method", "gptq", "--calibration", str(text), "--no-proof", *common,
        ],
    }  # fmt: skip


def measure(folder: Path, counts: list[int], device: str) -> dict[str, Any]:
    """Seconds and memory of both commands at both numbers of tokens, and what follows for the true models."""
    source, text = folder / "source", folder / "text.txt"
    write_hf(Model(replace(TRUE_LAYER, experts=EXPERTS, experts_per_token=EXPERTS)), source)
    text.write_text("The weights of a model are numbers, and a converter moves them from one file to another.\n" * 4000)
    result: dict[str, Any] = {"device": device, "tokens": counts}
    for name in ("calibrate", "gptq"):
        taken = [run(commands(source, folder, text, n, device)[name]) for n in counts]
        b = (taken[1].cpu - taken[0].cpu) / ((counts[1] - counts[0]) * EXPERTS)
        a = (taken[0].cpu - b * counts[0] * EXPERTS) / EXPERTS
        share = taken[1].wall / taken[1].cpu
        whole = {m: share * layers * (a * e + b * passed(e, k)) / 3600 for m, (layers, e, k) in MODELS.items()}
        result[name] = {
            "wall": [t.wall for t in taken], "cpu": [t.cpu for t in taken], "memory": max(t.memory for t in taken),
            "seconds_an_expert": a, "seconds_a_token_and_expert": b, "hours": whole,
        }  # fmt: skip
    return result


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    first, second = result["tokens"]
    lines = [
        f"device {result['device']}; one layer, {EXPERTS} experts; hours for {TOKENS:,} tokens",
        "",
        f"| | {first} tokens: wall / CPU, s | {second} tokens: wall / CPU, s | peak, MB | CPU s an expert "
        "| CPU ms a token and expert | 20b, h | 120b, h |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("calibrate", "gptq"):
        row = result[name]
        cells = [f"{w:.1f} / {c:.1f}" for w, c in zip(row["wall"], row["cpu"], strict=True)]
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {row['memory'] / 1e6:.0f} | {row['seconds_an_expert']:.2f} "
            f"| {1000 * row['seconds_a_token_and_expert']:.3f} "
            f"| {row['hours']['gpt-oss-20b']:.1f} | {row['hours']['gpt-oss-120b']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    shared = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1024, 4096])
    parser.add_argument("--dir", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibration-cost-", dir=given.dir) as folder:
        result = measure(Path(folder), given.tokens, given.device)
    print(json.dumps(result, indent=1) if given.json else markdown(result))


if __name__ == "__main__":
    main()

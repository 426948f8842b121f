"""What WORTH of quant/shrinkage.py is worth: divergence of files calibrated on few tokens, for several values of it.

    python -P benchmarks/shrinkage.py [--tokens N …] [--worth W …] [--parts P] [--json]

On the trained small model (12 experts, of which a token takes 2; 832 tokens of its own are enough for an expert), calibrated on
P disjoint stretches of N tokens, q4_0 by GPTQ and q2_k_s by importance. WORTH 0 trusts every expert that saw a token at all, a
large one leans on the other tokens as long as anything is short. Printed is the mean of the divergences over the stretches, and
the standard error over them of the difference from WORTH 0.25's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from calibrated import CONTEXT, TRAINED, WIDE, divergence

from gptoss_convert.convert.calibration import Wish
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.progress import silent
from gptoss_convert.quant import shrinkage

RUNS = (("q4_0", "gptq"), ("q2_k_s", "importance"))
BASE = 0.25


def stretches(folder: Path, parts: int) -> list[Path]:
    """The calibration text in equal parts, cut at ends of lines."""
    lines = (TRAINED / "calibration.txt").read_text().splitlines(keepends=True)
    made = []
    for part in range(parts):
        path = folder / f"part-{part}.txt"
        path.write_text("".join(lines[len(lines) * part // parts : len(lines) * (part + 1) // parts]))
        made.append(path)
    return made


def measure(tokens: list[int], worths: list[float], parts: int, held_out: int) -> list[dict[str, Any]]:
    """One row a type, method and count of tokens."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = stretches(folder, parts)
        for kind, method in RUNS:
            for count in tokens:
                found: dict[float, list[float]] = {}
                for worth in worths:
                    shrinkage.WORTH = worth
                    for text in texts:
                        options = Options(
                            to="gguf", type=kind, widen=WIDE, allow_larger=True, proof=False, overwrite=True,
                            rounding=Wish(method, str(text), context=CONTEXT, tokens=count),
                        )  # fmt: skip
                        convert(TRAINED, folder / "made.gguf", options, silent)
                        found.setdefault(worth, []).append(divergence(folder / "made.gguf", held_out)["mean"])
                rows.append({"type": kind, "method": method, "tokens": count, "divergence": found})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: a column a WORTH."""
    worths = list(rows[0]["divergence"])
    lines = [
        "| type | tokens | " + " | ".join(f"WORTH {w:g}" for w in worths) + " |",
        "| --- | ---: |" + " ---: |" * len(worths),
    ]
    for row in rows:
        base = np.array(row["divergence"].get(BASE, row["divergence"][worths[0]]))
        cells = []
        for worth in worths:
            here = np.array(row["divergence"][worth])
            se = (here - base).std(ddof=1) / np.sqrt(len(here)) if len(here) > 1 else 0.0
            cells.append(f"{here.mean():.5f} ± {se:.5f}")
        lines.append(f"| {row['type']}, {row['method']} | {row['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--worth", type=float, nargs="*", default=[0.0, 0.0625, 0.25, 1.0, 16.0])
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=16384)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure(given.tokens, given.worth, given.parts, given.held_out)
    print(json.dumps(rows, indent=1) if given.json else markdown(rows))


if __name__ == "__main__":
    main()

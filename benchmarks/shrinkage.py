"""The constants of quant/shrinkage.py: divergence of files calibrated on little text, for several values of one of them.

    python -P benchmarks/shrinkage.py WORTH|RIDGE|PRIOR VALUE … [--tokens N …] [--types TYPE …] [--parts P] [--json]

On the trained small model (12 experts, of which a token takes 2; 832 tokens of its own are enough for an expert), calibrated on
P disjoint stretches of N tokens: by GPTQ, and for PRIOR by importance. Printed is the mean of the divergences over the stretches,
and the standard error over them of the difference from the first value's.
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


def stretches(folder: Path, parts: int) -> list[Path]:
    """The calibration text in equal parts, cut at ends of lines."""
    lines = (TRAINED / "calibration.txt").read_text().splitlines(keepends=True)
    made = []
    for part in range(parts):
        path = folder / f"part-{part}.txt"
        path.write_text("".join(lines[len(lines) * part // parts : len(lines) * (part + 1) // parts]))
        made.append(path)
    return made


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a type and count of tokens."""
    rows = []
    method = "importance" if given.constant == "PRIOR" else "gptq"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = stretches(folder, given.parts)
        for kind in given.types:
            for count in given.tokens:
                found: dict[float, list[float]] = {}
                for value in given.values:
                    setattr(shrinkage, given.constant, value)
                    for text in texts:
                        options = Options(
                            to="gguf", type=kind, widen=WIDE, allow_larger=True, proof=False, overwrite=True,
                            rounding=Wish(method, str(text), context=CONTEXT, tokens=count),
                        )  # fmt: skip
                        convert(TRAINED, folder / "made.gguf", options, silent)
                        found.setdefault(value, []).append(divergence(folder / "made.gguf", given.held_out)["mean"])
                rows.append({"type": kind, "method": method, "tokens": count, "divergence": found})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], constant: str) -> str:
    """The table: a column a value."""
    values = list(rows[0]["divergence"])
    heads = " | ".join(f"{constant} {v:g}" for v in values)
    lines = [f"| type | tokens | {heads} |", "| --- | ---: |" + " ---: |" * len(values)]
    for row in rows:
        base = np.array(row["divergence"][values[0]])
        cells = []
        for value in values:
            here = np.array(row["divergence"][value])
            se = (here - base).std(ddof=1) / np.sqrt(len(here)) if len(here) > 1 else 0.0
            cells.append(f"{here.mean():.5f} ± {se:.5f}")
        lines.append(f"| {row['type']}, {row['method']} | {row['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constant", choices=["WORTH", "RIDGE", "PRIOR"])
    parser.add_argument("values", type=float, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--types", nargs="*", default=["q4_0", "q2_k_s"])
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=16384)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure(given)
    print(json.dumps(rows, indent=1) if given.json else markdown(rows, given.constant))


if __name__ == "__main__":
    main()

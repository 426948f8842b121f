"""Every type of GGUF in one table: bytes, error and speed, ours beside ggml's and llama-quantize's.

    python -P benchmarks/types_table.py [--llama-quantize PATH] [--rows N] [--skip-first-use] [--json | --write FILE]

A row is a type. Its bytes are those of `type_sizes.py`: the forecast for the true 20b and 120b, which the written file has, and
what llama-quantize makes of the lossless file by its own dry run, with what it substitutes where rows of 2880 do not divide.
Error and speed are those of `codecs.py`, of the codec that the type gives to gate and up, on the same arrays in one process:
relative RMS on Gaussian rows (ours, ggml's) and on MXFP4-valued ones, million weights a second of one thread by processor
time on the Gaussian ones, and the processor seconds of the codec's first call, compilation and all. Types that ggml's encoder
refuses without importance are measured with one. `+ …` names the codec of down where it is another.
Bits are those of an expert's weight in the 20b.

--write puts the table into FILE between its markers and leaves the rest of it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import type_sizes
from support import ggml
from support.sparse import RELEASES

from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.quant.recipe import TYPES

_SPEC = importlib.util.spec_from_file_location(
    "codec_benchmark", Path(__file__).with_name("codecs.py")
)  # Python has a `codecs` of its own
assert _SPEC is not None
assert _SPEC.loader is not None
codecs = sys.modules["codec_benchmark"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(codecs)

BEGIN, END = "<!-- types_table.py: begin -->", "<!-- types_table.py: end -->"
HEAD = (
    "type", "experts", "bits", "20b, GB", "llama-quantize", "what its experts get", "120b, GB", "llama-quantize", "error",
    "ggml's", "of MXFP4", "ggml's", "Mw/s", "ggml's", "ratio", "first use, s",
)  # fmt: skip


def measured(name: str, rows: int, seconds: float, first: bool) -> dict[str, Any] | None:
    """Errors and speeds of a codec beside ggml's; None for floats and what ggml has no encoder for."""
    codec = CODECS[name]
    if codec.encode is None or name not in ggml.TYPES:
        return None
    weighted = name in codecs.NEEDS_IMPORTANCE
    gaussian, packed = (codecs.compare(codec, kind, weighted, rows, seconds) for kind in ("gaussian", "mxfp4"))
    use = None
    if first:
        plain, more = codecs.first_use(name)
        use = plain + more if weighted else plain
    return {"gaussian": asdict(gaussian), "mxfp4": asdict(packed), "first_use": use}


def table(sizes: dict[str, Any], speeds: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """One row a type, largest first."""
    by_type = {release: {row["type"]: row for row in found["types"]} for release, found in sizes.items()}
    order = [row["type"] for row in next(iter(sizes.values()))["types"]]
    rows = []
    for name in order:
        experts = TYPES[name].codecs
        down = "" if experts["down"] == experts["gate"] else f" + {experts['down']}"
        rows.append(
            {
                "type": name,
                "experts": experts["gate"] + down,
                **{release: found[name] for release, found in by_type.items()},
                "codec": speeds[experts["gate"]],
            }
        )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    small, large = (row[release] for release in RELEASES)
    gigabytes = [f"{n / 1e9:.2f}" if n else "–" for r in (small, large) for n in (r["bytes"], r["theirs"])]
    found = row["codec"]
    numbers = ["–"] * 7
    if found is not None:
        errors = [found[kind][side] for kind in ("gaussian", "mxfp4") for side in ("error", "ggml_error")]
        speeds = [found["gaussian"]["mws"], found["gaussian"]["ggml_mws"]]
        numbers = [f"{error:.4f}" if error else "0" for error in errors]
        numbers += [f"{speed:.0f}" for speed in speeds] + [f"{speeds[0] / speeds[1]:.1f}"]
    first = found["first_use"] if found else None
    return [
        row["type"], row["experts"], f"{small['expert_bits']:.3f}", *gigabytes[:2], small["substitute"], *gigabytes[2:], *numbers,
        "–" if first is None else f"{first:.0f}",
    ]  # fmt: skip


def markdown(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    """The table, and how it was made."""
    lines = [
        f"{given.rows} rows, {given.seconds} s a timing, {os.cpu_count()} cores, of which one is used.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "| " + " | ".join("---" if name in HEAD[:2] + HEAD[5:6] else "---:" for name in HEAD) + " |",
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    old, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"{path} lacks the markers {BEGIN} and {END}")
    del old
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    """Forecast, ask the peer, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on each timing")
    parser.add_argument(
        "--skip-first-use", action="store_true", help="do not time the compilation, which takes minutes"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between FILE's markers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: type_sizes.measure(name, Path(folder), given.llama_quantize) for name in RELEASES}
    speeds = {}
    for name in dict.fromkeys(recipe.codecs["gate"] for recipe in TYPES.values()):
        print(name, file=sys.stderr, flush=True)
        speeds[name] = measured(name, given.rows, given.seconds, not given.skip_first_use)
    rows = table(sizes, speeds)
    if given.write:
        put_between_markers(given.write, markdown(rows, given))
    else:
        print(json.dumps(rows, indent=2) if given.json else markdown(rows, given))


if __name__ == "__main__":
    main()

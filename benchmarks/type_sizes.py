"""Sizes of the true 20b and 120b as every type of GGUF: ours by forecast, llama-quantize's by its own dry run.

    python -P benchmarks/type_sizes.py --llama-quantize PATH [--json]

The checkpoints are sparse files with the released headers, so no weights are needed: `plan` reads headers alone, and so does
llama-quantize's --dry-run, which is given the lossless GGUF's header on a sparse file. Without --llama-quantize only ours.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "lib"))

from support.sparse import RELEASES, write_sparse_release  # noqa: E402
from support.tokenizer import small_tokenizer, true_tokenizer  # noqa: E402

from gptoss_convert.convert.conversion import Options, make_plan  # noqa: E402
from gptoss_convert.convert.forecast import Forecaster  # noqa: E402
from gptoss_convert.convert.source import open_source  # noqa: E402

_SIZE = re.compile(r"quant size\s*=\s*([\d.]+) MiB")
_FALLBACK = re.compile(r"blk\.3\.ffn_(gate|down)_exps\.weight.*falling back to\s+(\S+)")


def main() -> None:
    """Make the sparse releases, forecast, ask the peer, print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--llama-quantize", type=Path)
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: measure(name, Path(folder), given.llama_quantize) for name in RELEASES}
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    for name, table in rows.items():
        print(f"\n### {name} (`plan` took {table['seconds']:.2f} s)\n")
        print("| type | ours, GB | experts, bits | widened | llama-quantize, GB | what its experts get |")
        print("| --- | ---: | ---: | --- | ---: | --- |")
        for row in table["types"]:
            theirs = f"{row['theirs'] / 1e9:.2f}" if row["theirs"] else "–"
            wide = "yes" if row["widened"] else ""
            print(
                f"| {row['type']} | {row['bytes'] / 1e9:.2f} | {row['expert_bits']:.3f} | {wide} | {theirs} "
                f"| {row['substitute']} |"
            )


def measure(name: str, folder: Path, quantize: Path | None) -> dict[str, Any]:
    """Forecast every type of one release, and what llama-quantize makes of it."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        small_tokenizer(tokenizer, 400)
        true = true_tokenizer(ROOT / ".cache" / "tokenizer")
        if true is not None:
            (tokenizer / "tokenizer.json").write_bytes(true.read_bytes())
    write_sparse_release(name, folder / name, tokenizer)
    started = time.perf_counter()
    with open_source(folder / name) as source:
        forecasts = Forecaster(source).every_type()
        seconds = time.perf_counter() - started
        lossless = make_plan(source, folder / f"{name}.gguf", Options(to="gguf")).files[0]
    with (folder / f"{name}.gguf").open("wb") as out:
        out.write(lossless.head)
        out.truncate(lossless.size)
    rows = []
    for forecast in forecasts:
        theirs, substitute = ask(quantize, folder / f"{name}.gguf", forecast.type) if quantize else (None, "")
        rows.append({**forecast.as_dict(), "theirs": theirs, "substitute": substitute})
    return {"seconds": seconds, "types": rows}


def ask(quantize: Path, gguf: Path, type_name: str) -> tuple[int | None, str]:
    """Bytes of tensor data that llama-quantize would write, and what it substitutes in the experts."""
    known = {"mxfp4": "MXFP4_MOE"}.get(type_name, type_name.upper())
    command = [str(quantize), "--allow-requantize", "--dry-run", str(gguf), known]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    size = _SIZE.search(text)
    swaps = dict(_FALLBACK.findall(text))
    substitute = ", ".join(f"{part} {codec}" for part, codec in sorted(swaps.items()))
    return (int(float(size[1]) * 2**20) if size else None), substitute


if __name__ == "__main__":
    main()

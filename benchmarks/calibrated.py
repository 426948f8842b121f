"""How good calibrated files are: ours beside llama-quantize with llama-imatrix, on the trained small model, at equal bytes.

    python -P benchmarks/calibrated.py --llama BIN [TYPE …] [--tokens N] [--json]

BIN: a folder with llama-quantize and llama-imatrix. Everything starts from tests/data/trained, natively MXFP4. llama.cpp is
given the same calibration text and an f16 file of the model widened to 512 × 512, which it cannot make itself, and for every
tensor the type that our recipe gives it (--tensor-type), so that the files have the same tensors in the same types. KL
divergence of the next token against the source, on text that neither the model nor the calibration has seen, is measured by
`compare` for all alike; its standard error is about a tenth to a thirtieth of the figure and mostly common to a row. int4 has
no peer there: ours by rounding is its measure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "tests" / "data" / "trained"

from gptoss_convert.convert.calibration import Wish  # noqa: E402
from gptoss_convert.convert.compare import walk_both  # noqa: E402
from gptoss_convert.convert.conversion import Options, convert  # noqa: E402
from gptoss_convert.convert.names import canonical_shapes  # noqa: E402
from gptoss_convert.convert.progress import silent  # noqa: E402
from gptoss_convert.convert.source import open_source  # noqa: E402
from gptoss_convert.convert.statistics import gguf_names  # noqa: E402
from gptoss_convert.convert.texts import read_texts  # noqa: E402
from gptoss_convert.quant.recipe import TYPES  # noqa: E402

GGUF_TYPES = (
    "q6_k", "q5_k_s", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_s", "iq3_s", "iq3_xxs", "q2_k_s", "iq2_s", "iq2_xs",
    "iq2_xxs", "q2_0",
)  # fmt: skip
WIDE = "512x512"
METHODS = ("round", "importance", "gptq")
CONTEXT = 512


def divergence(artifact: Path, tokens: int) -> dict[str, float]:
    """KL divergence from the source on the held-out text."""
    with open_source(TRAINED) as source, open_source(artifact) as made:
        texts = read_texts(TRAINED / "heldout.txt", source, CONTEXT, tokens)
        found: dict[str, float] = walk_both(source, made, texts, "cpu", silent).scores.summary()["kld"]
        return found


def run(*command: object) -> None:
    """A program of llama.cpp's; its output is shown if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def theirs(llama: Path, start: Path, imatrix: Path | None, target: Path, name: str) -> None:
    """llama-quantize with our recipe's types."""
    recipe = TYPES[name]
    with open_source(TRAINED) as source:
        layers = source.config.layers
        tensors = [there for n in canonical_shapes(source.config) if n.endswith("proj.weight") or "experts" in n
                   for there in (gguf_names(n) if not n.endswith("bias") else ())]  # fmt: skip
    command: list[object] = [llama / "llama-quantize", "--allow-requantize"]
    if imatrix is not None:
        command += ["--imatrix", imatrix]
    for tensor in tensors:
        codec = recipe.codec(tensor, int(tensor.split(".")[1]), layers)
        command += ["--tensor-type", f"{tensor.removesuffix('.weight').replace('.', chr(92) + '.')}={codec}"]
    command += ["--token-embedding-type", recipe.codecs["embedding"], "--output-tensor-type", recipe.codecs["head"]]
    run(*command, start, target, "Q8_0")


def measure(llama: Path, folder: Path, names: list[str], tokens: int) -> list[dict[str, Any]]:
    """All rows."""
    start, imatrix = folder / "start.gguf", folder / "imatrix.gguf"
    options = Options(to="gguf", type="f16", widen=WIDE, allow_larger=True, proof=False)
    convert(TRAINED, start, options, silent)
    text = TRAINED / "calibration.txt"
    run(llama / "llama-imatrix", "-m", start, "-f", text, "-o", imatrix, "-c", CONTEXT, "--parse-special", "--no-ppl",
        "--process-output", "-ngl", 0)  # fmt: skip
    rows = []
    for name in names:
        row: dict[str, Any] = {"type": name}
        for side, found in (("theirs", None), ("theirs, imatrix", imatrix)):
            if name == "int4" or (found is None and name.startswith(("iq2", "iq3_xxs"))):
                continue
            target = folder / "theirs.gguf"
            theirs(llama, start, found, target, name)
            row[side] = {"bytes": target.stat().st_size, **divergence(target, tokens)}
        for method in METHODS:
            row[method] = ours(folder, name, method, tokens)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def ours(folder: Path, name: str, method: str, tokens: int) -> dict[str, float]:
    """Our file by one method."""
    wish = Wish() if method == "round" else Wish(method, str(TRAINED / "calibration.txt"), context=CONTEXT)
    whole = {"proof": False, "overwrite": True, "rounding": wish}
    if name == "int4":
        target, options = folder / "int4", Options(to="int4", **whole)
    else:
        target = folder / "ours.gguf"
        options = Options(to="gguf", type=name, widen=WIDE, allow_larger=True, **whole)
    convert(TRAINED, target, options, silent)
    size = (
        sum(p.stat().st_size for p in target.iterdir() if p.suffix == ".safetensors")
        if target.is_dir()
        else target.stat().st_size
    )
    return {"bytes": size, **divergence(target, tokens)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| type | bytes, ours / theirs | theirs, plain | theirs, imatrix | ours, round | ours, importance | ours, GPTQ "
        "| importance / theirs | GPTQ / theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        peer = row.get("theirs, imatrix")
        base = peer or row["round"]
        cells = [f"{row[k]['mean']:.5f}" if k in row else "–" for k in ("theirs", "theirs, imatrix", *METHODS)]
        sizes = f"{row['gptq']['bytes']:,} / {peer['bytes']:,}" if peer else f"{row['gptq']['bytes']:,} / –"
        ratios = [f"{row[k]['mean'] / base['mean']:.2f}" for k in ("importance", "gptq")]
        lines.append(f"| {row['type']} | {sizes} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=[*GGUF_TYPES, "int4"])
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given.llama, Path(folder), given.types, given.tokens)
    print(json.dumps(rows, indent=1) if given.json else markdown(rows))


if __name__ == "__main__":
    main()

"""A whole file of every kind of type beside llama-quantize: seconds, processor seconds and peak memory, same cores, same bytes.

    python -P benchmarks/quantize_speed.py --llama-quantize PATH [TYPE …] [--layers N] [--dir FOLDER] [--rounds N] [--json]

The source has N layers of the release's shape (2880 wide, 32 experts) and a small vocabulary. Ours starts from the MXFP4
checkpoint itself; llama-quantize from the f16 GGUF of the same model, already widened where the type needs it, because it
cannot widen: making that file is not counted. Both write every weight matrix but the router in one and the same codec
(`--pure` there, a recipe here), so that both files have the same tensors in the same types; ours without the proof, which
has no counterpart there, and with it. Importance is not given to either; iq2 and iq1 types, which llama-quantize refuses
without, are not compared. Memory is the largest resident set, in which pages of mapped files count: llama-quantize is run
with its default buffer and with --max-buffer-size 256, where it has that option.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from convert_speed import Quiet, Run, run
from support.checkpoints import TRUE_LAYER, Model, write_hf

from gptoss_convert.kernels.codecs import CODECS

TYPES = ("q8_0", "q4_0", "iq4_nl", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")
PARTS = ("gate", "up", "down", "attention", "embedding", "head")


def ours(source: Path, target: Path, recipe: Path, *options: str) -> list[str]:
    """Our command line."""
    command = [sys.executable, "-P", "-m", "gptoss_convert", "convert", str(source), str(target), "--to", "gguf"]
    return [*command, "--recipe", str(recipe), "--allow-larger", *options]


def theirs(quantize: Path, start: Path, target: Path, codec: str) -> list[str]:
    """llama-quantize's command line; the router is F32 in the starting file and stays so."""
    types = {"q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}
    return [str(quantize), "--pure", str(start), str(target), types.get(codec, codec.upper()), str(os.cpu_count())]


def recipe_file(folder: Path, codec: str) -> Path:
    """The same codec for everything."""
    path = folder / f"{codec}.toml"
    path.write_text(f'name = "{codec}"\n' + "".join(f'{part} = "{codec}"\n' for part in PARTS))
    return path


def starting_file(source: Path, folder: Path, wide: bool) -> Path:
    """The f16 GGUF that llama-quantize begins from."""
    target = folder / ("wide.gguf" if wide else "native.gguf")
    if not target.exists():
        widths = ["--widen", "3072x3072"] if wide else []
        run(ours(source, target, recipe_file(folder, "f16"), "--no-proof", *widths))
    return target


def measure(quantize: Path, folder: Path, layers: int, names: list[str], rounds: int) -> dict[str, Any]:
    """All figures, type by type."""
    from dataclasses import replace

    source = folder / "source"
    write_hf(Model(replace(TRUE_LAYER, layers=layers)), source)
    quiet = Quiet(folder / "work", 0)
    rows = []
    for name in names:
        wide = CODECS[name].block == 256
        start = starting_file(source, folder, wide)
        for other in {folder / "wide.gguf", folder / "native.gguf"} - {start}:
            other.unlink(missing_ok=True)
        recipe, out = recipe_file(folder, name), folder / "work" / "out.gguf"
        sizes: dict[str, int] = {}

        def sized(side: str, command: list[str], out: Path = out, sizes: dict[str, int] = sizes) -> Run:
            taken = run(command)
            sizes[side] = out.stat().st_size
            return taken

        commands = {
            "ours": ours(source, out, recipe, "--no-proof"),
            "ours, proved": ours(source, out, recipe),
            "theirs": theirs(quantize, start, out, name),
        }
        taken: dict[str, list[Run]] = {side: [] for side in commands}
        for _ in range(rounds):
            for side, command in commands.items():
                taken[side].append(quiet.run(lambda side=side, command=command: sized(side, command)))
        rows.append({"type": name, "sizes": sizes, **{side: summary(runs) for side, runs in taken.items()}})
        print(name, json.dumps(rows[-1]), file=sys.stderr)
    return {"layers": layers, "rounds": rounds, "cores": os.cpu_count(), "types": rows}


def summary(runs: list[Run]) -> dict[str, float]:
    """Medians, and the largest memory."""
    return {
        "wall": statistics.median(r.wall for r in runs),
        "cpu": statistics.median(r.cpu for r in runs),
        "memory": max(r.memory for r in runs),
        "others": max(r.others for r in runs),
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{result['layers']} layer(s) of the true shape, {result['rounds']} round(s), {result['cores']} cores; "
        "wall seconds / processor seconds / peak resident MB",
        "",
        "| type | ours | ours, proved | llama-quantize | theirs / ours: wall | CPU | memory | bytes, ours / theirs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["types"]:
        sides = [row["ours"], row["ours, proved"], row["theirs"]]
        cells = [f"{s['wall']:.1f} / {s['cpu']:.1f} / {s['memory'] / 1e6:.0f}" for s in sides]
        ratios = [f"{row['theirs'][key] / row['ours'][key]:.2f}" for key in ("wall", "cpu", "memory")]
        share = f"{row['sizes']['ours'] / row['sizes']['theirs']:.4f}"
        lines.append(f"| {row['type']} | " + " | ".join([*cells, *ratios, share]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    shared = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=list(TYPES))
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantize-speed-", dir=options.dir) as name:
        result = measure(options.llama_quantize, Path(name), options.layers, options.types, options.rounds)
    print(json.dumps(result, indent=2) if options.json else markdown(result))


if __name__ == "__main__":
    main()

"""ONNX folders in ONNX Runtime and onnxruntime-genai: how far from transformers, and what memory they take once loaded.

    python -P benchmarks/onnx_runtimes.py [--python INTERPRETER …] [--dir FOLDER] [--json]

1. Largest difference of a logit from transformers' in float32, of a small random model over 60 tokens, the first 20 at once and
   then one by one, its window of 8 passed seven times: in this interpreter, and in others that have an older runtime. A runtime
   that refuses a folder is said to. Block-wise int8 experts are also run without rounding of activations (¹).
2. The same model with every expert always taken, so that no choice flips: relative error of the logits, KL, equal top tokens.
3. Two layers of the release's width: memory that is not backed by the file after genai has loaded the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from peer import REPOSITORY
from support.checkpoints import SMALL, STEADY, TRUE_LAYER, Model, write_hf

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.progress import silent

IDS = [int(i) for i in np.random.default_rng(1).integers(0, 360, 60)]
PREFILL = 20
FOLDERS = {
    "mxfp4, f32": {},
    "int8, f32": {"experts": "int8"},
    "int8, f32, --onnx-runtime 1.24": {"experts": "int8", "onnx_runtime": "1.24"},
    "int4, f32, --onnx-runtime 1.24": {"experts": "int4", "onnx_runtime": "1.24"},
}
ROUNDED = [
    ("mxfp4", "f32"), ("int8", "f32"), ("mxfp4", "int8"), ("int8", "int8"), ("mxfp4", "int4"), ("int4", "f32"), ("int4", "int4"),
]  # fmt: skip
LOADED = {
    "mxfp4, f32": {},
    "int8, f32": {"experts": "int8", "onnx_runtime": "1.24"},
    "int8, int8": {"experts": "int8", "dense": "int8", "onnx_runtime": "1.24"},
    "int4, int4": {"experts": "int4", "dense": "int4", "onnx_runtime": "1.24"},
}
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import onnxruntime
from pathlib import Path
from support.onnx_runtime import genai_logits, logits
folder, ids, prefill, target = Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
import numpy as np
found, version = [logits(folder, ids, prefill)], onnxruntime.__version__
try:
    import onnxruntime_genai
    found.append(genai_logits(folder, ids, prefill))
except ModuleNotFoundError:
    pass
np.savez(target, *found)
"""
LOAD = """
import re, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
print(int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""
VERSIONS = """
import importlib.metadata as m
have = {d.metadata["Name"] for d in m.distributions()}
genai = ", genai " + m.version("onnxruntime-genai") if "onnxruntime-genai" in have else ""
print("ONNX Runtime " + m.version("onnxruntime") + genai)
"""


def made(source: Path, target: Path, **options: Any) -> Path:
    """An ONNX folder."""
    convert(source, target, Options("onnx", **options), silent)
    return target


def said(python: str, code: str, *arguments: str, floats: bool = False) -> str | None:
    """What a child prints, or None where it fails."""
    environment = {**os.environ, "ORT_QMOE_CPU_QNBIT_GEMM": "0"} if floats else dict(os.environ)
    command = [python, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def computed(python: str, folder: Path, floats: bool) -> list[Any] | None:
    """Logits of ONNX Runtime, f32 [60, V], and of genai, [41, V], where it is there; None where a runtime refuses the folder."""
    with tempfile.TemporaryDirectory() as place:
        target = f"{place}/found.npz"
        library = str(REPOSITORY / "tests" / "lib")
        if said(python, RUN, library, str(folder), json.dumps(IDS), str(PREFILL), target, floats=floats) is None:
            return None
        with np.load(target) as found:
            return [found[name] for name in found.files]


def differences(root: Path, pythons: list[str]) -> dict[str, dict[str, str]]:
    """Interpreter's runtimes → folder → the largest difference, of both runtimes."""
    model = Model(SMALL)
    write_hf(model, root / "small")
    want = model.logits(IDS).numpy()
    folders = {name: made(root / "small", root / str(n), **o) for n, (name, o) in enumerate(FOLDERS.items())}
    table: dict[str, dict[str, str]] = {}
    for python in pythons:
        row = table.setdefault(str(said(python, VERSIONS)), {})
        for name, folder in folders.items():
            for floats in (False, True) if name.startswith("int8") else (False,):
                found = computed(python, folder, floats)
                largest = found and max(float(np.abs(got - want[-len(got) :]).max()) for got in found)
                row[name + (" ¹" if floats else "")] = "refused" if largest is None else f"{largest:.1e}"
    return table


def log_softmax(logits: Any) -> Any:
    """Of each row."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def errors(root: Path) -> dict[str, dict[str, float]]:
    """Experts and dense → relative error of the logits, KL of the next token, share of equal top tokens."""
    model = Model(STEADY)
    write_hf(model, root / "steady")
    want = model.logits(IDS).numpy().astype(np.float64)
    table = {}
    for experts, dense in ROUNDED:
        folder = made(root / "steady", root / f"{experts}-{dense}", experts=experts, dense=dense)
        found = computed(sys.executable, folder, floats=False)
        assert found is not None
        got = found[0].astype(np.float64)
        p, q = log_softmax(want), log_softmax(got)
        table[f"{experts}, {dense}"] = {
            "relative": float(np.sqrt(np.square(got - want).mean()) / want.std()),
            "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
            "same_top": int((got.argmax(1) == want.argmax(1)).sum()),
        }
    return table


def resident(root: Path, pythons: list[str]) -> dict[str, dict[str, float | None]]:
    """Folder → bytes of data, and of memory after loading in each interpreter."""
    write_hf(Model(replace(TRUE_LAYER, layers=2)), root / "wide")
    table: dict[str, dict[str, float | None]] = {}
    for name, options in LOADED.items():
        folder = made(root / "wide", root / "loaded", **options)
        row = table.setdefault(name, {"data": (folder / "model.onnx.data").stat().st_size})
        for python in pythons:
            if "genai" in (who := str(said(python, VERSIONS))):
                printed = said(python, LOAD, str(folder))
                row[who] = None if printed is None else float(printed)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return table


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables."""
    names = list(next(iter(result["differences"].values())))
    lines = ["| largest difference of a logit | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {who} | " + " | ".join(row[n] for n in names) + " |" for who, row in result["differences"].items()]
    lines += ["", "| experts, dense | relative error of logits | KL | same top token |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {row['relative']:.2g} | {row['kl']:.2g} | {row['same_top']} of {len(IDS)} |"
        for name, row in result["errors"].items()
    ]
    who = [key for key in next(iter(result["resident"].values())) if key != "data"]
    lines += [
        "",
        "| two true layers, GB | data | " + " | ".join(who) + " |",
        "| --- | ---: " + "| ---: " * len(who) + "|",
    ]
    lines += [
        f"| {name} | {row['data'] / 1e9:.2f} | "
        + " | ".join("refused" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in who) + " |"
        for name, row in result["resident"].items()
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    shared = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], help="interpreters with older runtimes")
    parser.add_argument("--dir", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--json", action="store_true", help="one JSON document after the tables")
    options = parser.parse_args()
    pythons = [sys.executable, *options.python]
    with tempfile.TemporaryDirectory(prefix="onnx-runtimes-", dir=options.dir) as name:
        root = Path(name)
        result = {
            "differences": differences(root, pythons),
            "errors": errors(root),
            "resident": resident(root, pythons),
        }
    print(markdown(result))
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

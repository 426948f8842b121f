"""`make demo`: the whole way on a small gpt-oss made on the spot, with every command shown as you would type it.

The checkpoint has the released layout (sharded safetensors, MXFP4 experts, tokenizer, template) and random weights, so what
it says in the end is gibberish; what matters is that llama.cpp says the same gibberish that the weights mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
sys.path.insert(0, str(ROOT / "tests" / "lib"))

CHECKPOINT, MODEL = "gpt-oss-small", "gpt-oss-small-mxfp4.gguf"
PROMPT = "<|start|>user<|message|>Why is the sky blue?<|end|><|start|>assistant"


def run(*arguments: str) -> None:
    """Show a command, run it in the demo's folder, stop at the first failure."""
    print(f"\n$ gptoss-convert {' '.join(arguments)}", flush=True)
    command = Path(sys.executable).with_name("gptoss-convert")
    # The script's own -P must hold for the command too: the repo's folders would shadow other packages.
    done = subprocess.run([command, *arguments], cwd=DEMO, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False)
    if done.returncode:
        sys.exit(f"the command ended with exit code {done.returncode}")


def make_checkpoint() -> None:
    """Write the small checkpoint and its SHA256SUMS."""
    from support.checkpoints import SMALL, Model, write_hf

    folder = DEMO / CHECKPOINT
    print(f"$ # making {folder.relative_to(ROOT)}: {SMALL.layers} layers, {SMALL.experts} experts, the released layout")
    write_hf(Model(SMALL), folder)
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))


def complete() -> None:
    """Load the GGUF in llama.cpp and print what it says."""
    from support.llama import load

    print(f"\n$ # llama.cpp (xllamacpp) loads {MODEL} and continues a harmony prompt", flush=True)
    with load(DEMO / MODEL) as llama:
        print(repr(PROMPT))
        print(" →", repr(llama.complete(PROMPT, 12)))


def main() -> None:
    """Make, verify, inspect, convert, run, verify the result."""
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    make_checkpoint()
    run("verify", CHECKPOINT)
    run("inspect", CHECKPOINT)
    run("convert", CHECKPOINT, MODEL, "--to", "gguf")
    complete()
    run("verify", MODEL)
    print(f"\nThe proof in full: {(DEMO / MODEL).relative_to(ROOT)}.certificate.json")


if __name__ == "__main__":
    main()

"""llama.cpp's own converter, as the benchmarks run it: out of the source package of llama-cpp-python, unpacked in .cache/.

It runs under the interpreter that runs the benchmark, with its own `gguf` before the installed one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "tests" / "lib"))

from support import finetunes, release  # noqa: E402
from support import tokenizer as tokenizers  # noqa: E402

CACHE = REPOSITORY / ".cache"
PACKAGE = "llama-cpp-python==0.3.36"
_SOURCE = "llama_cpp_python-0.3.36"
TEMPLATE = "models/templates/openai-gpt-oss-120b.jinja"


def peer() -> Path:
    """The folder of llama.cpp's sources, fetched on first use."""
    folder = CACHE / "llama.cpp"
    found = folder / _SOURCE / "vendor" / "llama.cpp"
    if not (found / "convert_hf_to_gguf.py").exists():
        archive = folder / f"{_SOURCE}.tar.gz"
        if not archive.exists():
            download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE, "--dest", str(folder)]
            subprocess.run([sys.executable, "-P", "-m", "pip", *download], check=True)
        with tarfile.open(archive) as package:
            package.extractall(folder, filter="data")
    return found


def peer_command(source: Path, target: Path, outtype: str = "auto") -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of one conversion."""
    sources = peer()
    script = [sys.executable, "-P", str(sources / "convert_hf_to_gguf.py")]
    environment = {**os.environ, "PYTHONPATH": str(sources / "gguf-py")}
    # `-P` keeps the script's folder, where its package `conversion` is, from the path as well.
    environment["PYTHONPATH"] += os.pathsep + str(sources)
    return [*script, str(source), "--outfile", str(target), "--outtype", outtype], environment


def our_command(source: Path, target: Path, *options: str) -> list[str]:
    """The command line of one conversion by this project."""
    return [sys.executable, "-P", "-m", "gptoss_convert", "convert", str(source), str(target), "--to", "gguf", *options]


CARD = """\
---
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
tags:
- vllm
---

A small model of random numbers.
"""


def true_companions(folder: Path) -> None:
    """Put the release's tokenizer and template into a checkpoint: what the converter recognises as gpt-oss's.

    Beside them a model card with the release's front matter.
    """
    found = tokenizers.true_tokenizer(CACHE / "tokenizer")
    if found is None:
        raise SystemExit(f"the release's tokenizer cannot be rebuilt: {tokenizers.no_true_tokenizer}")
    shutil.copyfile(found, folder / "tokenizer.json")
    settings = tokenizers.tokenizer_config(tokenizers.TRUE_TEXT_TOKENS)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokenizers.SPECIAL_TOKENS_MAP, indent=2) + "\n")
    (folder / "README.md").write_text(CARD)
    shutil.copyfile(peer() / TEMPLATE, folder / "chat_template.jinja")


def write_checkpoint(model: release.Model, folder: Path, layout: str = "hf", shard_limit: int | None = None) -> None:
    """A checkpoint with the release's vocabulary; layout is "hf" or "bf16"."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = release.hf_tensors(model) if layout == "hf" else finetunes.bf16_tensors(model)
    if layout == "hf":
        files = release.hf_shards(model.spec, shard_limit)
        for name, entries in files.items():
            release.st.write(folder / name, entries, tensors)
        (folder / "model.safetensors.index.json").write_text(release.index_text(files))
        config = release.config_hf(model.spec)
    else:
        finetunes._write(model, folder, tensors, shard_limit)
        config = finetunes.config_bf16(model.spec, "parameters", with_dtype=True)
    (folder / "config.json").write_text(release.pretty(config))
    (folder / "generation_config.json").write_text(release.pretty(release.generation_config(model.spec)))
    true_companions(folder)

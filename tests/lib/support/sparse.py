"""The released checkpoints as sparse files: true headers, shapes and sizes, no data. For what works from headers alone."""

from __future__ import annotations

from pathlib import Path

from gptoss_convert.config import release_config
from gptoss_convert.convert.source import Layout, Source
from gptoss_convert.convert.target_safetensors import plan_hf

RELEASES = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}


def write_sparse_release(name: str, folder: Path, tokenizer: Path) -> None:
    """The HF layout of a release, its weight files sparse; tokenizer files are linked from a folder.

    It leans on the product's own plan of the HF layout, whose headers and sizes other tests hold against the official digests.
    """
    write_sparse_layers(*RELEASES[name], folder)
    for companion in tokenizer.iterdir():
        if companion.suffix in (".json", ".jinja") and not (folder / companion.name).exists():
            (folder / companion.name).write_bytes(companion.read_bytes())


def write_sparse_layers(layers: int, experts: int, folder: Path) -> None:
    """The HF layout of this many layers of a release's widths, without a tokenizer."""
    folder.mkdir(parents=True)
    plan = plan_hf(Source(folder, Layout.ORIGINAL, release_config(layers, experts), {}, []))
    for file in plan.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.head)
            out.truncate(file.size)
    for small, data in plan.small.items():
        (folder / small).write_bytes(data)

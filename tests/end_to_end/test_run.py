"""One recipe, from a checkpoint to every platform: real conversions, measured, really exported; then nothing more to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gptoss_convert.cli import cli
from gptoss_convert.convert.exports.platforms import PLATFORMS

RECIPE = """
[source]
path = "model"

[text.held-out]
file = "text.txt"
tokens = 64
context = 16

[[output]]
name = "laptop"
to = "gguf"
dense = "q8_0"
compare = {text = "held-out", fail_above = {kld = 0.5}}
export = [
    {for = "llama.cpp", context = 512}, {for = "ollama"}, {for = "lmstudio"}, {for = "huggingface", name = "me/laptop"},
]

[[output]]
name = "onnx"
to = "onnx"
onnx_runtime = "1.26"
embedding = "int8"
compare = {text = "held-out"}
export = [{for = "foundry-local", engine = "1.26", name = "mine:2", context = 512}, {for = "huggingface"}]

[[output]]
name = "int4"
to = "int4"
compare = {}
export = [{for = "northflank"}, {for = "azureml"}]

[[output]]
name = "bf16"
to = "bf16"
split_size = "300kB"
export = [{for = "sagemaker"}, {for = "bedrock"}]
"""


def run(folder: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    found = CliRunner().invoke(cli, ["run", str(folder / "recipe.toml"), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return [json.loads(line) for line in found.stdout.splitlines()]


def named(events: list[dict[str, Any]], kind: str) -> set[str]:
    return {event["step"] for event in events if event["event"] == kind}


@pytest.fixture(scope="module")
def ran(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder after its first run, and the events of that."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(hf_folder, folder / "model")
    (folder / "text.txt").write_text("What is held out was never looked at. 2880 columns, 32 experts.\n" * 20)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder, run(folder)


def test_every_platform_has_its_folder_and_the_manifest_every_digest(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ran
    manifest = json.loads((folder / "build/manifest.json").read_text())
    exports = [export for output in manifest["outputs"] for export in output["exports"]]
    assert {export["platform"] for export in exports} == set(PLATFORMS)
    for output in manifest["outputs"]:
        files = dict(output["files"])
        for export in output["exports"]:
            files |= export["files"]
            assert (folder / "build" / export["folder"] / "gptoss-export.json").is_file()
        for name, digest in files.items():
            assert hashlib.sha256((folder / "build" / name).read_bytes()).hexdigest() == digest, name
    quality = {output["name"]: output["quality"] for output in manifest["outputs"]}
    assert quality["laptop"]["gates"][0]["passed"]
    assert quality["onnx"]["kld"]["mean"] >= 0
    card = (folder / "build/exports/laptop-huggingface/README.md").read_text()
    assert "KL" in card, "the measured quality"


def test_the_second_run_skips_everything(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, first = ran
    manifest = (folder / "build/manifest.json").read_bytes()
    again = run(folder)
    assert named(again, "done") == {"source"}
    assert named(again, "skipped") == named(first, "done") - {"source"}
    assert (folder / "build/manifest.json").read_bytes() == manifest

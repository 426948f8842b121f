"""The small files that an export writes anew, and the certificate that lies beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from gptoss_convert.cli.verify import command
from gptoss_convert.convert.exports import write
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent

Kinds = Callable[[str], Path]
CERTIFICATE = "gptoss-certificate.json"


@pytest.fixture
def incomplete(kinds: Kinds, tmp_path: Path) -> Path:
    """An artifact, certified, whose source's generation_config.json did not stop at every end token."""
    folder = Path(shutil.copytree(kinds("mxfp4"), tmp_path / "mxfp4"))
    table = json.loads((folder / "generation_config.json").read_text())
    text = json.dumps(table | {"eos_token_id": table["eos_token_id"][:1]}).encode()
    (folder / "generation_config.json").write_bytes(text)
    document = json.loads((folder / CERTIFICATE).read_text())
    for file in document["artifact"]["files"]:
        if file["name"] == "generation_config.json":
            file |= {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / CERTIFICATE).write_text(json.dumps(document))
    assert CliRunner().invoke(command, [str(folder)]).exit_code == 0
    return folder


@pytest.mark.parametrize(
    ("platform", "engine", "folder"),
    [
        ("sagemaker", "vllm", "model"),
        ("azureml", "vllm", "model"),
        ("azureml", "mlflow", "model/model"),
        ("northflank", None, "model"),
    ],
)
def test_the_certificate_stays_true_of_the_folder_that_is_exported(
    incomplete: Path, tmp_path: Path, platform: str, engine: str | None, folder: str
) -> None:
    write.export(incomplete, tmp_path / "out", platform, Request(engine=engine), show=silent)
    model = tmp_path / "out" / folder
    told = CliRunner().invoke(command, [str(model)])
    assert told.exit_code == 0, told.output
    document = json.loads((model / CERTIFICATE).read_text())
    notes = document["artifact"].pop("notes")
    assert notes[-1] == f"generation_config.json: written by export --for {platform}, after the proof"
    before = json.loads((incomplete / CERTIFICATE).read_text())
    assert notes[:-1] == before["artifact"].pop("notes")
    changed = [
        new for new, old in zip(document["artifact"]["files"], before["artifact"]["files"], strict=True) if new != old
    ]
    assert [file["name"] for file in changed] == ["generation_config.json"]
    assert document["proof"] == before["proof"]


def test_a_certificate_that_is_true_already_is_carried_byte_for_byte(kinds: Kinds, tmp_path: Path) -> None:
    write.export(kinds("mxfp4"), tmp_path / "out", "northflank", Request(), show=silent)
    assert (tmp_path / "out/model" / CERTIFICATE).read_bytes() == (kinds("mxfp4") / CERTIFICATE).read_bytes()

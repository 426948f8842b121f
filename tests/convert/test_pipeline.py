"""`run`: a recipe from source to manifest; what is done is skipped, what changed is done again, what is locked stays."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_hf

from gptoss_convert.convert.exports import write as exporting
from gptoss_convert.convert.exports.artifact import KINDS, Artifact
from gptoss_convert.convert.exports.package import Package, Platform, Request
from gptoss_convert.convert.pipeline import Pipeline, Settings
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.recipe import read_recipe_file
from gptoss_convert.errors import BadInput, DigestMismatch, ProofFailed, TargetExists, UnknownDigest

RECIPE = """\
[source]
path = "model"

[text.chat]
file = "chat.txt"
tokens = 600
context = 64

[[output]]
name = "rounded"
to = "gguf"
type = "q4_0"
allow_larger = true

[[output]]
name = "weighed"
to = "gguf"
type = "q5_0"
allow_larger = true
method = "importance"
calibration = "chat"
compare = {text = "chat", fail_above = {kld = 5.0}}

[[output]]
name = "int4"
to = "int4"
method = "importance"
calibration = "chat"
compare = {report = false}
export = [{for = "llama.cpp", context = 100}]
"""
STEPS = [
    "source", "convert rounded", "calibrate chat", "convert weighed", "compare weighed", "convert int4", "compare int4",
    "export int4-llama.cpp",
]  # fmt: skip


def package(artifact: Artifact, request: Request) -> Package:
    made = Package()
    made.copy(artifact)
    made.files["context.txt"] = str(request.context).encode()
    return made


@pytest.fixture(autouse=True, scope="module")
def a_platform() -> Iterator[None]:
    """llama.cpp takes everything, so that small models without a tokenizer can be exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exporting.PLATFORMS, "llama.cpp", Platform(package, frozenset({"context"}), KINDS))
        yield


@pytest.fixture(scope="module")
def finished(a_platform: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_hf(Model(SMALL), folder / "model")
    (folder / "chat.txt").write_text("The weights of a model are numbers, and they move from file to file.\n" * 60)
    (folder / "r.toml").write_text(RECIPE)
    run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def run(folder: Path, **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """(steps that were done, manifest)."""
    events: list[Mapping[str, Any]] = []
    recipe = read_recipe_file(folder / "r.toml")
    manifest = Pipeline(recipe, Settings(**settings), silent, events.append).run()
    return [e["step"] for e in events if e["event"] == "done"], manifest


def change(folder: Path, before: str, after: str) -> None:
    text = (folder / "r.toml").read_text()
    assert before in text
    (folder / "r.toml").write_text(text.replace(before, after, 1))


def test_everything_is_made_and_named_in_the_manifest(finished: Path) -> None:
    manifest = json.loads((finished / "build" / "manifest.json").read_text())
    assert [o["name"] for o in manifest["outputs"]] == ["rounded", "weighed", "int4"]
    for output in manifest["outputs"]:
        assert (finished / "build" / output["artifact"]).exists()
        certificate = json.loads((finished / "build" / output["certificate"]).read_text())
        promised = {f["sha256"] for f in certificate["artifact"]["files"]}
        assert promised <= set(output["files"].values())
    weighed, int4 = manifest["outputs"][1:]
    assert weighed["quality"]["kld"]["mean"] > 0
    assert weighed["quality"]["gates"][0]["passed"]
    assert (finished / "build" / "reports" / "weighed.html").exists()
    assert int4["quality"]["gates"] == []
    assert int4["exports"][0]["folder"] == "exports/int4-llama.cpp"
    assert (finished / "build" / "exports" / "int4-llama.cpp" / "context.txt").read_text() == "100"
    assert int4["quality"]["tensor_rms"] > 0
    assert int4["exports"][0]["files"].keys() >= {f"exports/int4-llama.cpp/{n}" for n in ("context.txt", "SHA256SUMS")}
    for name, digest in int4["exports"][0]["files"].items():
        assert hashlib.sha256((finished / "build" / name).read_bytes()).hexdigest() == digest
    lock = json.loads((finished / "r.lock.json").read_text())
    assert lock["source"]["files"] == manifest["source"]["files"]


def test_the_manifest_says_whether_quality_was_measured_on_the_calibration_text(folder: Path) -> None:
    def held_out() -> bool:
        return bool(json.loads((folder / "build" / "manifest.json").read_text())["outputs"][1]["quality"]["held_out"])

    assert not held_out()
    change(folder, "[[output]]", '[text.other]\nfile = "other.txt"\ntokens = 600\ncontext = 64\n\n[[output]]')
    (folder / "other.txt").write_text("Of another kind is what stands here, and none of it was seen before.\n" * 60)
    change(folder, 'compare = {text = "chat"', 'compare = {text = "other"')
    assert run(folder, renew=True)[0] == ["source", "compare weighed"]
    assert held_out()


def test_the_second_run_does_nothing_and_writes_the_same_manifest(folder: Path) -> None:
    before = (folder / "build" / "manifest.json").read_bytes()
    done, _ = run(folder, locked=True)
    assert done == ["source"]
    assert (folder / "build" / "manifest.json").read_bytes() == before


def test_the_manifest_is_the_same_from_another_folder(finished: Path, folder: Path) -> None:
    shutil.rmtree(folder / "build")
    done, _ = run(folder)
    assert done == STEPS
    before, now = ((place / "build" / "manifest.json").read_bytes() for place in (finished, folder))
    assert before == now


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        ('type = "q4_0"', 'type = "q5_0"', ["convert rounded"]),
        ("kld = 5.0", "kld = 6.0", ["compare weighed"]),
        ("context = 100", "context = 200", ["export int4-llama.cpp"]),
        ("tokens = 600", "tokens = 500", STEPS[2:]),
        ("context = 64", "context = 48", STEPS[2:]),
    ],
)
def test_only_what_a_change_concerns_is_done_again(folder: Path, before: str, after: str, steps: list[str]) -> None:
    change(folder, before, after)
    assert run(folder)[0] == ["source", *steps]
    assert run(folder)[0] == ["source"]


def test_what_is_damaged_or_gone_is_made_again(folder: Path) -> None:
    whole = (folder / "build" / "artifacts" / "rounded.gguf").read_bytes()
    (folder / "build" / "artifacts" / "rounded.gguf").write_bytes(whole[:-4] + b"\1\2\3\4")
    (folder / "build" / "calibration" / "chat.gguf").unlink()
    assert run(folder)[0] == ["source", "convert rounded", "calibrate chat"]
    assert (folder / "build" / "artifacts" / "rounded.gguf").read_bytes() == whole


def test_a_source_or_a_text_that_is_not_the_locked_one_is_refused_until_the_lock_is_renewed(folder: Path) -> None:
    (folder / "chat.txt").write_text("Something else is written here, and it is longer than before. " * 60)
    with pytest.raises(DigestMismatch, match="the texts are not"):
        run(folder)
    assert run(folder, renew=True)[0] == ["source", *STEPS[2:]]
    write_hf(Model(SMALL, parity_free=True), folder / "other")
    change(folder, 'path = "model"', 'path = "other"')
    with pytest.raises(DigestMismatch, match="the source is not") as error:
        run(folder)
    assert "files" in str(error.value.found)


def test_without_a_lock_a_locked_run_does_not_begin(folder: Path) -> None:
    (folder / "r.lock.json").unlink()
    with pytest.raises(BadInput, match="no lock file"):
        run(folder, locked=True)


def test_a_missed_limit_ends_the_run_as_a_failure_when_all_else_is_done(folder: Path) -> None:
    change(folder, "kld = 5.0", "kld = 0.0")
    change(folder, "compare = {report = false}", "compare = {fail_above = {tensor_rms = 0.0}}")
    with pytest.raises(ProofFailed, match="miss their limits") as error:
        run(folder)
    assert "weighed: kld" in str(error.value.found)
    assert "int4: tensor_rms" in str(error.value.found)
    manifest = json.loads((folder / "build" / "manifest.json").read_text())
    assert manifest["outputs"][2]["exports"] == []  # what misses its limits is not packaged
    with pytest.raises(ProofFailed):
        run(folder)


def test_what_was_exported_is_taken_back_when_its_output_misses_a_limit(folder: Path) -> None:
    change(folder, "compare = {report = false}", "compare = {report = false, fail_above = {tensor_rms = 0.0}}")
    with pytest.raises(ProofFailed):
        run(folder)
    assert not (folder / "build" / "exports" / "int4-llama.cpp").exists()
    change(folder, "tensor_rms = 0.0", "tensor_rms = 1.0")
    assert run(folder)[0] == ["source", "compare int4", "export int4-llama.cpp"]


def test_a_run_killed_at_every_stage_ends_with_the_same_artifacts(finished: Path, folder: Path) -> None:
    """Each run is killed when it begins a step that no earlier one has begun."""
    recipe = (folder / "r.toml").read_text().partition("export =")[0]
    shutil.rmtree(folder / "build")
    (folder / "r.toml").write_text(recipe)
    begun: list[str] = []
    ended = None
    while ended is None:
        command = [sys.executable, "-m", "gptoss_convert", "run", str(folder / "r.toml"), "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "begin" and event["step"] not in begun:
                    begun.append(event["step"])
                    time.sleep(0.1)
                    process.kill()
                    break
            else:
                ended = process.wait()
    assert (ended, begun) == (0, STEPS[:-1])
    before, now = (json.loads((place / "build" / "manifest.json").read_text()) for place in (finished, folder))
    assert [o["files"] for o in now["outputs"]] == [o["files"] for o in before["outputs"]]
    assert [o["quality"] for o in now["outputs"]] == [o["quality"] for o in before["outputs"]]
    assert not list((folder / "build").rglob(".*"))


def test_a_killed_run_goes_on_after_the_finished_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "build")
    real = Pipeline._calibrate

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "_calibrate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(Pipeline, "_calibrate", real)
    assert run(folder)[0] == ["source", *STEPS[2:]]


def test_nothing_that_a_run_did_not_make_is_replaced(folder: Path) -> None:
    shutil.rmtree(folder / "build")
    (folder / "build" / "artifacts").mkdir(parents=True)
    (folder / "build" / "artifacts" / "rounded.gguf").write_text("mine")
    with pytest.raises(TargetExists, match="no run of this recipe"):
        run(folder)
    assert (folder / "build" / "artifacts" / "rounded.gguf").read_text() == "mine"


def test_official_means_that_every_weight_is(folder: Path) -> None:
    change(folder, 'path = "model"', 'path = "model"\nofficial = true')
    with pytest.raises((UnknownDigest, DigestMismatch)):
        run(folder)


def test_a_recipe_makes_an_onnx_folder_of_the_forms_that_it_names(folder: Path) -> None:
    (folder / "onnx.toml").write_text(
        'out = "onnx"\n[source]\npath = "model"\n[[output]]\nname = "small"\nto = "onnx"\nexperts = "int8"\ndense = "int8"\n'
        'router = "f32"\nhead = "int4"\nembedding = "int4"\nonnx_runtime = "1.28"\n'
    )
    Pipeline(read_recipe_file(folder / "onnx.toml"), Settings(), silent, lambda _: None).run()
    (made,) = folder.rglob("model.onnx")
    options = json.loads((made.parent / "gptoss-certificate.json").read_text())["options"]
    assert options["onnx_runtime"] == "1.28"
    assert [options[part] for part in ("experts", "attention", "router", "head", "embedding")] == [
        "int8", "int8", "f32", "int4", "int4",
    ]  # fmt: skip

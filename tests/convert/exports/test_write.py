"""An export's folder: whole, hashed, taken up after a kill, and never in the place of what it is made from."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.exports import write
from gptoss_convert.convert.exports.artifact import Artifact, open_artifact
from gptoss_convert.convert.exports.package import Package, Platform, Request, require_kind, require_name
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import BadInput, DigestMismatch, Refused, TargetExists, UsageError


def package(artifact: Artifact, request: Request) -> Package:
    require_kind(artifact, "somewhere", ("int4", "mxfp4", "gguf"), "gptoss-convert convert SRC DIR --to int4")
    made = Package(notes=["a note"], first_steps=["do this"], executable={"run.sh"})
    made.copy(artifact, "model/")
    made.files["run.sh"] = b"#!/bin/sh\n"
    return made


SOMEWHERE = Platform(package, frozenset({"name", "context"}), ("int4", "mxfp4", "gguf"))


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(write.PLATFORMS, "somewhere", SOMEWHERE)


@pytest.fixture(scope="module")
def artifacts(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for to, name in (
        ("int4", "int4"),
        ("int8", "int8"),
        ("int8-g32", "int8-g32"),
        ("bf16", "bf16"),
        ("hf", "mxfp4"),
        ("gguf", "m.gguf"),
    ):
        convert(hf_folder, folder / name, Options(to), silent)
    return folder


def export(path: Path, target: Path, **more: Any) -> write.Exported:
    return write.export(path, target, "somewhere", more.pop("request", Request()), show=silent, **more)


@pytest.mark.parametrize("name", ["int4", "int8", "int8-g32", "bf16", "mxfp4", "m.gguf"])
def test_the_kind_is_told_by_what_is_there(artifacts: Path, name: str) -> None:
    with open_artifact(artifacts / name) as artifact:
        assert artifact.kind == ("gguf" if name == "m.gguf" else name)
        assert artifact.certificate is not None
        assert artifact.certificate_name in artifact.files
        assert artifact.weight_bytes == sum((artifact.files[n]).stat().st_size for n in artifact.weights) > 0
        assert all(artifact.digest(n) for n in artifact.weights)


@pytest.mark.parametrize("name", ["int4", "m.gguf"])
def test_every_file_is_there_with_its_digest(artifacts: Path, tmp_path: Path, name: str) -> None:
    found = export(artifacts / name, tmp_path / "out")
    assert found.first_steps == ["do this"]
    document = json.loads((tmp_path / "out" / write.MANIFEST).read_text())
    assert document == found.document
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert there == {f["name"] for f in document["files"]} | {write.MANIFEST, write.SUMS}
    assert (tmp_path / "out" / "run.sh").stat().st_mode & 0o111
    sums = subprocess.run(
        ["sha256sum", "-c", "--strict", write.SUMS], cwd=tmp_path / "out", capture_output=True, check=False
    )
    assert sums.returncode == 0, sums.stderr
    with open_artifact(artifacts / name) as artifact:
        for file, path in artifact.files.items():
            assert (tmp_path / "out" / "model" / file).read_bytes() == path.read_bytes()


def test_the_same_artifact_gives_the_same_bytes(artifacts: Path, tmp_path: Path) -> None:
    for name in "ab":
        export(artifacts / "int4", tmp_path / name)
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_kind_that_the_platform_cannot_serve_is_refused_with_what_to_do(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="somewhere cannot serve") as error:
        export(artifacts / "bf16", tmp_path / "out")
    assert "--to int4" in str(error.value.remedy)
    assert not list(tmp_path.iterdir())


def test_what_means_nothing_for_a_platform_is_a_usage_error(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--role means nothing"):
        export(artifacts / "int4", tmp_path / "out", request=Request(role="arn"))
    with pytest.raises(UsageError, match="--name is empty"):
        export(artifacts / "int4", tmp_path / "out", request=Request(name=""))
    with pytest.raises(UsageError, match="no such platform"):
        write.export(artifacts / "int4", tmp_path / "out", "nowhere", Request(), show=silent)
    with pytest.raises(UsageError, match="not a name"):
        require_name("a b", "[a-z]+", "a model", 63)


def test_a_file_that_is_not_what_the_certificate_says_is_refused(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "int4", tmp_path / "int4")
    path = tmp_path / "int4" / "generation_config.json"
    path.write_text(path.read_text().replace("}", " }"))
    with pytest.raises(DigestMismatch, match="not the one that its certificate names"):
        export(tmp_path / "int4", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int4"]


def test_a_killed_export_copies_no_whole_file_again(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copied = write._blocks, []

    def blocks(path: Path, size: int) -> Any:
        copied.append(path.name)
        if len(copied) == 4:
            raise KeyboardInterrupt
        return real(path, size)

    monkeypatch.setattr(write, "_blocks", blocks)
    with pytest.raises(KeyboardInterrupt):
        export(artifacts / "int4", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    export(artifacts / "int4", tmp_path / "out")
    assert len(copied) == len(set(copied)) + 1
    monkeypatch.undo()
    monkeypatch.setitem(write.PLATFORMS, "somewhere", SOMEWHERE)
    whole = export(artifacts / "int4", tmp_path / "whole")
    assert whole.document == json.loads((tmp_path / "out" / write.MANIFEST).read_text())


def stopped_before_its_end(artifact: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hidden folder of an export that has written all of its files, and was killed before the manifest."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            export(artifact, target)
    return target.parent / f".{target.name}.partial"


def test_a_file_that_was_spoilt_after_the_kill_is_copied_again(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stopped_before_its_end(artifacts / "int4", tmp_path / "out", monkeypatch)
    path = partial / "model" / "chat_template.jinja"
    path.write_bytes(bytes(path.stat().st_size))
    export(artifacts / "int4", tmp_path / "out")
    written = tmp_path / "out" / "model" / path.name
    assert written.read_bytes() == (artifacts / "int4" / path.name).read_bytes()


def test_a_file_of_the_artifact_that_was_changed_after_the_kill_is_copied_anew(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(artifacts / "int4", tmp_path / "int4"))
    (source / "gptoss-certificate.json").unlink()
    (source / "notes.txt").write_text("before")
    stopped_before_its_end(source, tmp_path / "out", monkeypatch)
    (source / "notes.txt").write_text("behind")
    export(source, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "notes.txt").read_text() == "behind"


def test_nothing_stands_in_the_place_of_the_artifact_or_of_anything_else(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, TargetExists)):
        export(artifacts / "int4", artifacts / "int4", overwrite=True)
    with pytest.raises((UsageError, TargetExists)):
        export(artifacts / "int4", artifacts, overwrite=True)
    (tmp_path / "link").symlink_to(artifacts / "int4")
    for within in (artifacts / "int4" / "out", tmp_path / "link" / "deep" / "out"):
        with pytest.raises(UsageError, match="lie within the artifact"):
            export(artifacts / "int4", within)
        assert not within.exists()
    export(artifacts / "m.gguf", tmp_path / "beside")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(TargetExists):
            export(artifacts / "int4", tmp_path / "out", overwrite=overwrite)
    export(artifacts / "int4", tmp_path / "ours")
    with pytest.raises(TargetExists):
        export(artifacts / "int4", tmp_path / "ours")
    export(artifacts / "mxfp4", tmp_path / "ours", overwrite=True)


CERTIFICATES: list[Any] = [
    {"artifact": 1, "source": 2},
    {"artifact": {"files": []}, "source": {}, "lost": []},
    {"artifact": {"files": [{"name": "config.json"}]}, "source": {"official_weights": True}, "lost": []},
    {"artifact": {"files": [1]}, "source": {"official_weights": True}, "lost": []},
    {"artifact": {"files": []}, "source": {"official_weights": True}, "lost": "nothing"},
    {"artifact": {"files": []}, "source": {"official_weights": True, "template": "x"}, "lost": []},
    {"artifact": {"files": [], "notes": 1}, "source": {"official_weights": True}, "lost": []},
    {"artifact": None, "source": None},
]


@pytest.mark.parametrize("number", range(len(CERTIFICATES)))
def test_a_certificate_that_is_none_of_ours_is_bad_input(artifacts: Path, tmp_path: Path, number: int) -> None:
    shutil.copytree(artifacts / "int4", tmp_path / "int4")
    (tmp_path / "int4" / "gptoss-certificate.json").write_text(json.dumps(CERTIFICATES[number]))
    with pytest.raises(BadInput, match="certificate is not one that this tool wrote"):
        export(tmp_path / "int4", tmp_path / "out")


@pytest.mark.parametrize("name", ["a\nb.txt", "a\u2028b.txt", "a\udcffb.txt", "a\x1bb.txt"], ids=ascii)
def test_a_file_name_that_no_list_of_digests_can_hold_is_refused(artifacts: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifacts / "int4", tmp_path / "int4")
    (tmp_path / "int4" / name).write_text("x")
    with pytest.raises(BadInput, match="cannot stand in a list of digests"):
        export(tmp_path / "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Grüße 世界.txt", "back\\slash.txt", "q\"$(touch x)`y`'z.txt", "-c.txt"])
def test_every_other_file_name_is_listed_so_that_sha256sum_finds_it(artifacts: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifacts / "int4", tmp_path / "int4")
    (tmp_path / "int4" / name).write_text("x")
    export(tmp_path / "int4", tmp_path / "out")
    sums = subprocess.run(["sha256sum", "-c", "--strict", write.SUMS], cwd=tmp_path / "out", check=False)
    assert sums.returncode == 0
    assert (tmp_path / "out" / "model" / name).read_text() == "x"


def test_the_manifest_names_the_artifact_that_is_the_working_folder(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifacts / "int4")
    assert export(Path(), tmp_path / "out").document["artifact"]["name"] == "int4"


def test_what_is_no_artifact_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        export(tmp_path, tmp_path / "out")

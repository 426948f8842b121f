"""The hub export: its card, the quality in it, and files that really arrive on a hub on loopback."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from support.compare_document import broken, document
from support.hub import Hub, serve

from gptoss_convert.cli import cli
from gptoss_convert.config import release_config
from gptoss_convert.convert.exports import write
from gptoss_convert.convert.exports.artifact import open_artifact
from gptoss_convert.convert.exports.huggingface import card_matter
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.exports.push import push, require_pushable
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.verify import verify
from gptoss_convert.errors import BadInput, DigestMismatch, NetworkError, Refused, UsageError

TRAINED = Path(__file__).parents[2] / "data/trained"
KINDS = {
    "mxfp4": "hf",
    "bf16": "bf16",
    "int4": "int4",
    "int8": "int8",
    "int8-g32": "int8-g32",
    "onnx": "onnx",
    "m.gguf": "gguf",
}
REPO, TOKEN = "somebody/tiny", "hf_loopback"


@pytest.fixture(scope="module")
def artifacts(convert: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for name, to in KINDS.items():
        convert(TRAINED, folder / name, to)
    return folder


def export(path: Path, out: Path, **request: Any) -> tuple[dict[str, Any], str, write.Exported]:
    """Front matter and text of the card, and what was written."""
    found = write.export(path, out, "huggingface", Request(**request), show=silent)
    _, matter, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text, found


@pytest.mark.parametrize("name", KINDS)
def test_the_card_of_every_kind(name: str, artifacts: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    matter, text, found = export(artifacts / name, tmp_path / "out", name=REPO, base_model="somebody/base")
    assert matter["license"] == "psf-2.0"
    assert (matter["base_model"], matter["base_model_relation"]) == ("somebody/base", "quantized")
    assert matter["pipeline_tag"] == "text-generation"
    assert "gpt_oss" in matter["tags"]
    assert not found.document["notes"] or name != "m.gguf"
    for section in ("# tiny", "## Size", "## Quality", "## How to run", "## Chat", "## Licence"):
        assert section in text
    kind = "gguf" if name == "m.gguf" else name
    assert ("llama-server" in text) == (kind == "gguf")
    assert ("LOADING.md" in text) == kind.startswith("int")
    with open_artifact(artifacts / name) as artifact:
        for weights in artifact.weights:
            assert f"| `{weights}` |" in text
            assert str(artifact.digest(weights)) in text
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["library_name"] == matter["library_name"]


def test_cards_that_were_there_keep_their_text(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "int4", tmp_path / "int4")
    assert (tmp_path / "int4/LOADING.md").read_bytes() == (artifacts / "int4/README.md").read_bytes()
    assert (tmp_path / "int4/SOURCE_README.md").read_bytes() == (TRAINED / "README.md").read_bytes()
    export(artifacts / "mxfp4", tmp_path / "mxfp4")
    assert (tmp_path / "mxfp4/SOURCE_README.md").read_bytes() == (TRAINED / "README.md").read_bytes()


def test_the_code_in_an_onnx_card_runs(artifacts: Path, tmp_path: Path) -> None:
    """As a reader copies it, but for a shorter answer."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _, text, _ = export(artifacts / "onnx", tmp_path / "model")
    (code,) = re.findall(r"hf download [^\n]+\n\n((?:    [^\n]*\n)+)", text)
    script = textwrap.dedent(code).replace("max_length=4096", "max_length=200")
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert len(made.stdout) > 10
    assert "ONNX Runtime 1.32 or later loads it" in " ".join(text.split())
    assert "parts slashes" in " ".join(text.split())


def test_the_card_of_onnx_says_whose_sampling_runs(artifacts: Path, tmp_path: Path) -> None:
    text = " ".join(export(artifacts / "onnx", tmp_path / "onnx")[1].split())
    assert "Sampling is what `genai_config.json` says" in text
    assert "Sampling as OpenAI has it" not in text


def test_genai_stops_at_every_end_token_too(artifacts: Path, tmp_path: Path, copied: Callable[[Path], Path]) -> None:
    source = copied(artifacts / "onnx")
    (source / "gptoss-certificate.json").unlink()
    place = source / "genai_config.json"
    table = json.loads(place.read_text())
    table["model"]["eos_token_id"] = 1508
    place.write_text(json.dumps(table))
    (source / "generation_config.json").write_text('{"eos_token_id": 1508}')
    _, _, found = export(source, tmp_path / "out")
    made = [json.loads((tmp_path / "out" / name).read_text()) for name in (place.name, "generation_config.json")]
    for ends in (made[0]["model"]["eos_token_id"], made[1]["eos_token_id"]):
        assert set(ends) == {1508, 1518, 1505}
    for name in (place.name, "generation_config.json"):
        assert any(f"{name} was completed" in note for note in found.document["notes"])


@pytest.mark.parametrize("name", ["mxfp4", "int4", "onnx"])
def test_certificate_and_sums_are_true_of_the_folder(name: str, artifacts: Path, tmp_path: Path) -> None:
    """So it verifies as it lies, and can be exported again."""
    export(artifacts / name, tmp_path / "out")
    before, after = (
        json.loads((p / "gptoss-certificate.json").read_text()) for p in (artifacts / name, tmp_path / "out")
    )
    assert {key for key in before if before[key] != after[key]} == {"artifact"}
    own = {"gptoss-certificate.json", write.MANIFEST, write.SUMS}
    listed = {file["name"] for file in after["artifact"]["files"]}
    assert listed == {path.name for path in (tmp_path / "out").iterdir()} - own, "cards under their new names too"
    export(tmp_path / "out", tmp_path / "again")
    for sums in (None, tmp_path / "out" / write.SUMS):
        assert verify(tmp_path / "out", sums=sums).exit_code() == 0


def test_every_end_token_stops_generation(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    assert set(json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]) == {1508, 1518, 1505}


def test_what_the_card_cannot_know_is_said(artifacts: Path, tmp_path: Path) -> None:
    matter, text, found = export(artifacts / "bf16", tmp_path / "out")
    assert "base_model" not in matter
    assert any("--base-model" in note for note in found.document["notes"])
    assert "Not measured" in text


def test_the_official_weights_name_their_model(artifacts: Path) -> None:
    with open_artifact(artifacts / "mxfp4") as artifact:
        made = {**artifact.certificate["source"], "official_weights": True}  # type: ignore[index]
        object.__setattr__(artifact, "certificate", {**artifact.certificate, "source": made})  # type: ignore[dict-item]
        assert "base_model" not in card_matter(artifact, None), "its widths are no release's"


@pytest.mark.parametrize(("official", "base"), [(True, "openai/gpt-oss-20b"), (False, None)])
def test_weights_of_the_releases_widths_name_it_only_where_they_are_official(
    official: bool, base: str | None, artifacts: Path
) -> None:
    with open_artifact(artifacts / "mxfp4") as artifact:
        made = {**artifact.certificate["source"], "official_weights": official}  # type: ignore[index]
        object.__setattr__(artifact, "certificate", {**artifact.certificate, "source": made})  # type: ignore[dict-item]
        artifact.source.config = release_config(24, 32)
        assert card_matter(artifact, None).get("base_model") == base
        assert card_matter(artifact, "some/base")["base_model"] == "some/base"


def test_original_and_names_are_refused(convert: Callable[..., Any], artifacts: Path, tmp_path: Path) -> None:
    convert(TRAINED, tmp_path / "original", "original")
    with pytest.raises(Refused, match="cannot serve"):
        export(tmp_path / "original", tmp_path / "out")
    for wrong in ({"name": "no-owner"}, {"name": "a/b", "base_model": "x"}, {"context": 1}):
        with pytest.raises(UsageError):
            export(artifacts / "mxfp4", tmp_path / "out", **wrong)


def test_a_folder_without_a_tokenizer_is_refused(
    artifacts: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(artifacts / "mxfp4")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"lacks tokenizer\.json"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_licence_and_base_model_of_the_sources_card_stay_what_they_are(
    kind: str, convert: Callable[..., Any], copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = copied(TRAINED)
    said = {
        "license": "other",
        "license_name": "our-terms",
        "license_link": "https://x.org/t",
        "base_model": "some/base",
    }
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(said)}---\nHello\n")
    artifact = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    convert(source, artifact, kind)
    matter, text, found = export(artifact, tmp_path / "out")
    assert {key: matter[key] for key in said} == said
    assert "our-terms (https://x.org/t)" in text
    assert not any("base model" in note for note in found.document["notes"])


@pytest.mark.parametrize("name", ["a/b--c", "a/b..c", "a/b.git", "a/b-", "é/b"])
def test_what_the_hub_would_not_take_as_a_name_is_refused_before_any_work(
    name: str, artifacts: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not a name for a repository"):
        require_pushable("huggingface", name)
    with pytest.raises(UsageError, match="not a name for a base model"):
        export(artifacts / "m.gguf", tmp_path / "out", base_model=name)


# --- quality ------------------------------------------------------------------------------------------------------------


def measured(path: Path, artifact: Path, made: dict[str, Any]) -> Path:
    """A compare document of an artifact, as `--json` prints it."""
    with open_artifact(artifact) as opened:
        files = [{"name": n, "bytes": 1, "sha256": opened.digest(n)} for n in opened.weights]
        made["artifact"] |= {"name": artifact.name, "bytes": opened.weight_bytes, "files": files}
    text = json.dumps(made).replace("NaN", "null").replace("Infinity", "null")
    path.write_text(text)
    return path


def test_the_quality_table_is_the_documents(artifacts: Path, tmp_path: Path) -> None:
    quality = measured(tmp_path / "q.json", artifacts / "m.gguf", document())
    _, text, _ = export(artifacts / "m.gguf", tmp_path / "out", quality=quality)
    assert "| KL divergence, mean | 0.08213 | 0.00141 |" in text
    assert "| same likeliest token | 0.9137 | 0.0026 |" in text
    assert "on 12032 tokens of wiki.test.txt" in text
    assert "| experts, gate and up | 0." in text


def test_what_is_not_finite_is_said(artifacts: Path, tmp_path: Path) -> None:
    quality = measured(tmp_path / "q.json", artifacts / "m.gguf", broken())
    _, text, _ = export(artifacts / "m.gguf", tmp_path / "out", quality=quality)
    assert "| KL divergence, mean | not finite |" in text
    assert "2 tensors hold values that are not finite" in text
    assert "missed: tensor_rms" in text


def test_one_tensor_that_is_not_finite_speaks_for_its_part(artifacts: Path, tmp_path: Path) -> None:
    made = document()
    next(tensor for tensor in made["tensors"] if tensor["part"] == "down")["relative_rms"] = math.nan
    quality = measured(tmp_path / "q.json", artifacts / "m.gguf", made)
    _, text, _ = export(artifacts / "m.gguf", tmp_path / "out", quality=quality)
    assert "| experts, down | not finite |" in text


@pytest.mark.parametrize("by", ["digest", "name"])
def test_the_quality_of_another_artifact_is_refused(by: str, artifacts: Path, tmp_path: Path) -> None:
    quality = measured(tmp_path / "q.json", artifacts / "int4", document())
    if by == "name":
        made = json.loads(quality.read_text())
        del made["artifact"]["files"]
        quality.write_text(json.dumps(made))
        export(artifacts / "int4", tmp_path / "same", quality=quality)
    with pytest.raises(Refused, match="measured of another artifact"):
        export(artifacts / "m.gguf", tmp_path / "out", quality=quality)


def test_without_a_certificate_the_weights_are_hashed(
    artifacts: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    quality = measured(tmp_path / "q.json", artifacts / "m.gguf", document())
    _, text, _ = export(copied(artifacts / "m.gguf"), tmp_path / "out", quality=quality)
    assert "There is no certificate" in text
    assert "KL divergence" in text


def test_another_document_is_bad_input(artifacts: Path, tmp_path: Path) -> None:
    made = measured(tmp_path / "q.json", artifacts / "m.gguf", document())
    for spoil in ({"schema": "other"}, {"text": {"scored": 1}}, {"tensors": 3}):
        (tmp_path / "bad.json").write_text(json.dumps({**json.loads(made.read_text()), **spoil}))
        with pytest.raises(BadInput):
            export(artifacts / "m.gguf", tmp_path / "out", quality=tmp_path / "bad.json")


# --- the hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that takes REPO from TOKEN; the client without xet, whose store is no plain HTTP."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serve(Hub(REPO, "0" * 40, {}, lfs=(".gguf", ".safetensors"), token=TOKEN)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", served.url, raising=False)
        yield served


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["export", *arguments])


@pytest.mark.parametrize("name", ["m.gguf", "int4"])
def test_every_file_arrives_byte_for_byte(name: str, artifacts: Path, hub: Hub, tmp_path: Path) -> None:
    arguments = (
        str(artifacts / name),
        "--for",
        "huggingface",
        "--out",
        str(tmp_path / "out"),
        "--name",
        REPO,
        "--push",
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["pushed"] == {"repo": REPO, "commit": hub.commit, "url": f"{hub.url}/{REPO}"}
    here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert hub.files == here
    assert hub.made_private is True
    large = [request for request in hub.requests if request.startswith("PUT /objects/")]
    assert large, "weights go through LFS"
    again = run(*arguments, "--overwrite")
    assert again.exit_code == 0, again.output
    assert [request for request in hub.requests if request.startswith("PUT /objects/")] == large, "nothing twice"


def test_what_an_earlier_upload_left_is_named(artifacts: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"old-00001-of-00002.gguf": b"weights of before", ".gitattributes": b""}
    arguments = (str(artifacts / "m.gguf"), "--for", "huggingface", "--name", REPO, "--push")
    told = json.loads(run(*arguments, "--out", str(tmp_path / "a"), "--json").stdout)
    assert told["pushed"]["others"] == ["old-00001-of-00002.gguf"]
    assert "old-00001-of-00002.gguf" in run(*arguments, "--out", str(tmp_path / "b")).stdout


def test_what_arrives_otherwise_is_a_mismatch(artifacts: Path, hub: Hub, tmp_path: Path) -> None:
    export(artifacts / "m.gguf", tmp_path / "out")
    for spoilt in ("README.md", "m.gguf"):
        hub.spoils = {spoilt}
        with pytest.raises(DigestMismatch, match="does not have the file"):
            push(tmp_path / "out", REPO, endpoint=hub.url, token=TOKEN)


def test_no_token_no_upload(artifacts: Path, hub: Hub, tmp_path: Path) -> None:
    export(artifacts / "m.gguf", tmp_path / "out")
    hub.token = "another"
    with pytest.raises(NetworkError, match=r"upload failed|no access") as error:
        push(tmp_path / "out", REPO, endpoint=hub.url, token=TOKEN)
    assert "download" not in str(error.value)
    assert not hub.files


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--for", "llama.cpp", "--name", "a"], "--push means nothing"),
        (["--for", "huggingface"], "needs the repository"),
    ],
)
def test_push_is_refused_before_any_work(artifacts: Path, tmp_path: Path, arguments: list[str], wrong: str) -> None:
    result = run(str(artifacts / "m.gguf"), *arguments, "--out", str(tmp_path / "out"), "--push")
    assert isinstance(result.exception, UsageError)
    assert wrong in str(result.exception)
    assert not (tmp_path / "out").exists()

"""llama.cpp, Ollama, LM Studio: what each folder says, checked by grammar or schema, and what each refuses."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from support.modelfile import BadModelfile, parse

from gptoss_convert.config import release_config
from gptoss_convert.convert.exports import write
from gptoss_convert.convert.exports.artifact import open_artifact
from gptoss_convert.convert.exports.memory import Forecast, buffers, kv_cache
from gptoss_convert.convert.exports.ollama import modelfile
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import BadInput, Refused, UsageError

DATA = Path(__file__).parents[2] / "data"
TRAINED = DATA / "trained"
SCHEMA = json.loads((DATA / "lmstudio_model.schema.json").read_text())
PLATFORMS = ("llama.cpp", "ollama", "lmstudio")


@pytest.fixture(scope="module")
def gguf(convert: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    convert(TRAINED, path, "gguf")
    return path


@pytest.fixture(scope="module")
def parts(convert: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "m"
    convert(TRAINED, path, "gguf", split_bytes=4 << 20)
    assert len(list(path.glob("*.gguf"))) > 2
    return path


def export(path: Path, out: Path, platform: str, **request: Any) -> dict[str, str]:
    """The texts of an export."""
    write.export(path, out, platform, Request(**request), show=silent)
    small = [p for p in out.iterdir() if p.suffix != ".gguf"]
    return {p.name: p.read_text() for p in small}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_weights_are_the_artifacts_and_the_certificate_comes_along(
    gguf: Path, tmp_path: Path, platform: str
) -> None:
    texts = export(gguf, tmp_path / "out", platform)
    assert (tmp_path / "out/m.gguf").read_bytes() == gguf.read_bytes()
    assert texts["m.gguf.certificate.json"] == (gguf.parent / "m.gguf.certificate.json").read_text()
    assert "lost nothing" in texts["README.md"]
    assert json.loads(texts[write.MANIFEST])["platform"] == platform


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_was_not_proved_is_not_called_lossless(platform: str, convert: Callable[..., Any], tmp_path: Path) -> None:
    convert(TRAINED, tmp_path / "m.gguf", "gguf", proof=False)
    readme = export(tmp_path / "m.gguf", tmp_path / "out", platform)["README.md"]
    assert "was not proved" in readme
    assert "lost nothing" not in readme


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("to", ["hf", "bf16", "int4"])
def test_what_is_no_gguf_is_refused(
    platform: str, to: str, convert: Callable[..., Any], hf_folder: Path, tmp_path: Path
) -> None:
    convert(hf_folder, tmp_path / "a", to)
    with pytest.raises(Refused, match=f"{platform} cannot serve") as error:
        export(tmp_path / "a", tmp_path / "out", platform)
    assert "--to gguf" in str(error.value.remedy)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_gguf_that_cannot_chat_is_refused(
    platform: str, convert: Callable[..., Any], copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = copied(TRAINED)
    (source / "chat_template.jinja").unlink()
    convert(source, tmp_path / "m.gguf", "gguf")
    with pytest.raises(Refused, match=r"lacks tokenizer\.chat_template") as error:
        export(tmp_path / "m.gguf", tmp_path / "out", platform)
    assert "--tokenizer" in str(error.value.remedy)


@pytest.mark.parametrize("missing", ["tokens", "merges", "pre", "eos_token_id", "<|call|>"])
def test_every_part_of_a_tokenizer_is_needed(gguf: Path, missing: str) -> None:
    from gptoss_convert.convert.exports.chat import require_chat

    with open_artifact(gguf) as artifact:
        metadata = dict(artifact.source.metadata)
        if missing == "<|call|>":
            tokens = metadata["tokenizer.ggml.tokens"]
            metadata["tokenizer.ggml.tokens"] = replace(
                tokens, value=["x" if t == missing else t for t in tokens.value]
            )
        else:
            del metadata[f"tokenizer.ggml.{missing}"]
        artifact.source.metadata = metadata
        with pytest.raises(Refused, match="lacks") as error:
            require_chat(artifact, "llama.cpp")
        assert missing in str(error.value)


def test_another_template_than_the_certificates_is_refused(gguf: Path) -> None:
    from gptoss_convert.convert.exports.chat import require_chat

    with open_artifact(gguf) as artifact:
        require_chat(artifact, "llama.cpp")
        artifact.source.companions = {**artifact.source.companions, "chat_template.jinja": b"{{ messages }}"}
        with pytest.raises(Refused, match="not the one that the model was converted with"):
            require_chat(artifact, "llama.cpp")


ODD = "it's $(touch pwned) `x` | é.gguf"


def test_a_file_of_any_name_is_one_word_of_every_command(
    gguf: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    odd = copied(gguf).rename(tmp_path / ODD)
    for platform, command in (("lmstudio", "lms import "), ("huggingface", "llama-server -m ")):
        lines = export(odd, tmp_path / platform, platform)["README.md"].splitlines()
        (line,) = [line for line in lines if line.startswith(f"    {command}")]
        assert shlex.split(line)[2].removeprefix("model/") == ODD
    table = export(odd, tmp_path / "card", "huggingface")["README.md"].partition("## Size")[2]
    assert "| `` it's $(touch pwned) `x` \\| é.gguf `` |" in table


def test_the_server_is_given_the_very_file_and_the_figures(
    gguf: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    odd = copied(gguf).rename(tmp_path / ODD)
    export(odd, tmp_path / "out", "llama.cpp", name="some/model", context=1000)
    (tmp_path / "server").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "server").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "LLAMA_SERVER": str(tmp_path / "server")}
    done = subprocess.run(
        [tmp_path / "out" / "server.sh", "--seed", "a b"], env=environment, capture_output=True, text=True, check=True
    )
    given = done.stdout.splitlines()
    said = dict(itertools.pairwise(given))
    assert said["--model"] == str(tmp_path / "out" / ODD)
    assert (said["--alias"], said["--ctx-size"], said["--host"]) == ("some/model", "1000", "127.0.0.1")
    assert (said["--temp"], said["--top-p"], said["--top-k"], said["--min-p"]) == ("1.0", "1.0", "0", "0.0")
    assert given[-2:] == ["--seed", "a b"]
    assert not (tmp_path / "pwned").exists()


def test_parts_are_the_same_artifact_by_their_folder_and_by_the_first(parts: Path, tmp_path: Path) -> None:
    first = sorted(parts.glob("*.gguf"))[0]
    by_folder = export(parts, tmp_path / "a", "llama.cpp")
    by_part = export(first, tmp_path / "b", "llama.cpp")
    assert "gptoss-certificate.json" in by_part
    assert by_part["README.md"] == by_folder["README.md"]
    assert "lost nothing" in by_part["README.md"]


def test_a_certificate_of_other_files_is_not_that_of_the_parts(parts: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parts, tmp_path / "m"))
    first = sorted(copy.glob("*.gguf"))[0]
    certificate = copy / "gptoss-certificate.json"
    certificate.write_text(certificate.read_text().replace(first.name, "other.gguf"))
    assert "There is no certificate" in export(first, tmp_path / "out", "llama.cpp")["README.md"]


def test_a_name_of_two_lines_is_refused(gguf: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    odd = copied(gguf).rename(tmp_path / "a\nrm -rf.gguf")
    for platform in PLATFORMS:
        with pytest.raises((Refused, BadInput), match=r"cannot (name|stand in a list)"):
            export(odd, tmp_path / "out", platform)


@pytest.mark.parametrize("platform", ["ollama", "llama.cpp"])
def test_names_are_ascii(gguf: Path, tmp_path: Path, platform: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        export(gguf, tmp_path / "out", platform, name="modèle")


def test_first_steps_name_every_part(parts: Path, tmp_path: Path) -> None:
    found = write.export(parts, tmp_path / "out", "lmstudio", Request(), show=silent)
    *imports, last = found.first_steps
    assert [shlex.split(step)[2] for step in imports] == sorted(p.name for p in parts.glob("*.gguf"))
    assert last.startswith("mkdir -p")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(f"    {step}\n" in readme for step in found.first_steps)


# --- the forecast -------------------------------------------------------------------------------------------------------


def test_the_releases_kv_cache() -> None:
    """Half of 24 layers keep everything: 2048 bytes a token and layer. What the server reports for 20b is 3072 and 18 MiB."""
    small, large = release_config(24, 32), release_config(36, 128)
    assert kv_cache(small, 131072) == (3072 + 18) << 20
    assert kv_cache(large, 131072) == (4608 + 27) << 20
    assert kv_cache(small, 1) == 24 * 256 * 2048
    assert kv_cache(small, 8193) == 12 * (8448 + 768) * 2048


def test_what_fits() -> None:
    config = release_config(24, 32)
    forecast = Forecast(config, 12_096_558_336, (400_000_000,) * 24)
    assert forecast.largest(16 * 10**9) == 65536
    assert forecast.largest(12 * 10**9) is None
    need = forecast.total(16384)
    assert need == 12_096_558_336 + kv_cache(config, 16384) + buffers(config, 16384)
    count = forecast.layers_outside(8 * 10**9, 16384)
    assert count is not None
    assert need - count * 400_000_000 <= 8 * 10**9 < need - (count - 1) * 400_000_000
    assert forecast.layers_outside(16 * 10**9, 16384) == 0
    assert forecast.layers_outside(10**9, 16384) is None


def test_the_forecast_counts_every_tensor(gguf: Path, parts: Path, tmp_path: Path) -> None:
    for path in (gguf, parts):
        with open_artifact(path) as artifact:
            forecast = Forecast.of(artifact)
            assert forecast.weights == sum(view.nbytes for view in artifact.source.stored)
            assert artifact.weight_bytes * 0.97 < forecast.weights < artifact.weight_bytes
            assert len(forecast.experts) == 3
    readme = export(gguf, tmp_path / "out", "llama.cpp", context=1000)["README.md"]
    assert "| 1000 |" in readme
    assert "| 16 GB | everything, up to 131072 tokens of context |" in readme


def test_more_context_than_the_model_has_is_a_usage_error(gguf: Path, tmp_path: Path) -> None:
    for platform in PLATFORMS:
        with pytest.raises(UsageError, match="more than the model has"):
            export(gguf, tmp_path / "out", platform, context=131073)
        with pytest.raises(UsageError, match="means nothing"):
            export(gguf, tmp_path / "out", platform, region="eu")
        with pytest.raises(UsageError, match="not a name"):
            export(gguf, tmp_path / "out", platform, name="a b;c")


# --- Ollama -------------------------------------------------------------------------------------------------------------


def test_the_modelfile_says_what_the_reference_allows(gguf: Path, tmp_path: Path) -> None:
    found = parse(export(gguf, tmp_path / "out", "ollama", context=4096)["Modelfile"])
    assert found.sources == ["./m.gguf"]
    assert found.parameters == {
        "num_ctx": 4096, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
    }  # fmt: skip
    assert found.licenses == ["psf-2.0"]
    assert found.texts == {"requires": "0.30.0"}
    assert not found.stops
    assert not found.messages


def test_ollama_takes_one_file(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one file"):
        export(parts, tmp_path / "out", "ollama")


def test_a_licence_cannot_break_out_of_its_quotes() -> None:
    hostile = 'MIT """\nFROM evil\nPARAMETER seed 1'
    found = parse(modelfile("m.gguf", 1, hostile))
    assert found.sources == ["./m.gguf"]
    assert "seed" not in found.parameters
    for name in ('a"b.gguf', "a\nFROM b.gguf", "a.gguf "):
        with pytest.raises(Refused, match="cannot name"):
            modelfile(name, 1, None)


GRAMMAR = {
    "everything": (
        'from m\nParameter stop "a b"\nPARAMETER stop c\nSYSTEM """one\ntwo"""\nMESSAGE user Hi there\nTEMPLATE {{ .Prompt }}', ""
    ),
    "nothing": ("# a comment\n", "no FROM"),
    "an unknown instruction": ("FROM m\nTOOLS x", "line 2: no instruction"),
    "no value": ("FROM", "line 1: no instruction"),
    "an unknown parameter": ("FROM m\nPARAMETER mirostat 1", "line 2: no such parameter"),
    "a wrong type": ("FROM m\nPARAMETER top_k much", "line 2: top_k is not of its type"),
    "an unknown role": ("FROM m\nMESSAGE tool x", "no such role"),
    "open quotes": ('FROM m\nSYSTEM """x\ny', "line 2: the quotes of system"),
    "no version": ("FROM m\nREQUIRES soon", "not a version"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wrong"), GRAMMAR.values(), ids=GRAMMAR)
def test_the_parser_knows_right_from_wrong(text: str, wrong: str) -> None:
    if wrong:
        with pytest.raises(BadModelfile, match=wrong):
            parse(text)
        return
    found = parse(text)
    assert (found.stops, found.messages) == (["a b", "c"], [("user", "Hi there")])
    assert found.texts == {"system": "one\ntwo", "template": "{{ .Prompt }}"}


# --- LM Studio ----------------------------------------------------------------------------------------------------------


def test_model_yaml_fits_the_schema(gguf: Path, tmp_path: Path) -> None:
    texts = export(gguf, tmp_path / "out", "lmstudio", name="somebody/tiny", context=4096)
    document = yaml.safe_load(texts["model.yaml"])
    Draft202012Validator(SCHEMA).validate(document)
    assert document["model"] == "somebody/tiny"
    assert document["base"][0]["sources"] == [{"type": "huggingface", "user": "somebody", "repo": "tiny-GGUF"}]
    assert document["config"]["load"]["fields"] == [{"key": "llm.load.contextLength", "value": 4096}]
    assert "customFields" not in document, "this template has no reasoning effort"
    assert "lms import m.gguf" in texts["README.md"]


def test_model_yaml_asks_for_openais_sampling(gguf: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(export(gguf, tmp_path / "out", "lmstudio")["model.yaml"])["config"]["operation"]["fields"]
    assert {field["key"].rpartition(".")[2]: field["value"] for field in fields} == {
        "temperature": 1.0,
        "topKSampling": 0,
        "topPSampling": {"checked": True, "value": 1.0},
        "minPSampling": {"checked": True, "value": 0.0},
        "repeatPenalty": {"checked": False, "value": 1.0},
    }


def test_reasoning_effort_is_a_field_where_the_template_takes_it(gguf: Path) -> None:
    from gptoss_convert.convert.exports.chat import require_chat
    from gptoss_convert.convert.exports.lmstudio import definition

    with open_artifact(gguf) as artifact:
        chat = replace(require_chat(artifact, "lmstudio"), template=b"{{ reasoning_effort }}")
        document = definition(artifact, chat, "a/b", 1024)
    Draft202012Validator(SCHEMA).validate(document)
    assert document["customFields"][0]["effects"] == [{"type": "setJinjaVariable", "variable": "reasoning_effort"}]


def test_the_schema_knows_wrong_documents(gguf: Path, tmp_path: Path) -> None:
    good = yaml.safe_load(export(gguf, tmp_path / "out", "lmstudio")["model.yaml"])
    check = Draft202012Validator(SCHEMA)
    assert check.is_valid(good)
    spoiled: list[Callable[[dict[str, Any]], object]] = [
        lambda d: d.update(model="no-slash"),
        lambda d: d.pop("base"),
        lambda d: d.update(temperature=1),
        lambda d: d["metadataOverrides"].update(compatibilityTypes=["onnx"]),
        lambda d: d["metadataOverrides"].update(vision="maybe"),
        lambda d: d["config"]["operation"]["fields"][0].update(value="hot"),
        lambda d: d["config"]["operation"]["fields"].append({"key": "llm.prediction.nonsense", "value": 1}),
        lambda d: d["config"]["load"]["fields"][0].update(value=0),
        lambda d: d["base"][0]["sources"][0].update(type="ftp"),
    ]
    for spoil in spoiled:
        bad = copy.deepcopy(good)
        spoil(bad)
        assert not check.is_valid(bad)

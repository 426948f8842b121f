"""What a run is made from: all of it is pinned, none of it is asked for twice, and what cannot be is said before any work."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_bf16, write_hf
from support.hub import Hub, pinned, serve, table

from gptoss_convert.convert import official, pipeline
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.exports.platforms import PLATFORMS
from gptoss_convert.convert.pipeline import Pipeline, Settings, require_sense
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.recipe import read_recipe_file, schema
from gptoss_convert.errors import (
    BadInput,
    DigestMismatch,
    GptOssError,
    InputChanged,
    NetworkError,
    Refused,
    UnknownDigest,
    UsageError,
)

TRAINED = Path(__file__).parents[1] / "data/trained"
COMMIT = "7" * 40
RECIPE = """\
[source]
path = "model"

[[output]]
name = "a"
to = "gguf"
"""


def recipe(folder: Path, text: str = RECIPE) -> Path:
    (folder / "r.toml").write_text(text)
    return folder / "r.toml"


def run(path: Path, **settings: Any) -> list[str]:
    """The steps that were done."""
    events: list[Mapping[str, Any]] = []
    Pipeline(read_recipe_file(path), Settings(**settings), silent, events.append).run()
    return [e["step"] for e in events if e["event"] == "done"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_hf(Model(SMALL), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The trained model's, in a folder of its own; its model is `model`, without one."""
    own = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    shutil.copytree(TRAINED, tmp_path / "model", ignore=lambda *_: own)
    (tmp_path / "tokenizer").mkdir()
    for name in own:
        shutil.copy(TRAINED / name, tmp_path / "tokenizer" / name)
    return tmp_path / "tokenizer"


def test_another_tokenizer_is_refused_by_the_lock_and_makes_everything_again(tokenizer: Path) -> None:
    path = recipe(tokenizer.parent, RECIPE.replace('"model"\n', '"model"\ntokenizer = "tokenizer"\n'))
    run(path)
    assert run(path) == ["source"]
    (tokenizer / "chat_template.jinja").write_text("another {{ messages }}")
    with pytest.raises(DigestMismatch, match="beside the source") as error:
        run(path)
    assert "tokenizer" in str(error.value.found)
    assert run(path, renew=True) == ["source", "convert a"]


def test_another_meaning_of_the_experts_makes_everything_again(model: Path) -> None:
    run(recipe(model.parent))
    assert run(recipe(model.parent, RECIPE.replace('"model"\n', '"model"\ngate_proj = "halves"\n'))) == [
        "source",
        "convert a",
    ]


def test_every_part_of_a_split_gguf_is_pinned(model: Path) -> None:
    convert(model, model.parent / "parts", Options("gguf", split_bytes=200_000, proof=False), silent)
    first, *others = sorted((model.parent / "parts").glob("*.gguf"))
    assert others
    path = recipe(model.parent, RECIPE.replace('"model"', f'"parts/{first.name}"').replace('to = "gguf"', 'to = "hf"'))
    run(path)
    lock = json.loads((model.parent / "r.lock.json").read_text())
    assert set(lock["source"]["files"]) == {first.name, *(other.name for other in others)}
    others[-1].write_bytes(others[-1].read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DigestMismatch, match="the source is") as error:
        run(path)
    assert others[-1].name in str(error.value.found)


def test_a_source_that_changes_after_it_was_verified_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next(model.glob("*.safetensors"))

    def meddling(*arguments: Any) -> object:
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        return convert(*arguments)

    monkeypatch.setattr(pipeline, "convert", meddling)
    with pytest.raises(InputChanged, match="no longer what was verified") as error:
        run(recipe(model.parent))
    assert str(error.value.file).endswith(weights.name)
    assert not (model.parent / "build" / "manifest.json").exists()


def test_official_is_asked_of_weights_and_not_of_notes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    monkeypatch.setattr(official, "load", lambda: table(pinned("openai/gpt-oss-20b", COMMIT, files)))
    path = recipe(model.parent, RECIPE.replace('"model"\n', '"model"\nofficial = true\n'))
    (model / "notes.txt").write_text("mine")
    assert run(path) == ["source", "convert a"]
    (model / "extra.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises((UnknownDigest, DigestMismatch)):
        run(path, renew=True)


def test_the_outputs_do_not_lie_in_what_they_are_made_from(model: Path) -> None:
    path = recipe(model.parent, 'out = "model/build"\n' + RECIPE)
    with pytest.raises(UsageError, match="would lie in a folder") as error:
        run(path)
    assert str(error.value.file).endswith("r.toml, line 3")
    assert not (model / "build").exists()


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ('"model"', '"nowhere"', 2),
        ('"model"', '"mo\\u0000del"', 2),
        ('"model"\n', '"model"\ntokenizer = "nowhere"\n', 3),
        ('"model"\n', '"model"\n[text.x]\nfile = "nowhere.txt"\n', 4),
        ('to = "gguf"\n', 'to = "gguf"\nrecipe = "nowhere.toml"\n', 7),
        ('to = "gguf"\n', 'to = "gguf"\nbase = "nowhere"\n', 7),
    ],
)
def test_what_is_not_there_is_named_with_its_line_before_any_work(
    model: Path, before: str, after: str, line: int
) -> None:
    path = recipe(model.parent, RECIPE.replace(before, after))
    with pytest.raises(BadInput, match="no such file") as error:
        run(path)
    assert str(error.value.file).endswith(f"line {line}")
    assert not (model.parent / "build").exists()


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ('to = "gguf"', 'to = "hf"\ntype = "q4_0"', "--type is for"),
        ('to = "gguf"', 'to = "gguf"\ntype = "q44"', "no such type"),
        ('to = "gguf"', 'to = "gguf"\ntype = "q4_0"\nexperts = "mxfp4"', "--experts and --dense"),
        ('to = "gguf"', 'to = "gguf"\nexperts = "mxfp5"', "--experts cannot be"),
        ('to = "gguf"', 'to = "gguf"\ntype = "q4_0"\nrecipe = "r.toml"', "exclude each other"),
        ('to = "gguf"', 'to = "gguf"\nwiden = "100x100"', "multiples of 32"),
        ('to = "gguf"', 'to = "gguf"\nmethod = "gptq"\ncalibration = "t"\nbase = "b"', "--base"),
        ('to = "gguf"', 'to = "gguf"\nexport = [{for = "bedrock"}]', "bedrock cannot serve"),
        ('to = "gguf"', 'to = "int4"\nexport = [{for = "ollama"}]', "ollama cannot serve"),
        (
            'to = "gguf"',
            'to = "gguf"\nexport = [{for = "ollama", region = "eu"}]',
            "--region means nothing for --for ollama",
        ),
        (
            'to = "gguf"',
            'to = "gguf"\nexport = [{for = "lmstudio", name = "me"}]',
            "not a name for a model of LM Studio's",
        ),
        ('to = "gguf"', 'to = "gguf"\nexport = [{for = "huggingface", name = "me"}]', "not a name for a repository"),
        (
            'to = "gguf"',
            'to = "onnx"\nexport = [{for = "foundry-local", name = "a b"}]',
            "not a name for a model of Foundry",
        ),
        ('to = "gguf"', 'to = "int4"\nexport = [{for = "northflank", name = "A"}]', "not a name for a service"),
        ('name = "a"', 'name = "a.gguf"\nsplit_size = "1GB"', "split GGUF is a folder"),
    ],
)
def test_options_that_do_not_fit_are_found_before_any_work(tmp_path: Path, before: str, after: str, what: str) -> None:
    text = '[text.t]\nfile = "default"\n' + RECIPE.replace(before, after)
    with pytest.raises(UsageError, match=what) as error:
        require_sense(read_recipe_file(recipe(tmp_path, text)))
    assert str(error.value.file).endswith("r.toml, line 6")


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ('to = "onnx"\nexport = [{for = "foundry-local"}]', "does not load this folder"),
        ('to = "onnx"\nonnx_runtime = "1.31"\nexport = [{for = "foundry-local", engine = "1.26"}]', "does not load"),
        ('to = "onnx"\nonnx_runtime = "1.31"\nexport = [{for = "foundry-local", context = 1}]', "than the window"),
        ('to = "onnx"\nonnx_runtime = "1.26"\ngeneral_name = "A b"\nexport = [{for = "foundry-local"}]', "not a name"),
        ('to = "bf16"\nexport = [{for = "bedrock"}]', "numbered shards"),
        ('to = "int4"\nexport = [{for = "sagemaker"}]', "no listed image"),
        ('to = "int8"\nexport = [{for = "sagemaker", engine = "lmi"}]', "no listed image"),
    ],
)
def test_what_an_export_would_refuse_is_refused_before_anything_is_converted(
    model: Path, output: str, what: str
) -> None:
    path = recipe(model.parent, f'{RECIPE}[[output]]\nname = "last"\n{output}\n')
    with pytest.raises((Refused, UsageError), match=what) as error:
        run(path)
    assert str(error.value.file).endswith("r.toml, line 7")
    assert not (model.parent / "build/artifacts").exists()


def test_a_source_without_tokenizer_is_no_source_of_exports(model: Path) -> None:
    path = recipe(model.parent, RECIPE + 'export = [{for = "llama.cpp"}]\n')
    (model / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="needs the tokenizer") as error:
        run(path)
    assert str(error.value.file).endswith("r.toml, line 4")
    assert 'tokenizer = "FOLDER"' in str(error.value.remedy)
    assert not (model.parent / "build/artifacts").exists()


def test_every_platform_of_the_schema_is_one_and_the_other_way_round() -> None:
    items = schema()["properties"]["output"]["items"]["properties"]["export"]["items"]["properties"]
    assert set(items["for"]["enum"]) == PLATFORMS.keys()
    assert items.keys() - {"for"} == {f.name for f in fields(Request)} - {"quality"}


CHAT = '[text.t]\nfile = "t.txt"\ntokens = 600\ncontext = 64\n'
OF_CHAT = 'to = "gguf"\ntype = "q4_0"\nallow_larger = true\n'


@pytest.mark.parametrize(
    ("of_text", "reader"),
    [
        ('method = "importance"\ncalibration = "t"', "gptoss_convert.convert.texts.read_texts"),
        ('method = "gptq"\ncalibration = "t"', "gptoss_convert.convert.pipeline.convert"),
        ('compare = {text = "t"}', "gptoss_convert.convert.pipeline.measure"),
    ],
)
def test_a_text_that_changes_while_it_is_read_is_noticed(
    model: Path, monkeypatch: pytest.MonkeyPatch, of_text: str, reader: str
) -> None:
    text = model.parent / "t.txt"
    text.write_text("What is read here are numbers in words, and they are many.\n" * 60)
    module, _, name = reader.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def meddling(*arguments: Any, **options: Any) -> object:
        found = real(*arguments, **options)
        text.write_text("Another.")
        return found

    monkeypatch.setattr(reader, meddling)
    path = recipe(model.parent, CHAT + RECIPE.replace('to = "gguf"\n', OF_CHAT + of_text + "\n"))
    with pytest.raises(InputChanged, match="the text is no longer"):
        run(path)


@pytest.mark.parametrize("device", ["warp", "cuda:77"])
def test_a_device_that_is_not_there_is_found_before_any_work(model: Path, device: str) -> None:
    path = recipe(model.parent, RECIPE.replace('to = "gguf"\n', 'to = "gguf"\ncompare = {}\n'))
    with pytest.raises(UsageError, match="device"):
        run(path, device=device)
    assert not (model.parent / "build").exists()


def test_the_manifest_names_the_recipe_that_was_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(model.parent)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def editing(*arguments: Any) -> object:
        path.write_text(RECIPE + "# edited while it ran\n")
        return convert(*arguments)

    monkeypatch.setattr(pipeline, "convert", editing)
    run(path)
    assert json.loads((model.parent / "build" / "manifest.json").read_text())["recipe"]["sha256"] == digest


def test_an_edited_file_of_codecs_makes_its_output_again(model: Path) -> None:
    codecs = model.parent / "codecs.toml"
    parts = ("gate", "up", "down", "attention", "embedding", "head")
    codecs.write_text("".join(f'{part} = "q8_0"\n' for part in parts))
    given = 'to = "gguf"\nrecipe = "codecs.toml"\nallow_larger = true\n'
    path = recipe(model.parent, RECIPE.replace('to = "gguf"\n', given))
    run(path)
    assert run(path) == ["source"]
    codecs.write_text(codecs.read_text().replace('head = "q8_0"', 'head = "f16"'))
    assert run(path) == ["source", "convert a"]


def test_a_source_that_is_not_what_its_own_list_promises_is_refused(model: Path) -> None:
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    with pytest.raises(DigestMismatch, match="not what was promised") as error:
        run(recipe(model.parent))
    assert str(error.value.found).startswith("config.json")


def test_another_base_makes_its_output_again(model: Path, tmp_path: Path) -> None:
    write_bf16(Model(SMALL), tmp_path / "tuned")
    text = RECIPE.replace('"model"', '"tuned"').replace('to = "gguf"\n', 'to = "gguf"\nbase = "model"\n')
    path = recipe(tmp_path, text)
    run(path)
    (model / "notes.txt").write_text("another base")
    with pytest.raises(DigestMismatch, match="beside the source"):
        run(path)
    assert run(path, renew=True) == ["source", "convert a"]


def test_another_way_to_read_a_text_makes_again_what_reads_it(model: Path) -> None:
    lines = [
        json.dumps({"text": f"Number {n} is what stands here, and it is followed by another."}) for n in range(200)
    ]
    (model.parent / "t.txt").write_text("\n".join(lines))
    (model.parent / "t.jsonl").write_text("\n".join(lines))
    text = CHAT + RECIPE.replace('to = "gguf"\n', OF_CHAT + 'compare = {text = "t"}\n')
    path = recipe(model.parent, text)
    run(path)
    assert run(recipe(model.parent, text.replace("tokens = 600", "tokens = 500"))) == ["source", "compare a"]
    assert run(recipe(model.parent, text.replace("context = 64", "context = 48"))) == ["source", "compare a"]
    recipe(model.parent, text)
    run(path)
    assert run(recipe(model.parent, text.replace("t.txt", "t.jsonl"))) == ["source", "compare a"]


def test_an_artifact_that_changes_while_it_is_compared_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_convert.convert import compare

    real = compare.compare

    def meddling(*arguments: Any, **options: Any) -> object:
        found = real(*arguments, **options)
        (model.parent / "build/artifacts/a.gguf").touch()
        return found

    monkeypatch.setattr(compare, "compare", meddling)
    with pytest.raises(InputChanged):
        run(recipe(model.parent, RECIPE.replace('to = "gguf"\n', OF_CHAT + "compare = {}\n")))


def test_another_version_makes_everything_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe(model.parent))
    monkeypatch.setattr("gptoss_convert.convert.pipeline_steps.__version__", "9.9.9")
    assert run(recipe(model.parent)) == ["source", "convert a"]


def test_a_card_is_written_again_when_the_quality_in_it_changes(tmp_path: Path) -> None:
    shutil.copytree(TRAINED, tmp_path / "model")
    more = 'type = "q8_0"\nallow_larger = true\ncompare = {fail_above = {tensor_rms = 0.5}}\nexport = [{for = "huggingface"}]\n'
    path = recipe(tmp_path, RECIPE + more)
    assert run(path) == ["source", "convert a", "compare a", "export a-huggingface"]
    recipe(tmp_path, RECIPE + more.replace("0.5", "0.6"))
    assert run(path) == ["source", "compare a", "export a-huggingface"]
    assert "relative RMS error" in (tmp_path / "build/exports/a-huggingface/README.md").read_text()


def test_one_platform_may_be_exported_for_twice(tmp_path: Path) -> None:
    shutil.copytree(TRAINED, tmp_path / "model")
    path = recipe(tmp_path, RECIPE + 'export = [{for = "ollama", context = 100}, {for = "ollama", context = 200}]\n')
    assert run(path)[2:] == ["export a-ollama-0", "export a-ollama-1"]
    contexts = [(tmp_path / f"build/exports/a-ollama-{n}/Modelfile").read_text() for n in (0, 1)]
    assert ["num_ctx 100" in contexts[0], "num_ctx 200" in contexts[1]] == [True, True]


# --- from a hub ---------------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_once_and_then_needs_no_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("GPTOSS_CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    path = recipe(tmp_path, RECIPE.replace('path = "model"', f'repo = "some/body"\nrevision = "{COMMIT}"'))
    with serve(Hub("some/body", COMMIT, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert run(path) == ["source", "convert a"]
    lock = json.loads((tmp_path / "r.lock.json").read_text())
    assert lock["source"]["revision"] == COMMIT
    assert set(lock["source"]["files"]) == set(files)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(path, locked=True) == ["source"]
    damaged = next((tmp_path / "cache").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(NetworkError):
        run(path)
    with serve(Hub("some/body", COMMIT, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert run(path) == ["source"]


def test_a_lock_file_that_is_none_is_bad_input(model: Path) -> None:
    path = recipe(model.parent)
    for text in ("", "[]", '{"schema": "other"}'):
        (model.parent / "r.lock.json").write_text(text)
        with pytest.raises(BadInput):
            run(path)
    (model.parent / "r.lock.json").write_text('{"schema": "gptoss-convert/lock/1"}')
    with pytest.raises(GptOssError) as error:
        run(path)
    assert error.value.code == 4

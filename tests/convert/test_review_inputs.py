"""Inputs that reviewers found to be read wrongly, hidden, or answered with a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner
from support.checkpoints import SMALL, Model, write_gguf, write_hf, write_metal
from support.hub import pinned, sha256, table
from tokenizers import Tokenizer

from gptoss_convert.cli import main
from gptoss_convert.cli.convert import Size
from gptoss_convert.convert.resolve import resolve_source
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.target_gguf import general_metadata, gguf_slots, model_metadata
from gptoss_convert.convert.verify import verify
from gptoss_convert.convert.verify_report import Report, Status
from gptoss_convert.errors import BadInput, ExitCode, GptOssError, Refused, UsageError
from gptoss_convert.formats.digests import format_sums
from gptoss_convert.formats.gguf import u32
from gptoss_convert.quant.recipe import plain

TINY = replace(SMALL, layers=1, experts=2)


@pytest.fixture(scope="module")
def tiny_model() -> Model:
    return Model(TINY)


@pytest.fixture
def tiny(tiny_model: Model, tmp_path: Path) -> Path:
    """A folder that the test may spoil."""
    write_hf(tiny_model, tmp_path / "in")
    return tmp_path / "in"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def keys_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def status_of(report: Report) -> dict[str, Status]:
    return {result.name: result.status for result in report.results}


# --- verify ------------------------------------------------------------------------------------------------------------

MANIFEST = '{"peft_type":"LORA","schema":"gptoss-convert/manifest/1","repo":null,"revision":null,"files":[]}'


def listed(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir()
    (folder / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    sums = folder.parent / "trusted.sums"
    sums.write_text(format_sums({name: sha256((folder / name).read_bytes())}))
    return sums


def test_a_link_named_like_a_manifest_hides_no_file_from_the_users_own_list(tmp_path: Path) -> None:
    sums = listed(tmp_path / "v")
    (tmp_path / "v" / "adapter_config.json").write_text(MANIFEST)
    (tmp_path / "v" / "x-manifest.json").symlink_to("adapter_config.json")
    for options in ({"sums": sums}, {}):
        report = verify(tmp_path / "v", **options)  # type: ignore[arg-type]
        assert report.exit_code() == ExitCode.UNKNOWN
        statuses = status_of(report)
        assert statuses["adapter_config.json"] is statuses["x-manifest.json"] is Status.UNKNOWN


def test_a_found_manifest_is_a_stray_file_where_a_better_authority_is_in_force(tmp_path: Path) -> None:
    sums = listed(tmp_path / "v")
    (tmp_path / "v" / "adapter-manifest.json").write_text(MANIFEST)
    assert "adapter-manifest.json" not in status_of(verify(tmp_path / "v"))
    assert status_of(verify(tmp_path / "v", sums=sums))["adapter-manifest.json"] is Status.UNKNOWN
    official = verify(tmp_path / "v", require_official=True)
    assert status_of(official)["adapter-manifest.json"] is Status.UNKNOWN
    pins = table(pinned("openai/gpt-oss-20b", "6" * 40, {"model.safetensors": b"\x08\0\0\0\0\0\0\0{}      "}))
    report = verify(tmp_path / "v", table=pins, repo="openai/gpt-oss-20b")
    assert (report.exit_code(), status_of(report)["adapter-manifest.json"]) == (ExitCode.UNKNOWN, Status.UNKNOWN)


def test_a_list_that_the_user_names_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    sums = listed(tmp_path / "v").rename(tmp_path / "v" / "SHA256SUMS")
    assert verify(tmp_path / "v", sums=sums).exit_code() == ExitCode.OK
    (tmp_path / "v" / "config.json").symlink_to("SHA256SUMS")
    assert verify(tmp_path / "v", sums=sums).exit_code() == ExitCode.UNKNOWN


# --- tokenizers --------------------------------------------------------------------------------------------------------


def _pre(table: Any) -> list[Any]:
    steps: list[Any] = table["pre_tokenizer"]["pretokenizers"]
    return steps


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
        lambda t: t.update(pre_tokenizer=_pre(t)[1]),
        lambda t: _pre(t)[0].update(pattern={"Regex": r"\p{N}"}),
        lambda t: _pre(t)[0].update(behavior="Removed"),
        lambda t: _pre(t)[0].update(invert=True),
        lambda t: _pre(t)[1].update(use_regex=True),
        lambda t: _pre(t)[1].update(add_prefix_space=True),
        lambda t: _pre(t).append({"type": "Digits", "individual_digits": True}),
        lambda t: t.update(normalizer={"type": "NFC"}),
        lambda t: t["model"].update(unk_token="a"),
        lambda t: t["model"].update(continuing_subword_prefix="##"),
        lambda t: t["model"].update(end_of_word_suffix="</w>"),
        lambda t: t["model"].update(dropout=0.5),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_reproduce_is_refused_for_gguf(
    change: Callable[[Any], object], tiny: Path, tmp_path: Path, convert: Any
) -> None:
    edit(tiny / "tokenizer.json", change)
    with pytest.raises(Refused, match=r"llama\.cpp would tokenize differently"):
        convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)


def test_other_spellings_of_the_same_tokenizer_are_taken(tiny: Path, tmp_path: Path, convert: Any) -> None:
    def change(table: Any) -> None:
        table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [table["pre_tokenizer"]]}
        table["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
        table["model"]["merges"] = [" ".join(merge) for merge in table["model"]["merges"]]

    convert(tiny, tmp_path / "one.gguf", "gguf", proof=False)
    edit(tiny / "tokenizer.json", change)
    convert(tiny, tmp_path / "two.gguf", "gguf", proof=False)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(added_tokens=[1]),
        lambda t: t.update(added_tokens={"a": 1}),
        lambda t: t.update(added_tokens=None),
        lambda t: t.update(added_tokens="abc"),
        lambda t: t["added_tokens"][0].update(content=None),
        lambda t: t["added_tokens"][0].update(id=True),
        lambda t: t["added_tokens"][0].update(id=-1),
        lambda t: t["added_tokens"][0].update(id=10**30),
        lambda t: t["added_tokens"][0].update(id=t["added_tokens"][1]["id"]),
        lambda t: t["added_tokens"][0].update(id=0),
        lambda t: t["added_tokens"][0].update(content="a"),
        lambda t: t["model"]["vocab"].update(zzzzzz=0),
    ],
)
def test_malformed_tokens_are_bad_input(
    change: Callable[[Any], object], tiny: Path, tmp_path: Path, convert: Any
) -> None:
    edit(tiny / "tokenizer.json", change)
    with pytest.raises(BadInput):
        convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)


@pytest.mark.parametrize("key", ["9" * 5000, "-1", "a"])
def test_a_key_of_the_added_tokens_that_is_no_id_is_bad_input(
    key: str, tiny_model: Model, tokenizer_folder: Path, tmp_path: Path, convert: Any
) -> None:
    write_metal(tiny_model, tmp_path / "model.bin")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {key: {"content": "x"}}}))
    with pytest.raises(BadInput, match="not a token's id"):
        convert(tmp_path / "model.bin", tmp_path / "out", "hf", proof=False, tokenizer=folder)


@pytest.mark.parametrize("index", [10**12, 399_999, SMALL.vocab])
def test_a_special_token_beyond_the_models_rows_is_bad_input_by_its_key(
    index: int, tiny: Path, tmp_path: Path, convert: Any
) -> None:
    edit(tiny / "config.json", lambda table: table.update(eos_token_id=index))
    with pytest.raises(BadInput, match="eos_token_id"):
        convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)


def test_user_defined_tokens_survive_gguf_as_added_tokens_that_are_not_special(
    tiny: Path, tmp_path: Path, convert: Any
) -> None:
    first = max(token["id"] for token in json.loads((tiny / "tokenizer.json").read_text())["added_tokens"]) + 1
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_tokens(["<plain>"])
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(str(tiny / "tokenizer.json"))
    convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)
    assert keys_of(tmp_path / "m.gguf")["tokenizer.ggml.token_type"][first : first + 2] == [4, 3]
    convert(tmp_path / "m.gguf", tmp_path / "out", "hf", proof=False)
    again = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"][-2:]
    assert [(t["id"], t["content"], t["special"]) for t in again] == [
        (first, "<plain>", False),
        (first + 1, "<|extra|>", True),
    ]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert (settings[str(first)]["special"], settings[str(first + 1)]["special"]) == (False, True)
    text = "a <plain> word<|extra|>"
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == tokenizer.encode(text).ids


def test_special_tokens_that_metal_has_no_rows_for_are_left_out_and_noted(
    tiny_model: Model, tokenizer_folder: Path, tmp_path: Path, convert: Any
) -> None:
    write_metal(tiny_model, tmp_path / "model.bin")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|more_{i}|>" for i in range(3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    outcome = convert(tmp_path / "model.bin", tmp_path / "m.gguf", "gguf", tokenizer=folder)
    (note,) = [note for note in outcome.document["source"]["notes"] if "left out" in note]
    assert "<|more_2|>" in note
    keys = keys_of(tmp_path / "m.gguf")
    assert "<|more_2|>" not in keys["tokenizer.ggml.tokens"]
    edit(folder / "tokenizer.json", lambda table: table["model"]["vocab"].update(zzzzzz=SMALL.vocab))
    with pytest.raises(BadInput, match="no row"):
        convert(tmp_path / "model.bin", tmp_path / "n.gguf", "gguf", tokenizer=folder)


# --- cards, configurations, names ----------------------------------------------------------------------------------------


def test_scalars_of_a_card_are_the_texts_that_stand_there(tiny: Path, tmp_path: Path, convert: Any) -> None:
    (tiny / "README.md").write_text(
        "---\nlanguage: [no, en]\ntags:\n- 2024\n- {a: 1}\n- on\nversion: 1.0\nlicense: [mit, bsd]\nauthor:\n---\n"
    )
    convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["general.languages"] == ["no", "en"]
    assert keys["general.tags"] == ["2024", "on"]
    assert (keys["general.version"], keys["general.license"]) == ("1.0", "mit, bsd")
    assert "general.author" not in keys


@pytest.mark.parametrize("line", ['license: "\\ud800"', 'tags: ["\\udfff"]'])
def test_half_a_character_in_a_card_is_bad_input(line: str, tiny: Path, tmp_path: Path, convert: Any) -> None:
    (tiny / "README.md").write_text(f"---\n{line}\n---\n")
    with pytest.raises(BadInput, match="front matter"):
        convert(tiny, tmp_path / "m.gguf", "gguf", proof=False)


@pytest.mark.parametrize("target", ["hf", "bf16"])
def test_the_written_config_says_what_is_written(target: str, tiny: Path, tmp_path: Path, convert: Any) -> None:
    for i, wrong in enumerate(("x", ["x"], 1, {"quant_method": "gptq"})):
        edit(tiny / "config.json", lambda t, w=wrong: t.update(quantization_config=w, torch_dtype="float16", dtype="f"))
        convert(tiny, tmp_path / f"{i}", target, proof=False)
        written = json.loads((tmp_path / f"{i}" / "config.json").read_text())
        assert written["torch_dtype"] == written["dtype"] == "bfloat16"
        assert written.get("quantization_config", {}).get("quant_method") == ("mxfp4" if target == "hf" else None)


def test_a_name_is_honoured_where_the_gguf_has_none(tiny_model: Model, tmp_path: Path, convert: Any) -> None:
    write_gguf(tiny_model, tmp_path / "in.gguf")
    source = bytearray((tmp_path / "in.gguf").read_bytes())
    at = source.index(b"general.name")
    source[at : at + 12] = b"general.mine"
    (tmp_path / "in.gguf").write_bytes(source)
    convert(tmp_path / "in.gguf", tmp_path / "m.gguf", "gguf", proof=False, name="Mine")
    assert keys_of(tmp_path / "m.gguf")["general.name"] == "Mine"


def test_another_alignment_and_a_wrong_token_id_are_not_copied_from_a_gguf(tiny_model: Model, tmp_path: Path) -> None:
    write_gguf(tiny_model, tmp_path / "in.gguf")
    with open_source(tmp_path / "in.gguf") as source:
        slots = gguf_slots(source.config, plain("mxfp4", "bf16"))
        source.metadata = {**source.metadata, "general.alignment": u32(4096)}
        assert "general.alignment" not in dict(general_metadata(source, slots, None))
        source.metadata = {**source.metadata, "tokenizer.ggml.eos_token_id": u32(399_999)}
        with pytest.raises(BadInput, match="eos_token_id"):
            model_metadata(source, 0)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "caf\udce9", " ", ""])
def test_a_name_that_is_no_plain_text_is_a_usage_error(name: str, tiny: Path, tmp_path: Path, convert: Any) -> None:
    with pytest.raises(UsageError, match="--name"):
        convert(tiny, tmp_path / "m.gguf", "gguf", proof=False, name=name)


# --- the command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.5", "0", "0.0000001KB", "9" * 400, "1" * 400 + "GB", "-1", "1e9", "٣GB", "inf"])
def test_a_size_that_is_none_is_a_usage_error(text: str) -> None:
    result = CliRunner().invoke(command_of("convert"), ["a", "b", "--to", "hf", "--split-size", text])
    assert result.exit_code == 2, result.output
    assert "is not a size" in result.output or "No such option" in result.output


def test_sizes_are_exact() -> None:
    read = Size().convert
    assert [read(text, None, None) for text in ("4GB", "1.5KiB", "0.5 kb", "7")] == [4 * 10**9, 1536, 500, 7]


def command_of(verb: str) -> Any:
    import importlib

    return importlib.import_module(f"gptoss_convert.cli.{verb}").command


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    return int(stop.value.code or 0), capsys.readouterr().out


def test_json_is_one_document_also_when_the_manifest_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = listed(tmp_path / "v")
    code, out = run_main(
        capsys, "verify", "--json", tmp_path / "v", "--sums", sums, "--write-manifest", tmp_path / "none" / "x"
    )
    assert (code, json.loads(out)["exit_code"]) == (7, 7)


def test_json_is_one_document_also_when_the_run_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptoss_convert.convert.verify.verify", interrupt)
    listed(tmp_path / "v")
    code, out = run_main(capsys, "verify", "--json", tmp_path / "v")
    assert (code, json.loads(out)["exit_code"]) == (130, 130)


def test_an_interrupt_after_the_result_adds_no_second_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_convert.cli import output

    emit = output.emit

    def interrupt(*arguments: Any) -> None:
        emit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "emit", interrupt)
    listed(tmp_path / "v")
    code, out = run_main(capsys, "verify", "--json", tmp_path / "v")
    assert (code, json.loads(out)["schema"]) == (130, "gptoss-convert/verify/1")


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_unicode_shows_names_escaped(encoding: dict[str, str], tmp_path: Path) -> None:
    listed(tmp_path / "v", "modèle—→.safetensors")
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", **encoding}
    command = [sys.executable, "-m", "gptoss_convert", "verify", str(tmp_path / "v")]
    result = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
    assert (result.returncode, b"Traceback" in result.stderr) == (5, False), result.stderr
    assert b"mod" in result.stdout


def test_a_mistyped_path_is_told_from_a_repository_and_nothing_is_no_source() -> None:
    with pytest.raises(GptOssError) as caught:
        resolve_source("src/pe", None)  # type: ignore[arg-type]
    assert "no such file or folder" in str(caught.value)
    assert "src/pe@<40 hex digits>" in str(caught.value)
    with pytest.raises(UsageError):
        resolve_source("", None)  # type: ignore[arg-type]

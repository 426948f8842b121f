"""Foundry Local's folder: found by its scan's rules, loadable by the runtime inside it, and really generating in genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import SMALL, Model
from support.onnx_runtime import genai_greedy, genai_logits, logits

from gptoss_convert.config import release_config
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.exports import write
from gptoss_convert.convert.exports.foundry_local import PREFILL, kv_cache
from gptoss_convert.convert.exports.onnx_facts import resident
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.onnx_layout import Variant
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.verify import verify
from gptoss_convert.errors import BadInput, DigestMismatch, Refused, UsageError

EXPERTS_OF = {"1.26": "int8", "1.31": "int8", "1.32": "mxfp4"}


@pytest.fixture(scope="module")
def folders(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX folders by the oldest runtime that they are for, which lose nothing."""
    root = tmp_path_factory.mktemp("onnx")
    for runtime in EXPERTS_OF:
        convert(hf_folder, root / runtime, Options("onnx", onnx_runtime=runtime), silent)
    return {runtime: root / runtime for runtime in EXPERTS_OF}


def export(path: Path, out: Path, **request: Any) -> Path:
    """The model's folder in the export."""
    write.export(path, out, "foundry-local", Request(**request), show=silent)
    (model,) = (out / "local").glob("*/v*")
    return model


def scan(cache: Path) -> dict[str, Path]:
    """Models by name, as Foundry Local's scan of its cache has them: below a publisher's folder, two files, no download."""
    found = {}
    for place in sorted(p for publisher in cache.iterdir() if publisher.is_dir() for p in publisher.rglob("*")):
        card = place / "inference_model.json"
        if not (place / "genai_config.json").is_file() or not card.is_file() or (place / "download.tmp").exists():
            continue
        name = json.loads(card.read_text()).get("Name")
        if isinstance(name, str):
            found[name if ":" in name else f"{name}:0"] = place
    return found


def genai_first(folder: Path, ids: list[int]) -> Any:
    """Logits after a prompt, in a conversation as long as genai_config.json lets it be."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(np.array([ids], np.int32))
    return generator.get_logits()[0, -1]


def reads(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("asked", "name"),
    [(None, "gpt-oss-int8-cpu:1"), ("mine", "mine:1"), ("My.gpt-oss_2:7", "My.gpt-oss_2:7")],
)
def test_the_scan_of_the_cache_finds_it_by_its_name(
    folders: dict[str, Path], tmp_path: Path, asked: str | None, name: str
) -> None:
    place = export(folders["1.31"], tmp_path / "out", name=asked)
    assert scan(tmp_path / "out") == {name: place}
    assert json.loads((place / "inference_model.json").read_text()) == {"Name": name, "PromptTemplate": None}
    stem, _, version = name.partition(":")
    assert place == tmp_path / f"out/local/{stem}-{version}/v{version}"
    assert f"foundry model run {stem}" in (tmp_path / "out/README.md").read_text()


def test_a_name_given_at_the_conversion_stays(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "onnx", Options("onnx", onnx_runtime="1.28", name="ours:3"), silent)
    export(tmp_path / "onnx", tmp_path / "out")
    assert list(scan(tmp_path / "out")) == ["ours:3"]
    export(tmp_path / "onnx", tmp_path / "other", name="other")
    assert list(scan(tmp_path / "other")) == ["other:1"]


@pytest.mark.parametrize("name", ["a b", "../x", 'a"b', "a:b", "a:1:2", "-a", "ä", "a\nb", "x" * 97])
def test_what_is_no_name_is_refused(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        export(folders["1.31"], tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


# --- which runtime ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "engine", "loads"),
    [
        ("1.26", "1.26", True), ("1.26", None, True), ("1.26", "1.32", True),
        ("1.31", "1.26", False), ("1.31", "1.28", False), ("1.31", None, True), ("1.31", "1.31", True),
        ("1.32", "1.26", False), ("1.32", None, False), ("1.32", "1.32", True),
    ],
)  # fmt: skip
def test_what_the_runtime_inside_does_not_load_is_refused(
    folders: dict[str, Path], tmp_path: Path, folder: str, engine: str | None, loads: bool
) -> None:
    if loads:
        export(folders[folder], tmp_path / "out", engine=engine)
        return
    with pytest.raises(Refused, match=f"with ONNX Runtime {engine or '1.31'} .* does not load") as error:
        export(folders[folder], tmp_path / "out", engine=engine)
    assert f"--to onnx --onnx-runtime {engine or '1.31'}" in str(error.value.remedy)
    assert f"need ONNX Runtime {folder}" in str(error.value.found).replace("needs", "need")


@pytest.mark.parametrize("engine", ["1", "vllm", "1.x", "1.26.0.0", "-1.2", "1.٣١", "1.31 "])
def test_what_is_no_runtime_is_refused(folders: dict[str, Path], tmp_path: Path, engine: str) -> None:
    with pytest.raises(UsageError, match="--engine of foundry-local") as error:
        export(folders["1.26"], tmp_path / "out", engine=engine)
    assert "1.31 (SDK 2.2.1)" in str(error.value.expected)


def test_a_runtime_may_be_named_to_its_last_digit(folders: dict[str, Path], tmp_path: Path) -> None:
    export(folders["1.31"], tmp_path / "out", engine="1.31.0")
    with pytest.raises(Refused, match=r"with ONNX Runtime 1\.26 "):
        export(folders["1.31"], tmp_path / "other", engine="1.26.0")


@pytest.mark.parametrize("engine", ["1.23", "0.1", "0.0"])
def test_a_runtime_for_which_nothing_can_be_converted_is_refused(
    folders: dict[str, Path], tmp_path: Path, engine: str
) -> None:
    with pytest.raises(UsageError, match="cannot compute gpt-oss rightly") as error:
        export(folders["1.26"], tmp_path / "out", engine=engine)
    assert error.value.expected == "1.24 or later"


def test_the_remedy_keeps_the_experts_as_they_were(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "onnx", Options("onnx", onnx_runtime="1.31", experts="int4"), silent)
    with pytest.raises(Refused) as error:
        export(tmp_path / "onnx", tmp_path / "out", engine="1.26")
    assert "--onnx-runtime 1.26 --experts int4;" in str(error.value.remedy)


def test_the_first_steps_say_where_the_known_command_line_does_not_load_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def steps(folder: str) -> tuple[list[str], str]:
        found = write.export(folders[folder], tmp_path / folder, "foundry-local", Request(), show=silent)
        return found.first_steps, " ".join((tmp_path / folder / "README.md").read_text().split())

    plain = [
        "foundry cache location", "copy the folder local into what that names", "foundry cache list",
        "foundry model run gpt-oss-int8-cpu",
    ]  # fmt: skip
    older, page = steps("1.26")
    assert older == plain
    assert "The command line must be later" not in page
    (first, *rest), page = steps("1.31")
    assert rest == plain
    for text in (first, page):
        assert "later than 0.10.3, whose ONNX Runtime 1.26 does not load this folder" in text
        assert "--to onnx --onnx-runtime 1.26" in text


def test_the_note_names_the_foundry_local_that_does_not_load_it(folders: dict[str, Path], tmp_path: Path) -> None:
    newer = write.export(folders["1.31"], tmp_path / "a", "foundry-local", Request(), show=silent).document["notes"]
    older = write.export(folders["1.26"], tmp_path / "b", "foundry-local", Request(), show=silent).document["notes"]
    assert any("command line 0.10.3 (ONNX Runtime 1.26)" in note and "--onnx-runtime 1.26" in note for note in newer)
    assert not any("does not load" in note for note in older)


@pytest.mark.parametrize("kind", ["mxfp4", "bf16", "int4", "gguf"])
def test_what_is_no_onnx_is_refused(kinds: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    with pytest.raises(Refused, match="foundry-local cannot serve") as error:
        export(kinds(kind), tmp_path / "out")
    assert "--to onnx" in str(error.value.remedy)


# --- what genai makes of it ---------------------------------------------------------------------------------------------


def test_genai_generates_from_it_what_transformers_would(
    folders: dict[str, Path], small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the chat template to the last token, with nothing set but that the likeliest token is taken."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    from tokenizers import Tokenizer

    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")
    place = export(folders["1.31"], tmp_path / "out", context=512)
    tokenizer = og.Tokenizer(og.Model(str(place)))
    messages = json.dumps([{"role": "user", "content": "Hi, how's it? 你好"}])
    prompt = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    ids = [int(i) for i in tokenizer.encode(prompt)]
    assert ids == Tokenizer.from_file(str(place / "tokenizer.json")).encode(prompt).ids
    made = genai_greedy(place, ids, 24)
    assert len(made) == 24 or made[-1] in reads(place)["model"]["eos_token_id"]
    want = small_model.logits([*ids, *made]).numpy()
    assert made == [int(want[len(ids) - 1 + n].argmax()) for n in range(len(made))]


def test_a_prompt_in_pieces_computes_what_it_computes_whole(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 360, 2 * PREFILL + 77)]
    for runtime in ("1.26", "1.31"):
        place = export(folders[runtime], tmp_path / runtime, context=2048)
        whole = logits(folders[runtime], ids, len(ids))[-1]
        assert np.abs(genai_logits(place, ids, len(ids))[0] - whole).max() < 1e-4


def test_genais_own_reader_of_the_configuration_takes_it(folders: dict[str, Path], tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    place = export(folders["1.31"], tmp_path / "out")
    og.Config(str(place))
    table = reads(place)
    (place / "genai_config.json").write_text(json.dumps({**table, "search": {**table["search"], "chunk_sizes": 1}}))
    with pytest.raises(RuntimeError, match="chunk_sizes"):
        og.Config(str(place))


def test_the_context_is_what_genai_allocates_and_sampling_is_openais(folders: dict[str, Path], tmp_path: Path) -> None:
    search = reads(export(folders["1.31"], tmp_path / "a", context=777))["search"]
    wanted = {"max_length": 777, "chunk_size": PREFILL, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "do_sample": True}
    assert {key: search[key] for key in wanted} == wanted
    assert reads(export(folders["1.31"], tmp_path / "b"))["search"]["max_length"] == 8192, "all that the model has"
    with pytest.raises(UsageError, match="more than the model has"):
        export(folders["1.31"], tmp_path / "c", context=8193)
    with pytest.raises(UsageError, match="less context than the window") as error:
        export(folders["1.31"], tmp_path / "c", context=7)
    assert error.value.expected == "at least 8"
    for runtime, context in (("1.31", 8), ("1.26", 3)):
        place = export(folders[runtime], tmp_path / runtime, context=context)
        assert np.isfinite(genai_first(place, [5] * 2)).all()


def test_every_end_token_ends_generation(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    source = copied(folders["1.31"])
    wanted = {SMALL.token_id(official) for official in (200002, 199999, 200012)}
    assert set(reads(export(source, tmp_path / "a"))["model"]["eos_token_id"]) == wanted
    table = reads(source)
    table["model"]["eos_token_id"] = SMALL.token_id(200002)
    (source / "genai_config.json").write_text(json.dumps(table))
    (source / "gptoss-certificate.json").unlink()
    found = write.export(source, tmp_path / "b", "foundry-local", Request(), show=silent)
    (place,) = (tmp_path / "b/local").glob("*/v*")
    assert set(reads(place)["model"]["eos_token_id"]) == wanted
    assert any("genai_config.json was completed" in note for note in found.document["notes"])


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"model": 1, "search": {}}', '{"model": {"type": "llama"}, "search": {}}', "{"]
)
def test_another_models_configuration_is_refused(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path], text: str
) -> None:
    source = copied(folders["1.31"])
    (source / "genai_config.json").write_text(text)
    with pytest.raises(BadInput) as error:
        export(source, tmp_path / "out")
    assert "genai_config.json" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("filename", "../../other.onnx"), ("num_hidden_layers", 99), ("head_size", None), ("sliding_window", None),
        ("pipeline", []),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_the_graph_is_refused(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path], key: str, value: object
) -> None:
    source = copied(folders["1.31"])
    (source / "gptoss-certificate.json").unlink()
    table = reads(source)
    table["model"]["decoder"].pop(key, None)
    table["model"]["decoder"] |= {} if value is None else {key: value}
    (source / "genai_config.json").write_text(json.dumps(table))
    with pytest.raises(BadInput, match="not of this model") as error:
        export(source, tmp_path / "out")
    assert error.value.tensor == f"model.decoder.{key}"
    assert error.value.file == str(source / "genai_config.json")


def test_another_folders_configuration_is_refused(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    """Of the same model, but with a cache of windows that this graph does not have."""
    source = copied(folders["1.26"])
    (source / "gptoss-certificate.json").unlink()
    (source / "genai_config.json").write_bytes((folders["1.31"] / "genai_config.json").read_bytes())
    with pytest.raises(BadInput, match="not of this model") as error:
        export(source, tmp_path / "out")
    assert (error.value.tensor, error.value.expected) == ("model.decoder.sliding_window", "no such key")


@pytest.mark.parametrize("name", ["genai_config.json", "inference_model.json"])
def test_what_was_edited_after_the_proof_is_not_certified_anew(hf_folder: Path, tmp_path: Path, name: str) -> None:
    convert(hf_folder, tmp_path / "onnx", Options("onnx", onnx_runtime="1.26", name="ours"), silent)
    place = tmp_path / "onnx" / name
    place.write_text(place.read_text().replace('"temperature": 1.0', '"temperature": 0.1').replace("ours", "others"))
    with pytest.raises(DigestMismatch, match="not the one that its certificate names") as error:
        export(tmp_path / "onnx", tmp_path / "out")
    assert error.value.file == str(place)


def test_what_a_user_says_of_sampling_and_threads_stays(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    source = copied(folders["1.31"])
    (source / "gptoss-certificate.json").unlink()
    table = reads(source)
    table["search"]["temperature"] = 0.25
    table["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 3
    table["model"]["eos_token_id"] = {"no": "tokens"}
    (source / "genai_config.json").write_text(json.dumps(table))
    made = reads(export(source, tmp_path / "out"))
    assert made["search"]["temperature"] == 0.25
    assert made["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    assert set(made["model"]["eos_token_id"]) == {SMALL.token_id(n) for n in (200002, 199999, 200012)}


def test_a_name_that_the_conversion_took_and_foundry_local_does_not(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "onnx", Options("onnx", onnx_runtime="1.26", name="My model"), silent)
    with pytest.raises(UsageError, match="not a name") as error:
        export(tmp_path / "onnx", tmp_path / "out")
    assert error.value.file == str(tmp_path / "onnx/inference_model.json")
    assert error.value.remedy == "say another: --name NAME[:VERSION]"
    export(tmp_path / "onnx", tmp_path / "out", name="my-model")


def test_a_folder_without_genai_config_is_named(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    source = copied(folders["1.31"])
    (source / "genai_config.json").unlink()
    with pytest.raises(Refused, match=r"without genai_config\.json") as error:
        export(source, tmp_path / "out")
    assert "--to onnx" in str(error.value.remedy)


def test_the_page_has_the_memory_of_this_model(folders: dict[str, Path], tmp_path: Path) -> None:
    export(folders["1.26"], tmp_path / "out", context=5000)
    page = " ".join((tmp_path / "out/README.md").read_text().split())
    weights = sum((folders["1.26"] / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert f"Weights: {weights / 1e6:.2f} MB." in page
    assert f"the logits of such a piece are {512 * SMALL.vocab * 4 / 1e6:.2f} MB" in page
    assert f"| 5000 | {3 * 5000 * 2 * 2 * 64 * 4 / 1e6:.2f} MB |" in page, (
        "three layers, two heads of 64, keys and values"
    )
    assert "whole account: `local/gpt-oss-int8-cpu-1/v1/gptoss-certificate.json`" in page
    assert (tmp_path / "out/local/gpt-oss-int8-cpu-1/v1/gptoss-certificate.json").is_file()


def test_what_is_added_and_what_is_not_known_is_said(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    source = copied(folders["1.26"])
    (source / "special_tokens_map.json").unlink()
    notes = write.export(source, tmp_path / "out", "foundry-local", Request(), show=silent).document["notes"]
    assert any("special_tokens_map.json is made" in note for note in notes)
    assert any("harmony's channels" in note for note in notes)
    assert any("ORT_QMOE_CPU_QNBIT_GEMM=0" in note for note in notes), "of int8 experts"


def test_the_page_says_what_becomes_of_the_experts_in_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    def page(folder: str) -> str:
        export(folders[folder], tmp_path / folder, engine="1.32")
        return " ".join((tmp_path / folder / "README.md").read_text().split())

    packed, integers = page("1.32"), page("1.31")
    for text in ("MXFP4 experts stay mapped from the file.", "very slow on processors without AVX-512"):
        assert text in packed
        assert text not in integers
    for text in ("copies them into memory, all of them", "rounds the activations of int8 experts"):
        assert text in integers
        assert text not in packed


def test_integers_before_1_31_take_what_was_measured_of_them() -> None:
    of_int8, of_int4 = (
        resident(Variant(kind, "f32", "f32", "f32", "f32", window_cache=False)) for kind in ("int8", "int4")
    )
    assert "leaves int8 experts mapped" in of_int8
    assert "unpacks int4 experts" in of_int4


def test_the_export_of_an_export_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    place = export(folders["1.31"], tmp_path / "a")
    again = export(place, tmp_path / "b")
    for path in place.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_from_the_hub_leaves_its_lists_of_digests_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """They are of other files: genai_config.json is another here."""
    write.export(folders["1.31"], tmp_path / "hub", "huggingface", Request(), show=silent)
    place = export(tmp_path / "hub", tmp_path / "out")
    assert {p.name for p in place.iterdir()} >= {"README.md", "model.onnx", "gptoss-certificate.json"}
    assert not {p.name for p in place.iterdir()} & {"SHA256SUMS", "gptoss-export.json"}
    assert verify(place).exit_code() == 0


def test_the_certificate_stays_true_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from gptoss_convert.cli import cli

    place = export(folders["1.31"], tmp_path / "out")
    certificate = json.loads((place / "gptoss-certificate.json").read_text())
    assert "genai_config.json" in certificate["artifact"]["notes"][-1]
    found = CliRunner().invoke(cli, ["verify", str(place), "--json"])
    assert found.exit_code == 0, found.output
    (place / "genai_config.json").write_text("{}")
    assert CliRunner().invoke(cli, ["verify", str(place), "--json"]).exit_code != 0


def test_keys_and_values_of_the_release() -> None:
    """f32: 4096 bytes a token and layer; with a cache of windows half of the layers keep 128 tokens."""
    config = release_config(24, 32)
    all_kept = Variant("int8", "f32", "f32", "f32", "f32", window_cache=False)
    windows = Variant("int8", "f32", "f32", "f32", "f32", window_cache=True)
    assert kv_cache(config, all_kept, 131072) == 24 * 131072 * 4096
    assert kv_cache(config, windows, 131072) == 12 * (131072 + 128) * 4096


def test_the_certificate_lists_what_was_written_once_and_never_itself(
    folders: dict[str, Path], tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    source = copied(folders["1.31"])
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    certificate = source / "gptoss-certificate.json"
    document = json.loads(certificate.read_text())
    document["artifact"]["files"] = [f for f in document["artifact"]["files"] if f["name"] != "special_tokens_map.json"]
    certificate.write_text(json.dumps(document))
    place = export(source, tmp_path / "out")
    made = json.loads((place / "gptoss-certificate.json").read_text())["artifact"]
    names = [file["name"] for file in made["files"]]
    assert sorted(names) == sorted({p.name for p in place.iterdir()} - {"gptoss-certificate.json"})
    assert [note for note in made["notes"] if "after the proof" in note] == [
        "genai_config.json, inference_model.json, special_tokens_map.json: written by export --for foundry-local, after the proof"
    ]

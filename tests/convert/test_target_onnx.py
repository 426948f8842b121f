"""The ONNX target and its way back: places, exactness from every source, what is refused, and folders that were changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.canonical import canonical_values
from support.checkpoints import SMALL, Model, write_bf16
from support.layouts import LAYOUTS
from support.sparse import RELEASES, write_sparse_release
from support.tokenizer import small_tokenizer

from gptoss_convert.cli import cli
from gptoss_convert.cli.convert import command
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.convert.inspect import inspect_source
from gptoss_convert.convert.names import as_stack, canonical_shapes
from gptoss_convert.convert.onnx_layout import DATA_FILE, MODEL_FILE
from gptoss_convert.convert.proof import prove
from gptoss_convert.convert.source import Layout, open_source
from gptoss_convert.convert.verify import verify
from gptoss_convert.errors import BadInput, ProofFailed, Refused, UsageError
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.onnx import ALIGNMENT, read_header

GIB = 1 << 30
VARIANTS: dict[str, dict[str, Any]] = {
    "mxfp4": {},
    "int8": {"experts": "int8"},
    "int4": {"experts": "int4", "dense": "int4"},
    "mixed": {"experts": "mxfp4", "dense": "int8", "embedding": "int4", "router": "f32", "head": "int4"},
    "old": {"experts": "int4", "dense": "int8", "onnx_runtime": "1.26.0"},
}


@pytest.fixture(scope="module")
def folders(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory, convert: Any) -> dict[str, Path]:
    """`small_model` in each variant."""
    made = tmp_path_factory.mktemp("onnx")
    for name, options in VARIANTS.items():
        convert(hf_folder, made / name, "onnx", **options)
    return {name: made / name for name in VARIANTS}


# --- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_has_a_place_of_its_own_at_a_multiple_of_4096(folders: dict[str, Path], name: str) -> None:
    with SourceFile(folders[name] / MODEL_FILE) as file:
        tensors = [t for t in read_header(file).tensors.values() if t.raw is None]
    ends = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        assert tensor.offset % ALIGNMENT == 0
        assert tensor.offset >= ends
        ends = tensor.offset + tensor.nbytes
    assert ends == (folders[name] / DATA_FILE).stat().st_size


def test_mxfp4_experts_are_the_sources_own_bytes(folders: dict[str, Path], small_model: Model) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    model = onnx.load(folders["mxfp4"] / MODEL_FILE, load_external_data=False)
    data = (folders["mxfp4"] / DATA_FILE).read_bytes()
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    for layer in range(SMALL.layers):
        for ours, theirs in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            for part, half in (("qweight", "blocks"), ("scales", "scales")):
                place = places[f"model.layers.{layer}.moe.experts.{ours}.{part}"]
                first, length = int(place["offset"]), int(place["length"])
                expected = small_model.tensors[f"block.{layer}.mlp.{theirs}.{half}"].numpy().tobytes()
                assert data[first : first + length] == expected


def test_tokenizer_and_template_travel_unchanged(folders: dict[str, Path], hf_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folders["int4"] / name).read_bytes() == (hf_folder / name).read_bytes()


def test_an_old_runtime_gets_none_of_the_newer_attributes(folders: dict[str, Path]) -> None:
    graph, config = (folders["old"] / MODEL_FILE).read_bytes(), (folders["old"] / "genai_config.json").read_text()
    for newer in (b"sliding_window_cache", b"weights_prepacked", b"quant_type", b"past_sliding_length"):
        assert newer not in graph
        assert newer == b"past_sliding_length" or newer in (folders["mxfp4"] / MODEL_FILE).read_bytes()
    assert "sliding_window" not in config


def test_a_name_makes_the_folder_one_that_foundry_local_finds(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    convert(hf_folder, tmp_path / "onnx", "onnx", name="my-model")
    table = json.loads((tmp_path / "onnx" / "inference_model.json").read_text())
    assert table == {"Name": "my-model", "PromptTemplate": None}
    assert not (tmp_path / "onnx" / "download.tmp").exists()
    search = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert search["search"]["max_length"] == search["model"]["context_length"] == SMALL.max_position


# --- and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("experts", ["mxfp4", "int8"])
def test_every_source_comes_back_with_every_value(
    layouts: dict[str, Path], layout: str, experts: str, tmp_path: Path, convert: Any, tokenizer_folder: Path,
    awkward_model: Model,
) -> None:  # fmt: skip
    given = {"tokenizer": tokenizer_folder} if "original" in layout else {}
    outcome = convert(layouts[layout], tmp_path / "onnx", "onnx", experts=experts, **given)
    assert outcome.proof.lossless
    assert outcome.document["lost"] in ([], outcome.plan.source.losses)
    if layout not in ("metal", "gguf, f16 and f32"):  # one has fewer rows of the vocabulary, one has rounded some
        values = canonical_values(awkward_model)
        with open_source(tmp_path / "onnx") as source:
            for name, shape in canonical_shapes(source.config).items():
                n, rows, _ = as_stack(shape)
                got = np.stack([source.views[name].read(e, 0, rows).values() for e in range(n)])
                assert np.array_equal(got.reshape(shape), np.asarray(values[name]).reshape(shape)), name


@pytest.mark.parametrize("name", ["mxfp4", "int8"])
def test_a_lossless_folder_converts_back_to_the_release_byte_for_byte(
    folders: dict[str, Path], name: str, hf_folder: Path, tmp_path: Path, convert: Any
) -> None:
    convert(folders[name], tmp_path / "hf", "hf")
    convert(hf_folder, tmp_path / "direct", "hf")
    for path in sorted((tmp_path / "direct").glob("*.safetensors")):
        if name == "mxfp4":
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    with open_source(tmp_path / "hf") as again, open_source(hf_folder) as first:
        for key, view in first.views.items():
            n, rows, _ = view.stack
            for expert in range(n):
                mine, theirs = again.views[key].read(expert, 0, rows), view.read(expert, 0, rows)
                assert np.array_equal(mine.values(), theirs.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_is_inspected_and_verified(folders: dict[str, Path], name: str) -> None:
    found = inspect_source(folders[name])
    assert found.layout is Layout.ONNX
    assert not [oddity for oddity in found.oddities if oddity.severity == "error"]
    assert {file.name for file in found.files if file.role == "weights"} == {MODEL_FILE, DATA_FILE}
    assert verify(folders[name], repo="none").exit_code() == 0


def test_a_folder_is_compared_with_its_source(folders: dict[str, Path], hf_folder: Path) -> None:
    run = CliRunner().invoke(cli, ["compare", str(hf_folder), str(folders["int8"]), "--json"])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_its_integers_have_no_gguf_type_and_are_encoded_on_request(
    folders: dict[str, Path], name: str, tmp_path: Path, convert: Any
) -> None:
    with pytest.raises(UsageError, match="GGUF has no type"):
        convert(folders[name], tmp_path / "m.gguf", "gguf")
    convert(folders[name], tmp_path / "m.gguf", "gguf", experts="q8_0", dense="f32", allow_larger=True)


def test_the_same_folder_comes_out_of_its_own_folder(folders: dict[str, Path], tmp_path: Path, convert: Any) -> None:
    convert(folders["int8"], tmp_path / "again", "onnx", experts="int8")
    for name in (MODEL_FILE, DATA_FILE, "genai_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folders["int8"] / name).read_bytes()


# --- changed folders ---------------------------------------------------------------------------------------------------


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        (MODEL_FILE, lambda b: b.replace(b"local_window_size", b"local_window_sizf", 1), "not the one that config.json"),
        (MODEL_FILE, lambda b: b[: len(b) // 2], "not a protocol buffer"),
        (MODEL_FILE, lambda b: b.replace(b"gptoss-convert.variant", b"gptoss-convert.variann"), "not this tool's"),
        (MODEL_FILE, lambda b: b.replace(b'"experts": "mxfp4"', b'"experts": "mxfp5"'), "not this tool's"),
        (MODEL_FILE, lambda b: b.replace(b'"window_cache": true', b'"window_cache": 1   '), "not this tool's"),
        (DATA_FILE, lambda b: b[:1000] + b"\1" + b[1001:], "rotary table"),
        (DATA_FILE, lambda b: b[:-1], "beyond the data file"),
        (DATA_FILE, lambda b: b + b"\0", "goes on after its last tensor"),
        ("config.json", lambda b: b.replace(b'"sliding_window": 8', b'"sliding_window": 9'), "not the one that config"),
        ("config.json", lambda b: b.replace(b'"rope_theta": 40000', b'"rope_theta": 50000'), "rotary table"),
    ],
)  # fmt: skip
def test_a_changed_folder_is_refused(
    folders: dict[str, Path], copied: Callable[[Path], Path], file: str, change: Any, what: str
) -> None:
    folder = copied(folders["mxfp4"])
    before = (folder / file).read_bytes()
    spoil(folder / file, change)
    assert (folder / file).read_bytes() != before
    with pytest.raises(BadInput, match=what):
        open_source(folder)


def test_another_machines_last_bit_of_a_cosine_is_no_corruption(
    folders: dict[str, Path], copied: Callable[[Path], Path]
) -> None:
    folder = copied(folders["mxfp4"])
    spoil(folder / DATA_FILE, lambda b: b[:4096] + bytes([b[4096] ^ 1]) + b[4097:])
    open_source(folder).close()
    spoil(folder / DATA_FILE, lambda b: b[:4096] + bytes([b[4096] ^ 4]) + b[4097:])
    with pytest.raises(BadInput, match="rotary table"):
        open_source(folder)


@pytest.mark.parametrize("missing", [DATA_FILE, "config.json"])
def test_a_folder_without_one_of_its_files_is_refused(
    folders: dict[str, Path], copied: Callable[[Path], Path], missing: str
) -> None:
    folder = copied(folders["mxfp4"])
    (folder / missing).unlink()
    with pytest.raises(BadInput):
        open_source(folder)


def test_a_wrong_weight_in_the_artifact_fails_the_proof(
    hf_folder: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_convert.convert import conversion

    def spoiled(source: Any, artifact: Any, **more: Any) -> Any:
        path = artifact.files[1].path
        with SourceFile(artifact.files[0].path) as file:
            place = read_header(file).tensors["model.layers.1.moe.experts.down_proj.qweight"]
        with path.open("r+b") as out:
            out.seek(place.offset)
            out.write(bytes(64))
        return true(source, artifact, **more)

    true = conversion.prove
    monkeypatch.setattr(conversion, "prove", spoiled)
    with pytest.raises(ProofFailed, match="does not hold the source's values"):
        convert(hf_folder, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight_Q4",
        "model.layers.1.attn.qkv_proj.MatMul.weight_Q8",
        "model.layers.0.moe.router.MatMul.weight_Q4",
        "lm_head.MatMul.weight_Q8",
        "model.layers.1.moe.experts.gate_up_proj.qweight",
    ],
)
def test_one_wrong_code_in_rounded_weights_fails_the_proof(
    hf_folder: Path, tmp_path: Path, convert: Any, tensor: str
) -> None:
    forms = {"experts": "int4", "dense": "int8", "embedding": "int4", "router": "int4"}
    convert(hf_folder, tmp_path / "onnx", "onnx", **forms)
    with SourceFile(tmp_path / "onnx" / MODEL_FILE) as file:
        place = read_header(file).tensors[tensor]
    spoil(tmp_path / "onnx" / DATA_FILE, lambda b: flipped(b, place.offset + place.nbytes // 3))
    with (
        open_source(hf_folder) as source,
        open_source(tmp_path / "onnx") as artifact,
        pytest.raises(ProofFailed, match="not where rounding puts it"),
    ):
        prove(source, artifact, threads=1, advance=lambda _: None)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :]


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"onnx_runtime": "1.23"}, "cannot compute gpt-oss rightly"),
        ({"onnx_runtime": "new"}, "not a version"),
        ({"experts": "mxfp4", "onnx_runtime": "1.31.0"}, "before 1.32"),
        ({"experts": "q8_0"}, "--experts cannot be q8_0 in ONNX"),
        ({"dense": "bf16"}, "--dense cannot be bf16 in ONNX"),
        ({"type": "q4_0"}, "--type is for --to gguf"),
        ({"widen": "none"}, "--widen is for --to gguf"),
        ({"split_bytes": 10**6}, "one data file"),
    ],
)
def test_what_onnx_does_not_have_is_refused(
    hf_folder: Path, tmp_path: Path, convert: Any, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        convert(hf_folder, tmp_path / "onnx", "onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["embedding", "router", "head"])
def test_its_options_are_for_no_other_target(hf_folder: Path, tmp_path: Path, convert: Any, option: str) -> None:
    for to in ("gguf", "hf"):
        with pytest.raises(UsageError, match=f"--{option} is for --to onnx"):
            convert(hf_folder, tmp_path / ("m.gguf" if to == "gguf" else "m"), to, **{option: "int8"})


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_a_gguf_has_none_of_its_integers(hf_folder: Path, tmp_path: Path, convert: Any, codec: str) -> None:
    with pytest.raises(UsageError, match="--experts cannot be"):
        convert(hf_folder, tmp_path / "m.gguf", "gguf", experts=codec)


def test_calibrated_rounding_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    arguments = [str(hf_folder), str(tmp_path / "o"), "--to", "onnx", "--experts", "int4"]
    run = CliRunner().invoke(command, [*arguments, "--method", "gptq", "--calibration", "default"])
    assert isinstance(run.exception, UsageError)
    assert "fixed rules" in str(run.exception)


def test_floating_point_experts_are_rounded_only_when_told(small_model: Model, tmp_path: Path, convert: Any) -> None:
    write_bf16(small_model, tmp_path / "bf16")
    with pytest.raises(UsageError, match="no form of these experts"):
        convert(tmp_path / "bf16", tmp_path / "onnx", "onnx")


def test_widths_that_blocks_do_not_divide_are_refused_by_name(tmp_path: Path, convert: Any) -> None:
    write_bf16(Model(replace(SMALL, hidden=160, heads=3, kv_heads=1, head_dim=48)), tmp_path / "in")
    with pytest.raises(Refused, match=r"blocks of 32 do not divide") as caught:
        convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="int8", dense="int8")
    assert caught.value.found == "144 columns"
    convert(tmp_path / "in", tmp_path / "onnx", "onnx", experts="int8")


def test_auto_for_an_older_runtime_is_the_exact_int8(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    outcome = convert(hf_folder, tmp_path / "onnx", "onnx", onnx_runtime="1.28.0")
    assert outcome.document["options"]["experts"] == "int8"
    assert outcome.document["lost"] == []


def test_a_foreign_graph_is_named_and_not_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="other"), tmp_path / MODEL_FILE)
    with pytest.raises(BadInput, match="not this tool's"):
        open_source(tmp_path)


# --- before the first byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASES)
def test_the_releases_are_forecast_to_need_less_than_a_gibibyte_and_a_half(tmp_path: Path, name: str) -> None:
    small_tokenizer(tmp_path / "tokenizer", 400)
    write_sparse_release(name, tmp_path / name, tmp_path / "tokenizer")
    sizes = {}
    for experts, dense in (("mxfp4", "f32"), ("int8", "f32"), ("int4", "int4")):
        options = Options(to="onnx", experts=experts, dense=dense, threads=16)
        found = foresee(tmp_path / name, tmp_path / "onnx", options)
        assert found["peak_memory_bytes"] < 1.5 * GIB
        sizes[experts] = round(found["output_bytes"] / 1e9, 1)
    assert (
        sizes
        == {
            "gpt-oss-20b": {"mxfp4": 17.4, "int8": 28.8, "int4": 15.1},
            "gpt-oss-120b": {"mxfp4": 69.6, "int8": 137.7, "int4": 75.1},
        }[name]
    )


def test_a_dry_run_names_every_tensor_and_its_fate(hf_folder: Path, tmp_path: Path) -> None:
    found = foresee(hf_folder, tmp_path / "onnx", Options(to="onnx", experts="int8", dense="int8"))
    fates = {(row["from"], row["codec"]): row["fate"] for row in found["tensors"]}
    assert fates == {
        ("mxfp4", "int8_moe"): "transcoded exactly",
        ("bf16", "int8_mm"): "rounded to int8_mm",
        ("bf16", "f32"): "widened exactly",
    }
    assert json.dumps(found)
    assert not (tmp_path / "onnx").exists()


def test_the_written_files_have_the_forecast_sizes(folders: dict[str, Path], hf_folder: Path, tmp_path: Path) -> None:
    found = foresee(hf_folder, tmp_path / "onnx", Options(to="onnx", **VARIANTS["mixed"]))
    for file in found["files"]:
        assert (folders["mixed"] / file["name"]).stat().st_size == file["size"]

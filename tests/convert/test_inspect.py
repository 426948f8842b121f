"""inspect: what a source is and everything odd about it, each oddity provoked on a small checkpoint."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from support import safetensors_files as st
from support.checkpoints import (
    AWKWARD,
    RELEASE_20B,
    RELEASE_120B,
    SMALL,
    Model,
    Spec,
    write_bf16,
    write_bf16_bug,
    write_gguf,
    write_hf,
    write_metal,
    write_original,
    write_per_expert,
    write_unsloth_linear,
)
from support.hub import pinned, sha256, table
from support.release import config_hf, hf_entries, pretty, write_companions
from support.tokenizer import CHAT_TEMPLATE

from gptoss_convert.cli.inspect import command, render
from gptoss_convert.convert import inspect_beside, official
from gptoss_convert.convert.inspect import Inspection, inspect_source
from gptoss_convert.convert.inspect_beside import Oddity
from gptoss_convert.errors import BadInput, ExitCode
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import build_header, read_header, string

MODEL = Model(SMALL)
TEXTS = {"the tokenizer is not an official one", "the chat template is not an official one"}
Write = Callable[[Model, Path], Any]


def gguf_at(model: Model, folder: Path) -> None:
    write_gguf(model, folder / "m.gguf")


def metal_at(model: Model, folder: Path) -> None:
    write_metal(model, folder / "model.bin")


def odd(found: Inspection, severity: str = "error") -> list[Oddity]:
    return [oddity for oddity in found.oddities if oddity.severity == severity]


def only(found: Inspection) -> Oddity:
    (oddity,) = odd(found)
    assert found.exit_code() == ExitCode.BAD_INPUT
    return oddity


def replace(folder: Path, old: str, new: str) -> None:
    """Replace bytes by as many others, in every file."""
    assert len(old) == len(new)
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    assert any(old.encode() in content for content in contents.values())
    for path, content in contents.items():
        path.write_bytes(content.replace(old.encode(), new.encode()))


def damaged(name: str, change: Callable[[torch.Tensor], None]) -> Model:
    model = Model(SMALL)
    change(model.tensors[name])
    return model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def shown(found: Inspection, **options: Any) -> str:
    """What a terminal would get, colours included."""
    stream = io.StringIO()
    console = Console(file=stream, highlight=False, force_terminal=True, width=200, color_system="standard")
    render(found, console, **{"every_tensor": False, **options})
    return stream.getvalue()


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "layout", "tensors", "dtypes"),
    [
        (write_hf, "hf", 63 - 3, {"BF16", "U8"}),
        (write_original, "original", 48, {"BF16", "U8"}),
        (metal_at, "metal", 42, {"BF16", "MXFP4"}),
        (write_bf16, "bf16", 54, {"BF16"}),
        (write_bf16_bug, "bf16-misnamed", 54, {"BF16"}),
        (write_unsloth_linear, "linearised", 114, {"BF16"}),
        (write_per_expert, "per-expert", 150, {"BF16"}),
        (gguf_at, "gguf", 60, {"BF16", "F32", "MXFP4"}),
    ],
)
def test_every_layout_is_recognised_and_a_sound_one_has_no_errors(
    tmp_path: Path, write: Write, layout: str, tensors: int, dtypes: set[str]
) -> None:
    write(MODEL, tmp_path)
    found = inspect_source(tmp_path, threads=3)
    assert (found.layout, len(found.tensors), {row["dtype"] for row in found.dtypes}) == (layout, tensors, dtypes)
    assert (odd(found), found.exit_code()) == ([], ExitCode.OK)
    assert found.model == "other: 3 layers, 6 experts (2 a token), hidden 160, intermediate 96"
    weights = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".gguf", ".bin")]
    assert found.weight_bytes == sum(path.stat().st_size for path in weights)
    assert found.values is not None
    assert (found.values.tensors, found.values.unread, found.values.bad) == (54, 0, {})


@pytest.mark.parametrize(
    ("spec", "name", "total", "active"),
    [(RELEASE_20B, "gpt-oss-20b", 20.91, 3.61), (RELEASE_120B, "gpt-oss-120b", 116.83, 5.13)],
)
def test_the_releases_are_known_by_their_widths_without_a_verdict_on_the_weights(
    tmp_path: Path, spec: Spec, name: str, total: float, active: float
) -> None:
    entries = hf_entries(spec)
    head = st.header(entries)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + sum(map(st.size, entries.values())))  # a sparse file
    (tmp_path / "config.json").write_text(pretty(config_hf(spec)))
    found = inspect_source(tmp_path, values=False)
    assert found.model == f"{name} (widths; not a verdict on the weights)"
    assert (found.config.parameters / 1e9, found.active_parameters / 1e9) == pytest.approx((total, active), abs=0.006)
    assert odd(found) == []
    assert f"mlp.experts.gate_up_proj_blocks U8 [{spec.experts}, 5760, 90, 16] ×{spec.layers}" in shown(found)


def test_a_single_file_and_a_hub_snapshot_are_sources_too(tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tuned"
    snapshot = repo / "snapshots" / ("ab" * 20)
    write_hf(MODEL, repo / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    for source in (snapshot, repo, snapshot / "model-00000-of-00003.safetensors"):
        found = inspect_source(source, values=False)
        assert (found.layout, found.revision, odd(found)) == ("hf", f"someone/tuned@{'ab' * 20}", [])
    write_gguf(MODEL, tmp_path / "m.gguf", split=20)
    found = inspect_source(tmp_path / "m-00002-of-00003.gguf", values=False)
    assert [file.name for file in found.files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_scale_bytes_are_counted_alike_in_every_layout_that_keeps_them(tmp_path: Path) -> None:
    model = Model(SMALL, awkward=AWKWARD)
    counts = torch.bincount(torch.cat([t.flatten() for n, t in model.tensors.items() if n.endswith("scales")]))
    for i, write in enumerate((write_hf, write_original, gguf_at, metal_at)):
        write(model, tmp_path / str(i))
        values = inspect_source(tmp_path / str(i)).as_dict()["values"]["mxfp4"]
        assert values["blocks_by_scale"] == {s: int(count) for s, count in enumerate(counts) if count}
        assert values["blocks_with_scale_0"] == int(counts[0]) > 0


def test_a_ggufs_metadata_are_told_scalars_whole_and_arrays_by_type_and_count(tmp_path: Path) -> None:
    gguf_at(MODEL, tmp_path)
    metadata = inspect_source(tmp_path, values=False).as_dict()["metadata"]
    assert metadata["gpt-oss.block_count"] == 3
    assert metadata["gpt-oss.rope.scaling.type"] == "yarn"
    assert metadata["tokenizer.ggml.tokens"] == {"array_of": "STRING", "count": 400}


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "old", "new"),
    [
        (write_hf, "model.layers.1.self_attn.sinks", "model.layers.1.self_attn.sunks"),
        (write_original, "block.1.attn.sinks", "block.1.attn.sunks"),
        (gguf_at, "blk.1.attn_sinks.weight", "blk.1.attn_sunks.weight"),
    ],
)
def test_missing_and_unexpected_tensors_are_named_as_the_source_names_them(
    tmp_path: Path, write: Write, old: str, new: str
) -> None:
    write(MODEL, tmp_path)
    replace(tmp_path, old, new)
    found = inspect_source(tmp_path)
    assert {(o.thing, o.where) for o in odd(found)} == {
        ("a tensor is missing", old),
        ("a tensor that gpt-oss does not have", new),
    }
    assert found.exit_code() == ExitCode.BAD_INPUT
    assert found.values is not None
    assert (found.values.tensors, found.values.unread) == (53, 1)


def test_a_missing_expert_is_one_oddity(tmp_path: Path) -> None:
    write_unsloth_linear(MODEL, tmp_path)
    replace(tmp_path, "layers.2.mlp.experts.down_projs.5.weight", "layers.2.mlp.experts.down_projs.7.weight")
    found = inspect_source(tmp_path)
    assert [o.where for o in odd(found) if o.thing == "a tensor is missing"] == [
        "model.layers.2.mlp.experts.down_projs.5.weight"
    ]


@pytest.mark.parametrize(
    ("write", "name", "shape", "other"),
    [
        (write_hf, "model.layers.1.mlp.router.weight", "[6,160]", "[160,6]"),
        (write_hf, "model.layers.1.mlp.experts.gate_up_proj_blocks", "[6,192,5,16]", "[6,192,16,5]"),
        (write_original, "block.1.attn.qkv.weight", "[640,160]", "[160,640]"),
    ],
)
def test_a_misshapen_tensor_is_one_oddity_that_shows_its_shape(
    tmp_path: Path, write: Write, name: str, shape: str, other: str
) -> None:
    write(MODEL, tmp_path)
    dtype = "U8" if "blocks" in name else "BF16"
    entry = f'"{name}":{{"dtype":"{dtype}","shape":'
    replace(tmp_path, entry + shape, entry + other)
    oddity = only(inspect_source(tmp_path))
    assert name in oddity.where
    assert oddity.found is not None
    assert other.strip("[]").replace(",", ", ") in oddity.found
    assert oddity.expected is not None or write is write_original


def test_a_stale_quantization_config_is_noted(tmp_path: Path) -> None:
    write_bf16(MODEL, tmp_path)
    table_ = json.loads((tmp_path / "config.json").read_text())
    table_["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(table_))
    found = inspect_source(tmp_path, values=False)
    assert (found.layout, odd(found)) == ("bf16", [])
    assert any("speaks of MXFP4" in note for note in found.notes)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "where"),
    [
        (write_hf, "model.layers.1.self_attn.o_proj.weight"),
        (write_original, "block.1.attn.out.weight"),
        (metal_at, "model.layers.1.self_attn.o_proj.weight"),
        (gguf_at, "blk.1.attn_output.weight"),
    ],
)
def test_nan_and_infinity_are_found_counted_and_placed(tmp_path: Path, write: Write, where: str) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[7, 3] = float("nan")
        tensor[9, 0] = float("-inf")

    write(damaged("block.1.attn.out.weight", change), tmp_path)
    oddity = only(inspect_source(tmp_path))
    assert (oddity.thing, oddity.where) == ("values that are not finite numbers", where)
    assert oddity.found == "1 NaN, 1 infinite; the first at expert 0, row 7, column 3"


@pytest.mark.parametrize("write", [write_hf, write_original, gguf_at, metal_at])
def test_scale_byte_255_is_found_in_every_packed_layout(tmp_path: Path, write: Write) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[4, 11, 2] = tensor[5, 0, 0] = 255

    write(damaged("block.2.mlp.mlp1_weight.scales", change), tmp_path)
    oddity = only(inspect_source(tmp_path))
    assert oddity.found == "2 scale bytes 255; the first at expert 4, row 11, column 64"
    assert oddity.where in (
        "model.layers.2.mlp.experts.gate_up_proj_blocks and model.layers.2.mlp.experts.gate_up_proj_scales",
        "block.2.mlp.mlp1_weight.blocks and block.2.mlp.mlp1_weight.scales",
        "blk.2.ffn_gate_exps.weight and blk.2.ffn_up_exps.weight",
        "model.layers.2.mlp.experts.gate_up_proj",
    )


def test_transposed_and_per_expert_values_are_placed_by_output_row_and_input_column(tmp_path: Path) -> None:
    model = damaged("block.0.mlp.mlp1_weight.scales", lambda t: t[3, 40, 1].fill_(255))  # NaN once dequantized
    for i, write in enumerate((write_bf16, write_unsloth_linear, write_per_expert)):
        write(model, tmp_path / str(i))
        oddity = only(inspect_source(tmp_path / str(i), gate_proj="deinterleaved"))
        assert oddity.found == "32 NaN; the first at expert 3, row 40, column 32"


def test_the_result_does_not_depend_on_the_number_of_threads_or_the_size_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = damaged("embedding.weight", lambda t: t[100:300, 5].fill_(float("nan")))
    write_hf(model, tmp_path)
    once = inspect_source(tmp_path, threads=1).as_dict()
    monkeypatch.setattr("gptoss_convert.convert.inspect_values.STEP_VALUES", 1000)
    done: list[int] = []
    assert inspect_source(tmp_path, threads=8, progress=done.append).as_dict() == once
    assert len(done) > 100
    assert sum(done) == once["values"]["bytes"]


def test_quick_reads_no_values_and_never_calls_them_clean(tmp_path: Path) -> None:
    write_hf(damaged("norm.scale", lambda t: t[0].fill_(float("nan"))), tmp_path)
    found = inspect_source(tmp_path, values=False)
    assert (odd(found), found.values, found.as_dict()["values_looked_at"]) == ([], None, False)
    text = shown(found)
    assert "values were not looked at" in text
    assert "finite" not in text


# --- tokenizer and templates ------------------------------------------------------------------------------------------


@pytest.fixture
def small_is_official(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins under which the small tokenizer and the invented template are OpenAI's."""
    folder = tmp_path_factory.mktemp("companions")
    write_companions(SMALL, folder, config_hf(SMALL))
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "chat_template.jinja")}
    pins = table(pinned("openai/gpt-oss-20b", "6" * 40, files))
    monkeypatch.setattr(official, "load", lambda: pins)
    monkeypatch.setattr(inspect_beside, "load", lambda: pins)


@pytest.mark.parametrize("write", [write_hf, gguf_at])
@pytest.mark.usefixtures("small_is_official")
def test_official_tokenizer_and_template_are_told_by_their_digests(tmp_path: Path, write: Write) -> None:
    write(MODEL, tmp_path)
    found = inspect_source(tmp_path, values=False)
    assert found.oddities == []
    assert {d.official for d in found.documents} == {
        "tokenizer.json of openai/gpt-oss-20b",
        "chat_template.jinja of openai/gpt-oss-20b",
    }


@pytest.mark.parametrize("write", [write_hf, gguf_at])
@pytest.mark.usefixtures("small_is_official")
def test_one_changed_letter_in_the_template_is_a_warning_with_its_digest(tmp_path: Path, write: Write) -> None:
    write(MODEL, tmp_path)
    replace(tmp_path, "A test model.", "A best model.")
    found = inspect_source(tmp_path, values=False)
    (oddity,) = found.oddities
    assert (oddity.severity, found.exit_code()) == ("warning", ExitCode.OK)
    assert oddity.thing == "the chat template is not an official one"
    assert oddity.found == f"sha256 {sha256(CHAT_TEMPLATE.replace('A test', 'A best').encode())}"


def test_a_small_tokenizer_is_not_called_official(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    found = inspect_source(tmp_path, values=False)
    assert ({o.thing for o in odd(found, "warning")}, found.exit_code()) == (TEXTS, ExitCode.OK)


@pytest.mark.usefixtures("small_is_official")
def test_templates_in_other_places_are_listed_too(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "hidden"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ 1/0 }}")
    found = inspect_source(tmp_path, values=False)
    assert {o.where for o in odd(found, "warning")} == {
        "tokenizer_config.json: chat_template tool_use",
        "additional_chat_templates/rag.jinja",
    }


@pytest.mark.usefixtures("small_is_official")
def test_every_template_key_of_a_gguf_is_listed(tmp_path: Path) -> None:
    gguf_at(MODEL, tmp_path)
    path = tmp_path / "m.gguf"
    with SourceFile(path) as file:
        header = read_header(file)
    metadata = [*header.metadata.items(), ("tokenizer.chat_template.tool_use", string("{{ 1/0 }}"))]
    head, _ = build_header(metadata, [(t.name, t.type, t.shape) for t in header.tensors.values()])
    path.write_bytes(head + path.read_bytes()[header.data_offset :])
    found = inspect_source(tmp_path)
    assert [o.where for o in found.oddities] == ["tokenizer.chat_template.tool_use"]
    assert len([d for d in found.documents if d.kind == "chat template"]) == 2


def test_an_absent_tokenizer_and_template_are_said_to_be_absent(tmp_path: Path) -> None:
    write_original(MODEL, tmp_path / "original")
    found = inspect_source(tmp_path / "original", values=False)
    things = {oddity.thing for oddity in odd(found, "warning")}
    assert things == {"there is no tokenizer that can be compared", "there is no chat template"}


def test_tokenizer_settings_that_are_no_json_are_an_error(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ')
    assert only(inspect_source(tmp_path, values=False)).where == "tokenizer_config.json"


# --- what lies beside -------------------------------------------------------------------------------------------------


class Trap:
    """An object whose pickle would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_pickle_beside_is_named_and_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_hf(MODEL, folder)
    (folder / "innocent.txt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    found = inspect_source(folder, values=False)
    assert [file.name for file in found.files if file.role == "pickle"] == ["innocent.txt"]
    assert [o.where for o in odd(found, "warning") if o.thing not in TEXTS] == ["innocent.txt"]
    assert not (tmp_path / "sprung").exists()


def test_tensors_that_are_not_read_and_pointers_are_warnings(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    gguf_at(MODEL, tmp_path)
    (tmp_path / "LICENSE").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    found = inspect_source(tmp_path, values=False)
    assert {o.where for o in odd(found, "warning") if o.thing not in TEXTS} == {"m.gguf", "LICENSE"}


def test_what_is_hopeless_raises(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(BadInput, match="never opened"):
        inspect_source(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_3_for_an_error_and_0_for_warnings(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path / "good")
    write_hf(damaged("norm.scale", lambda t: t[0].fill_(float("inf"))), tmp_path / "bad")
    assert run(tmp_path / "good").exit_code == ExitCode.OK
    result = run(tmp_path / "bad", "--threads", 3)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "error: values that are not finite numbers: model.norm.weight" in result.stdout
    assert run(tmp_path / "bad", "--quick").exit_code == ExitCode.OK


def test_json_is_one_document_with_everything(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    result = run(tmp_path, "--json")
    document = json.loads(result.stdout)
    assert (document["layout"], document["sound"], document["exit_code"]) == ("hf", True, 0)
    assert (document["values_looked_at"], document["values"]["tensors"]) == (True, 54)
    assert document["config"]["sliding_layers"] == [0, 2]
    assert {"name", "dtype", "shape", "nbytes", "file"} == set(document["tensors"][0])
    assert len(document["tensors"]) == 60


def test_tensors_are_grouped_by_pattern_unless_each_is_asked_for(tmp_path: Path) -> None:
    write_unsloth_linear(MODEL, tmp_path)
    found = inspect_source(tmp_path, values=False)
    grouped, each = shown(found), shown(found, every_tensor=True)
    assert "model.layers.{0..2}.mlp.experts.down_projs.{0..5}.weight BF16 [160, 96] ×18" in grouped
    assert each.count("BF16 [160, 96] in model-") == 18
    assert "model.layers.2.mlp.experts.down_projs.5.weight BF16 [160, 96] in " in run(tmp_path, "--tensors").stdout


def test_oddities_are_red_and_hostile_names_reach_the_terminal_as_text_only(tmp_path: Path) -> None:
    write_hf(MODEL, tmp_path)
    replace(tmp_path, "model.layers.1.self_attn.sinks", "[bold on green]hostile[/green]")
    (tmp_path / "evil\x1b]0;owned\x07\u202e[link=x].pkl").write_bytes(pickle.dumps({"a": 1}))
    found = inspect_source(tmp_path)
    text = shown(found)
    assert "\x1b[1;31merror: a tensor that gpt-oss does not have: [bold on green]hostile[/green]" in text
    assert "evil\\x1b]0;owned\\x07\\u202e[link=x].pkl" in text
    assert not any(bad in text for bad in ("\x1b]", "\x07", "\u202e", "\x1b[42m"))
    assert "\x1b" not in run(tmp_path, "--json").stdout


def test_the_meaning_of_gate_proj_can_be_told(tmp_path: Path) -> None:
    write_per_expert(Model(SMALL, parity_free=True), tmp_path, "halves")
    result = run(tmp_path, "--gate-proj", "halves")
    assert result.exit_code == ExitCode.OK
    assert "as told: halves" in result.stdout

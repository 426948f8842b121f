"""The widths of a GGUF: what is chosen, what is refused with the reason, and what the file says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.checkpoints import SMALL, STEADY, Model, write_gguf, write_hf
from support.sparse import write_sparse_release
from support.tokenizer import small_tokenizer

from gptoss_convert.convert.conversion import Options, convert, make_plan
from gptoss_convert.convert.cut import first_ones
from gptoss_convert.convert.dry_run import foresee
from gptoss_convert.convert.gguf_widths import DESCRIPTION, OURS
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.target_gguf import FILE_TYPE, plan_gguf
from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import read_header, string
from gptoss_convert.formats.gguf_cursor import Cursor
from gptoss_convert.kernels.codecs import BY_GGML_ID, FLOATS
from gptoss_convert.quant.recipe import PARTS, TYPES
from gptoss_convert.quant.zeros import RUN

SPEC = replace(STEADY, heads=4, intermediate=288)
LATTICES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_hf(Model(SPEC), folder)
    return folder


@pytest.fixture(scope="module")
def narrow_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 heads of 64: attention's output has rows of 384 columns."""
    folder = tmp_path_factory.mktemp("narrow")
    write_hf(Model(SMALL), folder)
    return folder


def recipe_file(path: Path, codec: str = "q6_k", extra: str = "", **parts: str) -> Path:
    path.write_text("".join(f'{part} = "{parts.get(part, codec)}"\n' for part in PARTS) + extra)
    return path


def made(source: Path, target: Path, **options: Any) -> Any:
    return convert(source, target, Options(to="gguf", allow_larger=True, **options), silent)


def keys(path: Path) -> dict[str, Any]:
    with SourceFile(path) as file:
        return {key: value.value for key, value in read_header(file).metadata.items()}


# --- the embedding's padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LATTICES)
def test_an_embedding_that_cannot_hold_the_added_zeros_is_refused_with_recipe_and_remedy(
    release: Path, tmp_path: Path, codec: str
) -> None:
    recipe = recipe_file(tmp_path / "mine.toml", embedding=codec)
    with pytest.raises(Refused, match="cannot hold the zeros") as error:
        made(release, tmp_path / "x.gguf", recipe=recipe)
    assert error.value.tensor == "token_embd.weight"
    assert error.value.file == str(recipe)
    assert f"embedding = '{codec}'" in str(error.value.found)
    assert "q6_k" in str(error.value.remedy)


def test_a_rule_that_asks_for_it_is_named(release: Path, tmp_path: Path) -> None:
    rule = '[[rule]]\nmatch = "token_embd.*"\ncodec = "iq3_s"\n'
    with pytest.raises(Refused, match="cannot hold the zeros") as error:
        made(release, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "r.toml", extra=rule))
    assert "rule match = 'token_embd.*'" in str(error.value.found)


@pytest.mark.parametrize("codec", [c.name for c in BY_GGML_ID.values() if c.name not in (*LATTICES, *FLOATS)])
def test_every_other_codec_holds_them_and_the_proof_reads_them(release: Path, tmp_path: Path, codec: str) -> None:
    assert 160 % RUN[codec] == 0
    outcome = made(release, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "r.toml", embedding=codec))
    assert outcome.plan.source.config.hidden == 256
    assert outcome.proof is not None


def test_the_lattices_may_hold_everything_else(release: Path, tmp_path: Path) -> None:
    outcome = made(release, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "r.toml", "iq3_xxs", embedding="q3_k"))
    assert outcome.proof is not None


# --- what no widening makes fit ----------------------------------------------------------------------------------------


def test_attention_that_no_widening_makes_fit_is_refused_with_a_remedy_that_works(
    narrow_attention: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path / "r.toml", "q3_k", attention="q6_k")
    with pytest.raises(Refused, match="do not divide") as error:
        made(narrow_attention, tmp_path / "x.gguf", recipe=recipe)
    assert (error.value.tensor, error.value.file) == ("blk.0.attn_output.weight", str(recipe))
    assert "attention = 'q6_k'" in str(error.value.found)
    assert "384 columns" in str(error.value.found)
    assert "--widen" not in str(error.value.remedy)
    assert "q8_0" in str(error.value.remedy)
    made(narrow_attention, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "s.toml", "q3_k", attention="q8_0"))


def test_a_rule_behind_it_is_named(narrow_attention: Path, tmp_path: Path) -> None:
    rule = '[[rule]]\nmatch = "blk.*.attn_output.weight"\nlayers = "2-"\ncodec = "q4_k"\n'
    with pytest.raises(Refused, match="do not divide") as error:
        made(narrow_attention, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "r.toml", "q8_0", extra=rule))
    assert error.value.tensor == "blk.2.attn_output.weight"
    assert "rule match = 'blk.*.attn_output.weight', layers = '2-'" in str(error.value.found)


def test_widths_that_blocks_do_not_divide_are_refused_with_the_way_out(release: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="do not divide") as error:
        made(release, tmp_path / "x.gguf", type="q3_k_s", widen="320x512")
    assert "--widen auto" in str(error.value.remedy)


def test_a_rule_that_changes_nothing_stops_the_conversion(release: Path, tmp_path: Path) -> None:
    rule = '[[rule]]\nmatch = "blk.*.ffn_dwon_exps.weight"\ncodec = "q4_k"\n'
    with pytest.raises(BadInput, match="matches no tensor"):
        made(release, tmp_path / "x.gguf", recipe=recipe_file(tmp_path / "r.toml", extra=rule))
    assert not (tmp_path / "x.gguf").exists()


def test_a_recipe_that_is_too_long_is_not_read_in_part(release: Path, tmp_path: Path) -> None:
    long = recipe_file(tmp_path / "r.toml", extra="#" * (1 << 20) + '\n[[rule]]\nmatch = "*"\ncodec = "q4_k"\n')
    with pytest.raises(BadInput, match="too large"):
        made(release, tmp_path / "x.gguf", recipe=long)


# --- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "blocks"), [("nvfp4", "64"), ("q3_k", "256")])
def test_the_note_names_the_blocks_that_do_not_divide_the_rows(
    release: Path, tmp_path: Path, codec: str, blocks: str
) -> None:
    recipe = recipe_file(tmp_path / "r.toml", "q8_0", gate=codec, up=codec, down=codec)
    (note,) = foresee(release, tmp_path / "x.gguf", Options(to="gguf", recipe=recipe, allow_larger=True))["notes"]
    assert f"because blocks of {blocks} do not divide the rows" in note
    assert note.startswith("widened from 160 to ")


def test_a_cut_is_called_a_cut_and_the_dry_run_tells_the_loss(release: Path, tmp_path: Path) -> None:
    plan = foresee(release, tmp_path / "x.gguf", Options(to="gguf", type="q3_k_s", widen="cut"))
    assert plan["notes"] == [
        "experts cut from 288 to 256 neurons, widened from 160 to 256 columns, because blocks of 256 do not divide the rows; "
        "what is added is zeros and changes nothing"
    ]
    assert plan["losses"] == ["32 of each expert's 288 neurons are dropped, the least important ones"]
    asked = Options(to="gguf", type="f16", widen="160x256", allow_larger=True)
    assert foresee(release, tmp_path / "x.gguf", asked)["notes"] == [
        "experts cut from 288 to 256 neurons, as asked for"
    ]


def test_a_cut_that_cuts_nothing_says_so(release: Path, tmp_path: Path) -> None:
    plan = foresee(release, tmp_path / "x.gguf", Options(to="gguf", type="q4_0", widen="cut", allow_larger=True))
    assert plan["notes"] == ["--widen cut cuts none of the experts' 288 neurons: blocks of 32 divide them"]
    assert plan["losses"] == []


def test_experts_narrower_than_a_block_are_not_widened_instead_of_cut(tmp_path: Path) -> None:
    write_hf(Model(replace(STEADY, heads=4)), tmp_path / "in")  # 96 neurons
    with pytest.raises(Refused, match="cannot be cut") as error:
        made(tmp_path / "in", tmp_path / "x.gguf", type="q3_k_s", widen="cut")
    assert "--widen auto" in str(error.value.remedy)


def test_a_widened_file_says_why_it_is_as_wide_as_it_is_and_a_native_one_nothing(release: Path, tmp_path: Path) -> None:
    made(release, tmp_path / "wide.gguf", type="q3_k_s")
    made(tmp_path / "wide.gguf", tmp_path / "native.gguf", type="q8_0")
    found = keys(tmp_path / "wide.gguf")[DESCRIPTION]
    assert found.startswith(OURS)
    assert "widened from 160 to 256 columns" in found
    assert DESCRIPTION not in keys(tmp_path / "native.gguf")


def test_somebody_elses_description_stays(tmp_path: Path) -> None:
    model = Model(replace(STEADY, heads=4))
    write_gguf(model, tmp_path / "in.gguf")
    with open_source(tmp_path / "in.gguf") as source:
        source.metadata = {**source.metadata, DESCRIPTION: string("Mine.")}
        options = Options(to="gguf", type="q3_k_s", allow_larger=True)
        plan = make_plan(source, tmp_path / "x.gguf", options)
    assert b"Mine." in plan.files[0].head
    assert OURS.encode() not in plan.files[0].head


def test_a_widened_release_keeps_its_name_and_size(tmp_path: Path) -> None:
    small_tokenizer(tmp_path / "tokenizer", 400)
    write_sparse_release("gpt-oss-20b", tmp_path / "in", tmp_path / "tokenizer")
    found = []
    with open_source(tmp_path / "in") as source:
        for name in ("mxfp4", "q2_k"):
            head = plan_gguf(source, TYPES[name], neurons=first_ones).files[0].head
            reader = _header(tmp_path / "head.gguf", head)
            own = (DESCRIPTION, "general.file_type")
            found.append({k: v for k, v in reader.items() if k.startswith("general.") and k not in own})
    assert found[0] == found[1]
    assert found[0]["general.size_label"] == "20B"


def _header(path: Path, head: bytes) -> dict[str, Any]:
    """The keys of a header of a file whose tensors are not there."""
    path.write_bytes(head)
    with SourceFile(path) as file:
        cursor = Cursor(file)
        cursor.take(8, "magic and version")
        cursor.u64("tensors")
        count = cursor.u64("keys")
        return {cursor.name(1 << 16, "a key"): cursor.value("a value").value for _ in range(count)}


# --- general.file_type -------------------------------------------------------------------------------------------------


def test_every_types_number_is_llama_cpps() -> None:
    theirs = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): int(kind) for kind in gguf.LlamaFileType}
    theirs |= {"mxfp4": theirs["mxfp4_moe"], "q2_0": 41}  # Q2_0 is newer than the package
    assert {name: FILE_TYPE[name] for name in TYPES} == {name: theirs[name] for name in TYPES}


@pytest.mark.parametrize("name", ["q3_k_m", "q3_k_s", "q4_k_m", "q4_k_s", "q5_k_m", "q2_k", "q2_k_s", "iq3_s", "mxfp4"])
def test_a_file_carries_its_types_number(release: Path, tmp_path: Path, name: str) -> None:
    made(release, tmp_path / "x.gguf", type=name, proof=False)
    assert keys(tmp_path / "x.gguf")["general.file_type"] == FILE_TYPE[name]
    made(tmp_path / "x.gguf", tmp_path / "copy.gguf", proof=False)  # and a copy, which no name tells
    assert keys(tmp_path / "copy.gguf")["general.file_type"] == FILE_TYPE[name]


def test_a_recipe_of_ones_own_under_a_types_name_has_the_number_of_its_experts(release: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path / "r.toml", "q8_0", 'name = "q4_k_m"\n', gate="q3_k", up="q3_k", down="q2_k")
    made(release, tmp_path / "x.gguf", recipe=recipe, proof=False)
    assert keys(tmp_path / "x.gguf")["general.file_type"] == FILE_TYPE["q3_k"]

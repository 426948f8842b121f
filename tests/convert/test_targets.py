"""Targets: the released files byte for byte, llama.cpp's GGUF tensor for tensor, and every source into every target."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.canonical import canonical_values
from support.checkpoints import (
    AWKWARD,
    SMALL,
    SQUARE,
    Model,
    write_bf16,
    write_gguf,
    write_hf,
    write_original,
)
from support.finetunes import bf16_tensors, config_bf16
from support.layouts import LAYOUTS, write_layout
from support.tokenizer import small_tokenizer

from gptoss_convert.convert.certificate import FOLDER_NAME
from gptoss_convert.convert.source import Layout, open_source
from gptoss_convert.errors import BadInput, Refused, TargetExists, UsageError

LIMIT = 200_000


def assert_same_files(found: Path, expected: Path, *, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """All files of `expected`, to the byte, and no other; `but`: names that may be in `found` alone."""
    names = {path.name for path in found.iterdir()} - but - {FOLDER_NAME}
    assert names == {path.name for path in expected.iterdir() if path.is_file()}
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(
    scope="module",
    params=[(SMALL, ()), (SQUARE, AWKWARD), (replace(SMALL, layers=12), ())],
    ids=["small", "awkward", "12 layers"],
)
def model(request: pytest.FixtureRequest) -> Model:
    spec, awkward = request.param
    return Model(spec, awkward)


@pytest.fixture(scope="module")
def released(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release: hf/ and hf/original/, as published together."""
    folder = tmp_path_factory.mktemp("release")
    write_hf(model, folder, shard_limit=LIMIT)
    write_original(model, folder / "original")
    return folder


def test_the_released_layout_comes_out_as_it_went_in(released: Path, tmp_path: Path, convert: Any) -> None:
    outcome = convert(released, tmp_path / "out", "hf", split_bytes=LIMIT)
    assert outcome.proof.count("byte-equal") == len(outcome.proof.tensors)
    assert_same_files(tmp_path / "out", released)


def test_the_released_layout_becomes_original_to_the_byte(released: Path, tmp_path: Path, convert: Any) -> None:
    convert(released, tmp_path / "out", "original")
    companions = {path.name for path in released.iterdir() if path.is_file() and not path.name.startswith("model")}
    assert_same_files(tmp_path / "out", released / "original", but=companions - {"config.json"})


def test_original_becomes_the_released_layout_to_the_byte(
    released: Path, tmp_path: Path, convert: Any, model: Model
) -> None:
    """config.json too, but for what original/config.json does not know: eps and positions, which are the release's here."""
    convert(released / "original", tmp_path / "out", "hf", split_bytes=LIMIT)
    assert_same_files(tmp_path / "out", released)


def test_through_gguf_and_back_the_weights_are_the_same_files(released: Path, tmp_path: Path, convert: Any) -> None:
    convert(released, tmp_path / "model.gguf", "gguf")
    convert(tmp_path / "model.gguf", tmp_path / "hf", "hf", split_bytes=LIMIT)
    for path in [
        *released.glob("*.safetensors"),
        *(released / name for name in ("model.safetensors.index.json", "config.json")),
    ]:
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (released / name).read_bytes(), name


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_original_in_shards_comes_out_as_it_went_in(
    shards: int, small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_original(small_model, tmp_path / "in", shards=shards)
    sizes = [path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors")]
    total = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    limit = -(-total // shards)
    for _ in range(60):
        outcome = convert(tmp_path / "in", tmp_path / "out", "original", split_bytes=limit, overwrite=True, proof=False)
        if len(outcome.plan.files) == len(sizes):
            break
        limit += limit // 50 + 1
    assert_same_files(tmp_path / "out", tmp_path / "in")


def fields(path: Path) -> dict[str, tuple[Any, ...]]:
    reader = gguf.GGUFReader(path)
    return {
        f.name: (f.types[0], f.types[-1], f.contents())
        for f in reader.fields.values()
        if not f.name.startswith("GGUF.")
    }


@pytest.mark.parametrize(("experts", "dense"), [("mxfp4", "bf16"), ("bf16", "f16"), ("f32", "f32"), ("mxfp4", "f32")])
def test_a_gguf_is_what_llama_cpps_converter_writes(
    experts: Any, dense: Any, released: Path, model: Model, tmp_path: Path, convert: Any
) -> None:
    (theirs,) = write_gguf(model, tmp_path / "theirs.gguf", dense=dense, experts=experts)
    convert(released, tmp_path / "mine.gguf", "gguf", experts=experts, dense=dense)
    mine = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "mine.gguf").tensors}
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert mine[name].tensor_type == tensor.tensor_type, name
        assert mine[name].shape.tolist() == tensor.shape.tolist(), name
        assert np.array_equal(np.asarray(mine[name].data).view(np.uint8), np.asarray(tensor.data).view(np.uint8)), name
    mine_fields, their_fields = fields(tmp_path / "mine.gguf"), fields(theirs)
    # The oracle names its model and card by hand; the product takes them from README.md, of which there is none here.
    only_theirs = their_fields.keys() - mine_fields.keys()
    only_mine = mine_fields.keys() - their_fields.keys()
    assert only_theirs == {"general.license", "general.tags"}
    assert only_mine == {"general.size_label"}
    different = {key for key in mine_fields.keys() & their_fields.keys() if mine_fields[key] != their_fields[key]}
    assert different == {"general.name"}


def test_a_ggufs_tensors_lie_in_the_order_of_the_forward_pass_aligned_to_32(
    hf_folder: Path, tmp_path: Path, convert: Any
) -> None:
    convert(hf_folder, tmp_path / "m.gguf", "gguf")
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    offsets = [tensor.data_offset for tensor in tensors]
    assert offsets == sorted(offsets)
    assert all(offset % 32 == 0 for offset in offsets)
    layers = [int(t.name.split(".")[1]) for t in tensors if t.name.startswith("blk.")]
    assert layers == sorted(layers)
    assert (tensors[0].name, tensors[-1].name) == ("token_embd.weight", "output.weight")


def test_a_split_gguf_holds_the_tensors_of_the_single_one(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    convert(hf_folder, tmp_path / "one.gguf", "gguf")
    outcome = convert(hf_folder, tmp_path / "many", "gguf", split_bytes=300_000)
    parts = sorted((tmp_path / "many").glob("*.gguf"))
    count = len(parts)
    assert count > 3
    assert [part.name for part in parts] == [f"many-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    assert {path.name for path in (tmp_path / "many").iterdir()} == {*(p.name for p in parts), FOLDER_NAME}
    whole = {t.name: t for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    found: dict[str, Any] = {}
    for number, part in enumerate(parts):
        keys = fields(part)
        assert keys["split.no"][2] == number
        assert keys["split.count"][2] == count
        assert keys["split.tensors.count"][2] == len(whole)
        assert ("tokenizer.ggml.tokens" in keys) == (number == 0)
        tensors = gguf.GGUFReader(part).tensors
        assert sum(t.n_bytes for t in tensors) <= 300_000 or len(tensors) == 1
        found |= {t.name: np.array(t.data) for t in tensors}
    assert list(found) == list(whole)
    assert all(np.array_equal(found[name], np.array(whole[name].data)) for name in whole)
    assert outcome.proof.lossless


def test_bf16_is_what_transformers_saves(released: Path, model: Model, tmp_path: Path, convert: Any) -> None:
    convert(released, tmp_path / "out", "bf16")
    expected = bf16_tensors(model)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118
            found = file.get_tensor(name)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found.view(torch.int16) & 0x7FFF, expected[name]().view(torch.int16) & 0x7FFF), name
            assert torch.equal(found, expected[name]()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == config_bf16(model.spec, "scaling", with_dtype=False) | {"dtype": "bfloat16"}


@pytest.mark.parametrize("rope", ["parameters", "scaling"])
def test_a_fine_tunes_own_configuration_is_carried_through(
    rope: Any, small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_bf16(small_model, tmp_path / "in", rope=rope)
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | {"my_key": {"a": [1, None, "ü"]}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "bf16", "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == config
    convert(tmp_path / "in", tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "mxfp4"
    assert {key: written[key] for key in ("my_key", "vocab_size")} == {"my_key": config["my_key"], "vocab_size": 400}


TARGETS = ["gguf", "hf", "original", "bf16"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_source_goes_into_every_target_and_keeps_its_values(
    name: str,
    to: str,
    layouts: dict[str, Path],
    awkward_model: Model,
    tokenizer_folder: Path,
    tmp_path: Path,
    convert: Any,
) -> None:
    target = tmp_path / ("out.gguf" if to == "gguf" else "out")
    tokenizer = tokenizer_folder if name.startswith("original") else None
    outcome = convert(layouts[name], target, to, tokenizer=tokenizer)
    expected = canonical_values(awkward_model)
    exact = name != "gguf, f16 and f32"  # its float16 has lost some already, and bfloat16 loses more
    assert outcome.proof.lossless or not exact
    with open_source(target) as made:
        made.require_sound()
        for tensor, view in made.views.items():
            for expert in range(view.stack[0]):
                values = view.read(expert, 0, view.stack[1]).values()
                wanted = expected[tensor][expert, : view.stack[1]]
                if exact or view.encoding == "mxfp4":
                    assert np.array_equal(values, wanted), tensor
                else:
                    assert np.allclose(values, wanted, rtol=2**-7, atol=2**-25), tensor


@pytest.mark.parametrize("experts", ["mxfp4", "q8_0", "q5_0", "bf16", "f16", "f32"])
@pytest.mark.parametrize("dense", ["bf16", "f32"])
def test_the_exact_codecs_of_a_gguf_lose_nothing(
    experts: str, dense: str, square_folder: Path, tmp_path: Path, convert: Any
) -> None:
    outcome = convert(square_folder, tmp_path / "m.gguf", "gguf", experts=experts, dense=dense)
    assert outcome.document["lossless"]
    assert outcome.document["lost"] == []
    assert outcome.proof.worst_output == 0


@pytest.mark.parametrize("experts", ["q8_0", "q5_0"])
def test_scales_beyond_float16_are_refused_with_their_place_and_leave_nothing(
    experts: str, layouts: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    with pytest.raises(Refused, match="cannot be held exactly") as error:
        convert(layouts["hf"], tmp_path / "m.gguf", "gguf", experts=experts)
    assert "scale byte" in str(error.value.found)
    assert "mlp.experts" in str(error.value.tensor)
    assert list(tmp_path.iterdir()) == []


def test_rounded_dense_matrices_are_measured_and_told(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    outcome = convert(hf_folder, tmp_path / "m.gguf", "gguf", dense="q8_0")
    assert not outcome.document["lossless"]
    (line,) = outcome.document["lost"]
    assert line.startswith("14 tensors rounded from bf16 to q8_0")
    for tensor in outcome.proof.tensors:
        assert (tensor.verdict == "different") == (tensor.artifact_encoding == "q8_0")
        if tensor.verdict == "different":
            assert 1e-3 < tensor.rms_error < 1e-2


def test_a_size_limit_below_every_tensor_gives_each_its_own_file(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    outcome = convert(hf_folder, tmp_path / "out", "original", split_bytes=1)
    assert len(outcome.plan.files) == len(outcome.plan.places)
    assert outcome.proof.lossless


def test_a_tokenizer_folder_without_a_tokenizer_is_bad_input(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no tokenizer"):
        convert(hf_folder, tmp_path / "m.gguf", "gguf", tokenizer=tmp_path / "empty")


def test_the_output_may_not_take_its_sources_place(hf_folder: Path, convert: Any) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in hf_folder.iterdir())
    for target in (hf_folder, hf_folder.parent):
        with pytest.raises((UsageError, TargetExists)):
            convert(hf_folder, target, "hf", overwrite=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in hf_folder.iterdir()) == before


def test_a_name_given_by_the_user_becomes_the_ggufs(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    convert(hf_folder, tmp_path / "m.gguf", "gguf", name="My-Org/my-finetune-20B-v2")
    keys = {key: value[2] for key, value in fields(tmp_path / "m.gguf").items()}
    assert keys["general.name"] == "My Finetune 20B v2"
    assert keys["general.organization"] == "My-Org"


CARD = """---
license: apache-2.0
license_name: own
base_model:
- openai/gpt-oss-20b
tags:
- vllm
- "with: colon"
language: [en, de]
datasets: some/data
---
# A card
"""


def test_a_model_card_gives_the_general_keys_and_no_path_does(small_model: Model, tmp_path: Path, convert: Any) -> None:
    for place in ("one", "two-7B-instruct"):
        write_hf(small_model, tmp_path / place)
        (tmp_path / place / "README.md").write_text(CARD)
        convert(tmp_path / place, tmp_path / f"{place}.gguf", "gguf")
    keys = {key: value[2] for key, value in fields(tmp_path / "one.gguf").items()}
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.tags"][:2] == ["vllm", "with: colon"]
    assert keys["general.base_model.0.repo_url"].endswith("openai/gpt-oss-20b")
    one, two = ((tmp_path / f"{place}.gguf").read_bytes() for place in ("one", "two-7B-instruct"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()


@pytest.mark.parametrize(
    "card",
    [
        "---\n- a\n- b\n---\n",
        "---\n: [\n---\n",
        "---\na: &a [1]\nb: *a\n---\n",
        "---\nlicense: [1, 2]\n---\n",
        "---\nbase_model: {a: 1}\n---\n",
        "---\ntags: 3\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "no front matter",
        "---\nlicense: 2024-01-01\n---\n",
        "---\nlicense: !!timestamp 99-99\n---\n",
        '---\nlicense: "\\ud800"\n---\n',
        '---\ntags: ["\\udfff", a]\n---\n',
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\nlanguage: {en: 1}\nname: 3\n---\n",
    ],
)
def test_a_hostile_model_card_is_ignored_or_bad_input_and_never_a_crash(
    card: str, small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_hf(replace_spec(small_model), tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text(card)
    with contextlib.suppress(BadInput):
        convert(tmp_path / "in", tmp_path / "m.gguf", "gguf", proof=False)
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "m.gguf", "m.gguf.certificate.json"}


def replace_spec(model: Model) -> Model:
    """A smaller model of the same vocabulary: what is written is not what these tests are about."""
    return Model(replace(model.spec, layers=1, experts=2))


def test_write_layout_names_what_to_open(small_model: Model, tmp_path: Path) -> None:
    assert write_layout("metal", small_model, tmp_path).name == "model.bin"
    with open_source(tmp_path / "metal" / "model.bin") as source:
        assert source.layout is Layout.METAL
    assert small_tokenizer(tmp_path, SMALL.vocab, SMALL.spare_rows).name == "tokenizer.json"


@pytest.mark.parametrize("lowered", [8, 14])
def test_scales_below_nvfp4s_are_refused_with_their_place_and_leave_nothing(
    lowered: int, tmp_path: Path, convert: Any
) -> None:
    """Never taken for a fault of the conversion, however little of the values NVFP4 would leave."""
    model = Model(SQUARE)
    for name in model.tensors:
        if name.endswith(".scales"):
            model.tensors[name] = model.tensors[name] - lowered
    write_hf(model, tmp_path / "low")
    with pytest.raises(Refused, match=r"llama\.cpp's gpt-oss does not read") as error:
        convert(tmp_path / "low", tmp_path / "m.gguf", "gguf", type="nvfp4", allow_larger=True)
    assert re.fullmatch(r"model\.layers\.\d\.mlp\.experts\.\w+, expert \d(, gate|, up)?", str(error.value.tensor))
    assert re.fullmatch(r"scale 2\^-\d+ at row \d+, column \d+", str(error.value.found))
    assert not (tmp_path / "m.gguf").exists()

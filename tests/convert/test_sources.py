"""Every layout reads the oracle's values, whole and in part; what is foreign, odd or hostile is refused and says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.canonical import canonical_values
from support.checkpoints import (
    SMALL,
    SQUARE,
    WIDE,
    Model,
    write_bf16,
    write_gguf,
    write_hf,
    write_metal,
    write_original,
)
from support.layouts import LAYOUTS, write_layout

from gptoss_convert.convert.source import Layout, Source, open_source
from gptoss_convert.errors import BadInput, GptOssError, Refused

TINY = replace(SMALL, layers=1, experts=2, experts_per_token=1, hidden=64, intermediate=32, heads=2, kv_heads=1)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    write_hf(Model(TINY), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    write_bf16(Model(TINY), folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; `...` removes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Pass all tensors of a folder through `change` and store them as one file."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors) or tensors, folder / "model.safetensors")
    return folder


def opened(path: Path, **options: Any) -> Source:
    """A source that may be converted, or the error that says why not."""
    with open_source(path, **options) as source:
        source.require_sound()
        return source


def assert_reads(source: Source, expected: dict[str, np.ndarray]) -> None:
    """All of every tensor, and parts whose bounds are odd and do not begin at 0."""
    assert source.views.keys() == expected.keys()
    for name, view in source.views.items():
        wanted = expected[name]
        if source.layout is Layout.METAL and name in ("model.embed_tokens.weight", "lm_head.weight"):
            wanted = wanted[:, : source.config.vocab]
        assert view.stack == wanted.shape, name
        experts, rows, columns = view.stack
        for expert in {0, experts // 2, experts - 1}:
            for start, stop in {(0, rows), (rows // 3, rows), (rows // 3 | 1, rows - rows // 5), (rows - 1, rows)}:
                chunk = view.read(expert, start, stop)
                assert chunk.shape == (stop - start, columns), name
                assert np.array_equal(chunk.values(), wanted[expert, start:stop]), (name, expert, start, stop)
                assert chunk.first_bad() is None


ENCODINGS = {
    "hf": ("mxfp4", "bf16"),
    "original": ("mxfp4", "bf16"),
    "original split": ("mxfp4", "bf16"),
    "metal": ("mxfp4", "bf16"),
    "gguf": ("mxfp4", "bf16"),
    "gguf split": ("mxfp4", "bf16"),
    "gguf, fused qkv": ("mxfp4", "bf16"),
    "gguf, f16 and f32": ("f32", "f16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_reads_the_models_values(name: str, layouts: dict[str, Path], awkward_model: Model) -> None:
    with open_source(layouts[name]) as source:
        source.require_sound()
        if name == "gguf, f16 and f32":  # float16 cannot hold every bfloat16: only the experts are compared by value
            expected = canonical_values(awkward_model)
            for key, view in source.views.items():
                if view.encoding == "f16":
                    expected[key] = expected[key].astype(np.float16).astype(np.float32)
            assert_reads(source, expected)
        else:
            assert_reads(source, canonical_values(awkward_model))
        kinds = {(".experts." in key and "bias" not in key, view.encoding) for key, view in source.views.items()}
        expert, dense = ENCODINGS.get(name, ("bf16", "bf16"))
        assert {encoding for is_expert, encoding in kinds if is_expert} == {expert}
        assert (False, dense) in kinds


@pytest.mark.parametrize(
    "spec", [SQUARE, WIDE, replace(SMALL, head_dim=32, heads=10, kv_heads=5)], ids=["square", "wide", "heads"]
)
def test_other_widths_read_as_well(spec: Any, tmp_path: Path) -> None:
    model = Model(spec)
    expected = canonical_values(model)
    for name in ("hf", "original", "bf16", "per expert, halves", "gguf, fused qkv", "metal"):
        if name == "metal" and spec.head_dim != 64:
            continue
        with open_source(write_layout(name, model, tmp_path)) as source:
            source.require_sound()
            assert_reads(source, expected)


def test_every_layout_describes_the_same_model(layouts: dict[str, Path]) -> None:
    configs = {name: opened(path).config for name, path in layouts.items()}
    reference = configs["hf"]
    for name, config in configs.items():
        for key, value in vars(reference).items():
            if key in ("token_ids", "attention_factor") or (key == "vocab" and name == "metal"):
                continue
            found = getattr(config, key)
            assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (name, key)


def test_a_tensor_knows_where_it_is_read_from(layouts: dict[str, Path]) -> None:
    for name, path in layouts.items():
        source = opened(path)
        listed = {tensor.name for tensor in source.stored}
        assert source.names.keys() == source.views.keys()
        if source.layout is not Layout.METAL:
            assert {there for names in source.names.values() for there in names} == listed, name


# --- what is odd and all the same plain --------------------------------------------------------------------------------


def test_a_missing_dtype_does_not_matter(tiny_bf16: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_bf16)
    edit_json(folder / "config.json", dtype=..., torch_dtype=...)
    assert opened(folder).layout is Layout.BF16


def test_a_stale_quantization_config_is_noted_and_not_believed(tiny_bf16: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_bf16)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    source = opened(folder)
    assert source.layout is Layout.BF16
    assert any("its word is not taken" in note for note in source.notes)


def test_packed_experts_without_quantization_config_are_noted(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    edit_json(folder / "config.json", quantization_config=...)
    assert any("lacks MXFP4's quantization_config" in note for note in opened(folder).notes)


def test_unknown_configuration_keys_are_kept_and_not_interpreted(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    edit_json(folder / "config.json", trust_remote_code=True, custom={"a": [1, None]}, torch_dtype="float64")
    source = opened(folder)
    assert source.config_table is not None
    assert source.config_table["custom"] == {"a": [1, None]}
    assert source.config == opened(tiny_hf).config


def test_one_file_of_a_single_file_model_may_be_named(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = rewrite(copied(tiny_hf), lambda tensors: None)
    assert opened(folder / "model.safetensors").layout is Layout.HF


def test_one_shard_named_directly_stands_for_its_model(tiny_hf: Path) -> None:
    shard = sorted(tiny_hf.glob("*.safetensors"))[1]
    assert len(opened(shard).files) == len(list(tiny_hf.glob("*.safetensors")))


def test_one_part_of_a_split_gguf_stands_for_all(layouts: dict[str, Path]) -> None:
    parts = sorted(layouts["gguf split"].glob("*.gguf"))
    assert len(opened(parts[2]).files) == len(parts) > 3


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tiny_hf: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in tiny_hf.iterdir():
        blob = repo / "blobs" / f"blob-of-{path.stem}{path.suffix}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    for place in (snapshot, repo):
        source = opened(place)
        assert source.revision == f"someone/tiny@{'a' * 40}"
        assert all(file.name.startswith("model-") for file in source.files)
        assert "tokenizer.json" in source.companions


def test_the_releases_original_folder_takes_the_tokenizer_above_it(
    tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_hf)
    write_original(Model(TINY), folder / "original")
    source = opened(folder / "original")
    assert "tokenizer.json" in source.companions
    assert any("folder above" in note for note in source.notes)


def test_a_tokenizer_beside_is_not_taken_without_a_configuration(tiny_hf: Path, tmp_path: Path) -> None:
    write_original(Model(TINY), tmp_path / "original")
    (tmp_path / "tokenizer.json").write_bytes((tiny_hf / "tokenizer.json").read_bytes())
    assert "tokenizer.json" not in opened(tmp_path / "original").companions


# --- what does not fit together ----------------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused(tiny_hf: Path, tmp_path: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadInput, match="leads out of the folder"):
        opened(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "C:x", "a\0b"])
def test_an_index_that_points_out_of_its_folder_is_refused(
    name: str, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_hf)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(BadInput, match="not a plain name"):
        opened(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {}, "x"])
def test_an_index_without_a_usable_map_is_refused(
    weight_map: Any, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_hf)
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(BadInput):
        opened(folder)


def spoil_index(folder: Path, change: Callable[[dict[str, str]], None]) -> Path:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    change(table["weight_map"])
    index.write_text(json.dumps(table))
    return folder


BIAS = "model.layers.0.mlp.router.bias"  # lies in a shard with others
INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "names a tensor that is nowhere": (lambda m: m.update({"more": next(iter(m.values()))}), "no file holds"),
    "leaves a tensor out": (lambda m: m.pop(BIAS), "index does not name"),
    "names another shard": (lambda m: m.update({BIAS: m["lm_head.weight"]}), "another file"),
    "names a shard that is missing": (lambda m: m.update({"lm_head.weight": "no.safetensors"}), "not there"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_disagrees_with_the_headers_is_refused(
    fault: str, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    change, words = INDEX_FAULTS[fault]
    with pytest.raises(BadInput, match=words):
        opened(spoil_index(copied(tiny_hf), change))


def test_a_tensor_in_two_shards_is_refused(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    save_file({BIAS: torch.ones(2, dtype=torch.bfloat16)}, folder / "zz.safetensors")
    for with_index in (True, False):
        if with_index:
            spoil_index(folder, lambda m: m.update({BIAS: "zz.safetensors"}))
        else:
            (folder / "model.safetensors.index.json").unlink()
        with pytest.raises(BadInput, match="lies in two files"):
            opened(folder)


HF_FAULTS: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "lacks a bias": (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), "missing", "q_proj.bias"),
    "lacks scales": (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "missing", "down_proj"),
    "lacks the head": (lambda t: t.pop("lm_head.weight"), "missing", "lm_head"),
    "has a tensor too many": (lambda t: t.update({"extra.weight": torch.ones(3)}), "does not have", "extra.weight"),
    "has a layer too many": (
        lambda t: t.update({"model.layers.1.mlp.router.bias": t["model.layers.0.mlp.router.bias"].clone()}),
        "does not have",
        "layers.1",
    ),
    "has a matrix transposed": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)}),
        "shape",
        "q_proj.weight",
    ),
    "has blocks of another width": (
        lambda t: t.update(
            {"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 64, 1, 8, dtype=torch.uint8)}
        ),
        "wrong form",
        "down_proj_blocks",
    ),
    "has scales of another count": (
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 64, 2, dtype=torch.uint8)}),
        "wrong form",
        "down_proj_blocks",
    ),
    "has integers for a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "cannot be read", "model.norm"
    ),
    "has a scalar for a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones((), dtype=torch.bfloat16)}), "shape", "model.norm"
    ),
    "has four dimensions for a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(1, 1, 1, 64, dtype=torch.bfloat16)}), "shape", "model.norm"
    ),
    "has an empty embedding": (
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(0, 64, dtype=torch.bfloat16)}), "shape", "embed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_a_model_is_refused_that(fault: str, tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    change, words, tensor = HF_FAULTS[fault]
    folder = rewrite(copied(tiny_hf), lambda tensors: (change(tensors), tensors)[1])
    with pytest.raises(BadInput, match=words) as error:
        opened(folder)
    assert tensor in str(error.value.tensor)


@pytest.mark.parametrize("layout", ["linearised", "per expert", "gguf"])
def test_a_layout_that_lacks_one_experts_tensor_is_refused(
    layout: str, layouts: dict[str, Path], copied: Callable[[Path], Path]
) -> None:
    folder = copied(layouts[layout])
    if layout == "gguf":
        data = (folder / "model.gguf").read_bytes()
        assert data.count(b"blk.1.ffn_up_exps.bias") == 1
        (folder / "model.gguf").write_bytes(data.replace(b"blk.1.ffn_up_exps.bias", b"blk.1.ffn_up_exps.bios"))
        missing = "blk.1.ffn_up_exps.bias"
    else:
        missing = next(name for name in opened(folder, gate_proj=None).names["model.layers.1.mlp.experts.down_proj"])

        def remove(tensors: Tensors) -> None:
            del tensors[missing]

        rewrite(folder, remove)
    with pytest.raises(BadInput, match="missing") as error:
        opened(folder)
    assert error.value.tensor == missing


# --- values ------------------------------------------------------------------------------------------------------------


def spoiled(kind: str, tensors: Tensors) -> None:
    if kind == "scale 255":
        tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][1, 37, 1] = 255
    elif kind == "an overflowing scale":
        tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][1, 37, 1] = 254
        tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"][1, 37, 1] = 0x77
    elif kind == "NaN":
        tensors["model.layers.0.mlp.router.weight"][1, 33] = math.nan
    else:
        tensors["lm_head.weight"][301, 5] = -math.inf


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("scale 255", "at expert 1, row 37, column 32"),
        ("an overflowing scale", "at expert 1, row 37, column 32"),
        ("NaN", "at row 1, column 33"),
        ("infinity", "at row 301, column 5"),
    ],
)
@pytest.mark.parametrize("to", ["gguf", "hf", "original", "bf16"])
def test_a_value_that_is_no_number_ends_the_conversion_and_is_named(
    kind: str, where: str, to: str, tiny_hf: Path, copied: Callable[[Path], Path], convert: Any, tmp_path: Path
) -> None:
    folder = rewrite(copied(tiny_hf), lambda tensors: spoiled(kind, tensors))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"not a finite|no finite") as error:
        convert(folder, tmp_path / ("out.gguf" if to == "gguf" else "out"), to)
    assert error.value.found == where
    assert sorted(tmp_path.iterdir()) == before


# --- configurations ----------------------------------------------------------------------------------------------------

NUMBERS = [-1, 0, True, None, "64", [64], {}, 1.5, 1e999, -1e999, 10**30, 1 << 40]
HF_KEYS = [
    "num_hidden_layers",
    "num_local_experts",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_experts_per_tok",
]


def with_number(path: Path, key: str, value: Any) -> None:
    """JSON can say 1e999 and Python's writer cannot."""
    table = json.loads(path.read_text())
    table[key] = "HERE"
    text = {1e999: "1e999", -1e999: "-1e999"}.get(value) if isinstance(value, float) else None
    path.write_text(json.dumps(table).replace('"HERE"', text or json.dumps(value)))


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k in HF_KEYS for v in NUMBERS if (k, v) != ("num_experts_per_tok", None)], ids=str
)  # without num_experts_per_tok, experts_per_token says the same
def test_a_hostile_number_in_the_configuration_is_bad_input(
    key: str, value: Any, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_hf)
    with_number(folder / "config.json", key, value)
    with pytest.raises(BadInput):
        opened(folder)


COUNTS, SIZES = (
    ["num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings"],
    ["rms_norm_eps", "swiglu_limit"],
)
ODD = [-1, True, "x", [1], {}, 1e999, 10**30]


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k in COUNTS + SIZES for v in ODD] + [(k, 0) for k in COUNTS], ids=str
)
def test_a_hostile_optional_number_is_bad_input(
    key: str, value: Any, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_hf)
    with_number(folder / "config.json", key, value)
    with pytest.raises(BadInput):
        opened(folder)


ODD_TABLES: dict[str, dict[str, Any]] = {
    "code to run": {"auto_map": {"AutoModel": "modeling.Evil"}},
    "another model": {"model_type": "llama"},
    "rope as text": {"rope_scaling": "yarn"},
    "another rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "a negative factor": {"rope_scaling": {"rope_type": "yarn", "factor": -2.0}},
    "an unhashable rope type": {"rope_scaling": {"rope_type": []}},
    "a truncate that is no flag": {"rope_scaling": {"rope_type": "yarn", "truncate": "no"}},
    "no original positions": {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": -4}},
    "layer types as text": {"layer_types": "sliding_attention"},
    "too few layer types": {"layer_types": []},
    "layer types that are lists": {"layer_types": [["sliding_attention"]]},
    "more active experts than experts": {"num_experts_per_tok": 3, "experts_per_token": 3},
    "heads that do not divide": {"num_key_value_heads": 3, "num_attention_heads": 2},
    "an odd head": {"head_dim": 63},
    "no attention bias": {"attention_bias": False},
    "another alpha": {"swiglu_alpha": 1.5},
}


@pytest.mark.parametrize("name", ODD_TABLES)
def test_a_configuration_is_refused_with(name: str, tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    edit_json(folder / "config.json", **ODD_TABLES[name])
    with pytest.raises(BadInput):
        opened(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a":1,"a":2}', '{"a":NaN}', "\ufeff{}", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(text: str, tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput):
        opened(folder)


ORIGINAL_KEYS = ["num_experts", "rope_theta", "rope_scaling_factor", "sliding_window", "head_dim"]
IN_RANGE = [
    ("rope_theta", "1.5"),
    ("rope_theta", str(1 << 40)),
    ("rope_scaling_factor", "1.5"),
    ("rope_scaling_factor", "None"),
]


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k in ORIGINAL_KEYS for v in NUMBERS if (k, str(v)) not in IN_RANGE], ids=str
)
def test_a_hostile_number_in_an_original_configuration_is_bad_input(key: str, value: Any, tmp_path: Path) -> None:
    write_original(Model(TINY), tmp_path)
    with_number(tmp_path / "config.json", key, value)
    with pytest.raises(BadInput):
        opened(tmp_path)


# --- what is foreign ---------------------------------------------------------------------------------------------------


def one_tensor(name: str, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: torch.ones(2, 64, 32).to(dtype)}


FOREIGN: dict[str, tuple[str, torch.dtype, str]] = {
    "a LoRA adapter": ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.bfloat16, "LoRA"),
    "bitsandbytes": ("model.layers.0.mlp.experts.gate_up_proj.absmax", torch.float32, "bitsandbytes"),
    "GPTQ": ("model.layers.0.mlp.experts.0.gate_proj.qweight", torch.int32, "GPTQ"),
    "compressed-tensors": ("model.layers.0.mlp.experts.0.gate_proj.weight_packed", torch.uint8, "compressed-tensors"),
    "MLX": ("model.layers.0.mlp.experts.gate_proj.weight", torch.uint8, "MLX"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_quantization_is_refused_by_its_name(
    name: str, tiny_hf: Path, copied: Callable[[Path], Path]
) -> None:
    tensor, dtype, words = FOREIGN[name]
    folder = rewrite(copied(tiny_hf), lambda tensors: one_tensor(tensor, dtype) | tensors)
    with pytest.raises(Refused, match=words) as error:
        opened(folder)
    assert error.value.tensor == tensor


def test_a_tied_head_is_refused(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    def untie(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    folder = rewrite(copied(tiny_hf), untie)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(Refused, match="tied"):
        opened(folder)


def test_another_model_family_in_safetensors_is_refused(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = rewrite(copied(tiny_hf), lambda _: one_tensor("model.layers.0.mlp.gate_proj.weight"))
    with pytest.raises(BadInput, match="no gpt-oss experts"):
        opened(folder)


def test_integer_experts_are_refused(tiny_bf16: Path, copied: Callable[[Path], Path]) -> None:
    def quantize(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(GptOssError, match="type"):
        opened(rewrite(copied(tiny_bf16), quantize))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_folder_of_pickles_is_refused_unopened(name: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(code)
    with pytest.raises(BadInput, match=r"no checkpoint|never") as error:
        opened(tmp_path / "model")
    assert "pickle" in str(error.value)
    with pytest.raises(BadInput, match="not a checkpoint") as error:
        opened(tmp_path / "model" / name)
    assert "pickle" in str(error.value)
    assert not ran.exists()


def test_a_folder_with_the_checkpoint_below_says_where_it_is(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(tiny_hf)
    with pytest.raises(BadInput, match="no checkpoint") as error:
        opened(folder.parent)
    assert "hf/" in str(error.value.remedy)


def test_a_path_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        opened(tmp_path / "nothing")


# --- GGUF --------------------------------------------------------------------------------------------------------------


def gguf_with(path: Path, architecture: str = "gpt-oss", **keys: Any) -> Path:
    """A GGUF with one tensor and these keys of the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        kind = {bool: "bool", str: "string", float: "float32", int: "int32"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((400, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ollamas_dialect_is_recognised_and_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Ollama"):
        opened(gguf_with(tmp_path / "model.gguf", "gptoss"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="another architecture"):
        opened(gguf_with(tmp_path / "model.gguf", "llama"))


KEYS: dict[str, Any] = {
    "block_count": 1, "context_length": 8192, "embedding_length": 64, "feed_forward_length": 32,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 64, "attention.value_length": 64,
    "attention.sliding_window": 8, "expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 512,
    "rope.freq_base": 40000.0, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, value)
            for key in ("block_count", "expert_count", "embedding_length")
            for value in (-1, 0, True, "x", 2.0)
        ],
        ("block_count", 2_000_000_000),
        ("expert_count", 2_000_000_000),
        ("embedding_length", 2_000_000_000),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.factor", math.nan),
        ("rope.freq_base", math.inf),
        ("rope.freq_base", -1.0),
        ("rope.scaling.factor", "16"),
        ("attention.sliding_window_pattern", -2),
        ("attention.sliding_window_pattern", "x"),
        ("expert_used_count", 9),
        ("attention.head_count_kv", 3),
    ],
)
def test_hostile_metadata_are_bad_input(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        opened(gguf_with(tmp_path / "model.gguf", **{**KEYS, key: value}))


def test_a_quantization_that_is_not_read_is_refused_by_name(layouts: dict[str, Path], tmp_path: Path) -> None:
    path = gguf_with(tmp_path / "model.gguf", **KEYS)
    reader = gguf.GGUFReader(layouts["gguf"] / "model.gguf")
    assert reader.tensors
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    assert data[at] == 0
    data[at] = int(gguf.GGMLQuantizationType.I8)
    del data[-(400 * 64 * 4) :]
    data += bytes(400 * 64)
    path.write_bytes(bytes(data))
    with pytest.raises(Refused, match="cannot be read") as error:
        opened(path)
    assert error.value.found == "I8"


def test_two_ggufs_in_a_folder_are_not_guessed_between(
    layouts: dict[str, Path], copied: Callable[[Path], Path]
) -> None:
    folder = copied(layouts["gguf"])
    (folder / "other.gguf").write_bytes((folder / "model.gguf").read_bytes())
    with pytest.raises(Refused, match="several GGUF models"):
        opened(folder)
    assert opened(folder / "other.gguf").layout is Layout.GGUF


def test_a_window_for_every_layer_is_read(tmp_path: Path) -> None:
    model = Model(replace(TINY, layers=3))
    write_gguf(model, tmp_path / "model.gguf")
    assert opened(tmp_path / "model.gguf").config.sliding == (True, False, True)


def test_metal_with_a_wrong_size_or_count_is_refused(layouts: dict[str, Path], copied: Callable[[Path], Path]) -> None:
    path = copied(layouts["metal"])
    data = path.read_bytes()
    path.write_bytes(data + bytes(16))
    with pytest.raises(BadInput, match="size does not fit"):
        opened(path)
    for at, value in (
        (36, 0),
        (40, 0xFFFFFFFF),
        (48, 63),
        (32, 0),
        (140, 0xFFFFFFFF),
        (60, 32),
        (76, 0x7FC00000),
        (80, 0xFF800000),
    ):
        path.write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(BadInput):
            opened(path)


def test_every_layout_that_the_product_names_is_covered_here(layouts: dict[str, Path]) -> None:
    elsewhere = {Layout.COMPRESSED, Layout.ONNX}  # only our own targets write them: test_target_compressed.py, _onnx.py
    assert {opened(path).layout for path in layouts.values()} == set(Layout) - elsewhere


def test_opening_reads_no_tensor_data_and_leaves_no_file_open(layouts: dict[str, Path]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in layouts.values():
        opened(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_refused_source_leaves_no_file_open(tiny_hf: Path, copied: Callable[[Path], Path]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for fault in ("lacks a bias", "has integers for a norm"):
        change = HF_FAULTS[fault][0]
        folder = rewrite(copied(tiny_hf), lambda tensors, change=change: (change(tensors), tensors)[1])  # type: ignore[misc]
        with pytest.raises(BadInput), open_source(folder) as source:
            source.require_sound()
        import shutil

        shutil.rmtree(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_metal_folders_open_by_folder_or_file(layouts: dict[str, Path]) -> None:
    assert opened(layouts["metal"].parent).layout is Layout.METAL


def test_metal_of_other_heads_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        write_metal(Model(replace(TINY, head_dim=32)), tmp_path / "model.bin")

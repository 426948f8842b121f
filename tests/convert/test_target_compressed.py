"""Integer targets: exact names, types and shapes; every source; read back, proved, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.canonical import canonical_values
from support.checkpoints import SMALL, Model, write_hf
from support.layouts import LAYOUTS

from gptoss_convert.convert.artifact_card import SOURCE_CARD, modeling_file
from gptoss_convert.convert.inspect import inspect_source
from gptoss_convert.convert.source import Layout, open_source
from gptoss_convert.convert.verify import verify
from gptoss_convert.errors import BadInput, ProofFailed, Refused, UsageError
from gptoss_convert.kernels import int_rows
from gptoss_convert.kernels.codecs import CODECS

INTEGER = ("int4", "int8", "int8-g32")
H, I, E, Q, KV = SMALL.hidden, SMALL.intermediate, SMALL.experts, SMALL.query_width, SMALL.kv_width  # noqa: E741
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory, convert: Any) -> dict[str, Path]:
    """`small_model` as each integer target."""
    made = tmp_path_factory.mktemp("integer")
    for to in INTEGER:
        convert(hf_folder, made / to, to)
    return {to: made / to for to in INTEGER}


def tensors(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# --- what is written ---------------------------------------------------------------------------------------------------


def forms(to: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every tensor that vLLM's class reads, with its type and shape."""
    bf16, i32, i8, f32 = torch.bfloat16, torch.int32, torch.int8, torch.float32
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (bf16, (SMALL.vocab, H)),
        "model.norm.weight": (bf16, (H,)),
        "lm_head.weight": (bf16, (SMALL.vocab, H)),
    }
    for layer in range(SMALL.layers):
        here = f"model.layers.{layer}."
        for part, rows, columns in (("q", Q, H), ("k", KV, H), ("v", KV, H), ("o", H, Q)):
            name = f"{here}self_attn.{part}_proj."
            found[name + "bias"] = (bf16, (rows,))
            if to == "int4":
                found[name + "weight_packed"] = (i32, (rows, columns // 8))
                found[name + "weight_scale"] = (bf16, (rows, columns // 32))
                found[name + "weight_shape"] = (torch.int64, (2,))
            elif to == "int8":
                found[name + "weight"] = (i8, (rows, columns))
                found[name + "weight_scale"] = (f32, (rows, 1))
            else:
                found[name + "weight"] = (bf16, (rows, columns))
        for name, shape in (("input_layernorm.weight", (H,)), ("post_attention_layernorm.weight", (H,))):
            found[here + name] = (bf16, shape)
        found[here + "self_attn.sinks"] = (bf16, (SMALL.heads,))
        found |= {here + "mlp.router.weight": (bf16, (E, H)), here + "mlp.router.bias": (bf16, (E,))}
        for ours, theirs, rows, columns in (("gate_up_proj", "w13", 2 * I, H), ("down_proj", "w2", H, I)):
            stem = here + "mlp.experts."
            found[f"{stem}{ours}_bias"] = (bf16, (E, rows))
            if to == "int8":
                found[stem + ours] = (i8, (E, columns, rows))
                found[f"{stem}{ours}.weight_scale"] = (f32, (E, 1, rows))
            for expert in range(E) if to != "int8" else ():
                words = columns // (8 if to == "int4" else 4)
                found[f"{stem}{expert}.{theirs}_weight_packed"] = (i32, (rows, words))
                found[f"{stem}{expert}.{theirs}_weight_scale"] = (bf16, (rows, columns // 32))
    return found


@pytest.mark.parametrize("to", INTEGER)
def test_names_types_and_shapes_are_those_that_vllm_reads(to: str, folders: dict[str, Path]) -> None:
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors(folders[to]).items()} == forms(to)
    with safe_open(folders[to] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_weight_shapes_say_the_shapes(folders: dict[str, Path]) -> None:
    found = tensors(folders["int4"])
    shapes = {name: t.tolist() for name, t in found.items() if name.endswith("weight_shape")}
    assert len(shapes) == 4 * SMALL.layers
    for name, (rows, columns) in shapes.items():
        packed = found[name.replace("_shape", "_packed")]
        assert (rows, columns) == (packed.shape[0], 8 * packed.shape[1])


@pytest.mark.parametrize("to", INTEGER)
def test_the_configuration_is_the_sources_with_the_quantization_and_the_modeling_file(
    to: str, folders: dict[str, Path], hf_folder: Path
) -> None:
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folders[to], hf_folder))
    quantization, auto_map = ours.pop("quantization_config"), ours.pop("auto_map")
    theirs.pop("quantization_config")
    assert ours == theirs | {"dtype": "bfloat16"}
    weights = {"type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    form = "int-quantized" if to == "int8" else "pack-quantized"
    weights |= {"num_bits": 4 if to == "int4" else 8, "strategy": "channel" if to == "int8" else "group"}
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "re:.*attn.*"] if to == "int8-g32" else ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": form,
                "input_activations": token if to == "int8" else None,
                "output_activations": None,
                "weights": weights if to == "int8" else weights | {"group_size": 32},
            }
        },
    }
    (named,) = auto_map.items()
    assert named[0] == "AutoModelForCausalLM"
    module, _, name = named[1].partition(".")
    code = (folders[to] / f"{module}.py").read_bytes()
    assert code == modeling_file()
    assert f"class {name}(GptOssForCausalLM)".encode() in code


def decoded(found: Tensors, layer: int, ours: str, theirs: str, expert: int) -> torch.Tensor:
    """float32 [out, in] of one expert's matrix, by the words of the layout."""
    stem = f"model.layers.{layer}.mlp.experts."
    if stem + ours in found:
        scale = found[f"{stem}{ours}.weight_scale"][expert, 0]
        return (found[stem + ours][expert].float() * scale).T
    words = found[f"{stem}{expert}.{theirs}_weight_packed"]
    scales = found[f"{stem}{expert}.{theirs}_weight_scale"].float()
    bits = words.shape[1] // scales.shape[1]
    integers = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], -1) - 2 ** (bits - 1)
    return integers.reshape(len(words), -1).float() * scales.repeat_interleave(32, dim=1)


@pytest.mark.parametrize(("to", "error"), [("int4", 0.1), ("int8", 0.01), ("int8-g32", 0.0)])
def test_each_expert_decodes_to_the_models_weights(
    to: str, error: float, folders: dict[str, Path], small_model: Model
) -> None:
    found = tensors(folders[to])
    for layer in range(SMALL.layers):
        for ours, theirs, want in (
            ("gate_up_proj", "w13", small_model.gate_up(layer)),
            ("down_proj", "w2", small_model.down(layer)),
        ):
            for expert in range(E):
                off = decoded(found, layer, ours, theirs, expert) - want[expert]
                assert off.norm() <= error * want[expert].norm()


def test_folders_of_shards_hold_the_same_tensors_and_an_index(
    hf_folder: Path, folders: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    for to in INTEGER:
        convert(hf_folder, tmp_path / to, to, split_bytes=100_000)
        index = json.loads((tmp_path / to / "model.safetensors.index.json").read_text())
        whole, parts = tensors(folders[to]), tensors(tmp_path / to)
        assert whole.keys() == parts.keys() == index["weight_map"].keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / to / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118


@pytest.mark.parametrize("to", INTEGER)
def test_the_bytes_do_not_depend_on_the_threads(
    to: str, hf_folder: Path, folders: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    convert(hf_folder, tmp_path / "out", to, threads=4)
    names = {path.name for path in folders[to].iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folders[to] / name).read_bytes(), name


# --- what is said ------------------------------------------------------------------------------------------------------


def test_int8_in_groups_loses_nothing_of_mxfp4_and_the_certificate_says_so(
    layouts: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(layouts["hf"], tmp_path / "out", "int8-g32")
    assert (outcome.document["lossless"], outcome.document["lost"]) == (True, [])
    assert outcome.proof.worst_output == 0
    assert {t.verdict for t in outcome.proof.tensors if t.artifact_encoding == "int8_g32"} == {"value-equal"}


@pytest.mark.parametrize(("to", "codec"), [("int4", "int4_g32"), ("int8", "int8_channel")])
def test_what_is_rounded_is_measured(to: str, codec: str, hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    document = convert(hf_folder, tmp_path / "out", to).document
    assert not document["lossless"]
    assert [line.split(":")[0].partition("to ")[2] for line in document["lost"]] == [codec, codec]
    assert any("vLLM" in note for note in document["artifact"]["notes"])
    assert any("trust_remote_code" in note for note in document["artifact"]["notes"])


def test_the_w8a8_certificate_warns_of_tensor_parallelism_and_of_activations(folders: dict[str, Path]) -> None:
    notes = " ".join(json.loads((folders["int8"] / "gptoss-certificate.json").read_text())["artifact"]["notes"])
    assert "--enable-expert-parallel" in notes
    assert "activations" in notes


@pytest.mark.parametrize("to", INTEGER)
def test_the_card_says_what_loads_it_with_which_flags_and_what_loads_it_wrongly(
    to: str, folders: dict[str, Path]
) -> None:
    card = (folders[to] / "README.md").read_text()
    floor = "vLLM 0.29 to 0.33" if to == "int8" else "vLLM 0.31 to 0.33"
    for words in (floor, "trust_remote_code=True", "Nothing was verified on a GPU", "SGLang", "TensorRT-LLM"):
        assert words in card
    assert ("--moe-backend humming" in card) == (to != "int8")
    assert ("--enable-expert-parallel" in card) == (to == "int8")
    wrongly = "does not run" if to == "int8" else "random numbers"
    (without,) = [line for line in card.splitlines() if line.startswith("| transformers without")]
    assert wrongly in without
    assert card.startswith("---\ntags:\n- vllm\n")


CARD = """---
license: apache-2.0
license_link: https://example.org/licence
base_model:
- openai/gpt-oss-20b
tags:
- vllm
- "with: colon"
library_name: transformers
---
# Theirs
"""


def test_the_sources_licence_goes_through_and_its_card_comes_along(
    small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_hf(small_model, tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text(CARD)
    convert(tmp_path / "in", tmp_path / "int4", "int4")
    card = (tmp_path / "int4" / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter == {
        "license": "apache-2.0",
        "license_link": "https://example.org/licence",
        "base_model": ["openai/gpt-oss-20b"],
        "tags": ["vllm", "with: colon", "compressed-tensors"],
    }
    assert (tmp_path / "int4" / SOURCE_CARD).read_text() == CARD
    convert(tmp_path / "int4", tmp_path / "bf16", "bf16")
    assert (tmp_path / "bf16" / "README.md").read_text() == CARD


def test_our_card_does_not_travel_to_another_layout(folders: dict[str, Path], tmp_path: Path, convert: Any) -> None:
    convert(folders["int8"], tmp_path / "bf16", "bf16")
    assert not (tmp_path / "bf16" / "README.md").exists()
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & config.keys()


# --- read back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_source_becomes_exact_int8_and_reads_back(
    name: str, layouts: dict[str, Path], awkward_model: Model, tokenizer_folder: Path, tmp_path: Path, convert: Any
) -> None:
    tokenizer = tokenizer_folder if name.startswith("original") else None
    outcome = convert(layouts[name], tmp_path / "out", "int8-g32", tokenizer=tokenizer, split_bytes=300_000)
    expected = canonical_values(awkward_model)
    exact = name != "gguf, f16 and f32"  # float16 holds not all of its values
    assert outcome.proof.lossless or not exact
    with open_source(tmp_path / "out") as made:
        made.require_sound()
        assert made.layout is Layout.COMPRESSED
        for tensor, view in made.views.items():
            for expert in range(view.stack[0] if exact else 0):
                values = view.read(expert, 0, view.stack[1]).values()
                assert np.array_equal(values, expected[tensor][expert, : view.stack[1]]), tensor


@pytest.mark.parametrize("to", ["int4", "int8"])
@pytest.mark.parametrize("name", ["bf16", "metal", "gguf split", "per expert"])
def test_other_sources_become_rounded_integers_too(
    name: str, to: str, layouts: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(layouts[name], tmp_path / "out", to)
    assert 0 < outcome.proof.worst_output < (0.4 if to == "int4" else 0.02)


def test_int8_in_groups_goes_back_to_the_released_bytes(
    hf_folder: Path, folders: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(folders["int8-g32"], tmp_path / "hf", "hf", split_bytes=200_000)
    assert outcome.document["lossless"]
    with open_source(tmp_path / "hf") as back, open_source(hf_folder) as first:
        for name, view in first.views.items():
            for expert in range(view.stack[0]):
                mine, theirs = (s.views[name].read(expert, 0, view.stack[1]) for s in (back, first))
                assert np.array_equal(mine.values(), theirs.values()), name


@pytest.mark.parametrize("to", INTEGER)
def test_what_is_integer_already_keeps_its_bits(
    to: str, folders: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(folders[to], tmp_path / "again", to)
    assert outcome.proof.count("byte-equal") == len(outcome.proof.tensors)
    first, again = (path / "model.safetensors" for path in (folders[to], tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_integers_become_a_gguf(folders: dict[str, Path], tmp_path: Path, convert: Any) -> None:
    outcome = convert(folders["int8-g32"], tmp_path / "m.gguf", "gguf", experts="mxfp4", dense="bf16")
    assert outcome.document["lossless"]
    convert(folders["int4"], tmp_path / "small.gguf", "gguf", type="q4_0", allow_larger=True)


@pytest.mark.parametrize("to", INTEGER)
def test_inspect_and_verify_know_them(to: str, folders: dict[str, Path]) -> None:
    found = inspect_source(folders[to])
    assert found.layout is Layout.COMPRESSED
    assert found.exit_code() == 0
    assert not [oddity for oddity in found.oddities if oddity.severity == "error"]
    status = {result.name: str(result.status) for result in verify(folders[to]).results}
    assert {name for name, found in status.items() if found != "verified"} <= {"gptoss-certificate.json"}
    assert {"modeling_gptoss_int.py", "README.md", "config.json", "model.safetensors"} <= status.keys()


# --- proof -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "name"), [("int4", "int4_g32"), ("int8-g32", "int8_g32"), ("int8", "int8_channel")])
def test_a_mistake_that_reader_and_writer_share_is_found(
    to: str, name: str, hf_folder: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CODECS[name]

    def reversed_groups(rows: np.ndarray) -> np.ndarray:
        scales, codes = int_rows.split(name, rows)
        groups = 1 if to == "int8" else scales.shape[1] // 2
        turned = codes.reshape(len(codes), groups, -1)[..., ::-1]
        return int_rows.join(name, scales, np.ascontiguousarray(turned).reshape(codes.shape))

    encode = right.encode
    assert encode is not None
    wrong = replace(
        right,
        encode=lambda values, importance: reversed_groups(encode(values, importance)),
        decode=lambda rows: right.decode(reversed_groups(rows)),
    )
    monkeypatch.setitem(CODECS, name, wrong)
    monkeypatch.setattr(
        int_rows,
        "int8_g32_from_mxfp4",
        lambda blocks, scales, exact=int_rows.int8_g32_from_mxfp4: reversed_groups(exact(blocks, scales)),
    )
    with pytest.raises(ProofFailed, match="does not compute"):
        convert(hf_folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["int4", "int8-g32"])
def test_columns_that_groups_do_not_divide_are_refused(
    to: str, small_model: Model, tmp_path: Path, convert: Any
) -> None:
    write_bf16_odd(small_model, tmp_path / "odd")
    with pytest.raises(Refused, match="do not divide") as error:
        convert(tmp_path / "odd", tmp_path / "out", to)
    assert error.value.found == "152 columns"
    assert not (tmp_path / "out").exists()


def test_a_scale_for_each_output_takes_any_width(small_model: Model, tmp_path: Path, convert: Any) -> None:
    write_bf16_odd(small_model, tmp_path / "odd")
    assert convert(tmp_path / "odd", tmp_path / "out", "int8").proof.worst_output < 0.02


def write_bf16_odd(model: Model, folder: Path) -> None:
    """A bf16 folder whose hidden width is no multiple of 32: the model's first 152 channels."""
    from support.finetunes import bf16_tensors, config_bf16

    width = 152
    cut = {}
    for name, tensor in bf16_tensors(model).items():
        value = tensor()
        for axis, size in enumerate(value.shape):
            if size == model.spec.hidden:
                value = value.narrow(axis, 0, width)
        cut[name] = value.contiguous()
    folder.mkdir()
    save_file(cut, folder / "model.safetensors")
    config = config_bf16(model.spec, "scaling", with_dtype=False) | {"hidden_size": width}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options", [{"experts": "q8_0"}, {"dense": "f32"}, {"type": "q4_k_m"}, {"widen": "cut"}, {"name": "a/b"}]
)
@pytest.mark.parametrize("to", INTEGER)
def test_what_is_for_gguf_is_refused(
    to: str, options: dict[str, str], hf_folder: Path, tmp_path: Path, convert: Any
) -> None:
    with pytest.raises(UsageError, match="is for --to gguf"):
        convert(hf_folder, tmp_path / "out", to, **options)


def spoil_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "does not say how"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "does not say how"),
        (lambda c: weights_of(c).update(group_size=64), "form of compressed-tensors"),
        (lambda c: weights_of(c).update(symmetric=False), "form of compressed-tensors"),
        (lambda c: weights_of(c).update(actorder="group"), "form of compressed-tensors"),
        (lambda c: weights_of(c).update(num_bits=8), "packed integers of the wrong form"),
        (lambda c: c["quantization_config"].update(config_groups=[]), "form of compressed-tensors"),
        (lambda c: c["auto_map"].update(AutoConfig="other.Config"), "names code to run"),
    ],
)
def test_a_configuration_that_says_something_else_is_bad_input(
    change: Callable[[dict[str, Any]], object], message: str, folders: dict[str, Path], copied: Any
) -> None:
    folder = copied(folders["int4"])
    spoil_config(folder, change)
    with pytest.raises(BadInput, match=message), open_source(folder) as source:
        source.require_sound()


def rewritten(folder: Path, change: Callable[[Tensors], object]) -> None:
    found = tensors(folder)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts."
QUERY = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("to", "change", "message", "tensor"),
    [
        ("int4", lambda t: t.pop(EXPERT + "2.w13_weight_scale"), "missing", EXPERT + "2.w13_weight_scale"),
        ("int4", lambda t: t.pop(QUERY + "weight_shape"), "missing", QUERY + "weight_shape"),
        ("int4", lambda t: t[QUERY + "weight_shape"].add_(1), "weight_shape", QUERY + "weight_shape"),
        ("int4", lambda t: t.update({EXPERT + "0.w2_weight_g_idx": torch.zeros(4)}), "does not have", "g_idx"),
        ("int8", lambda t: t.pop(EXPERT + "down_proj.weight_scale"), "missing", EXPERT + "down_proj.weight_scale"),
        ("int8", lambda t: t.update({QUERY + "weight_scale": torch.ones(1)}), "wrong form", QUERY + "weight"),
        (
            "int8-g32",
            lambda t: t.update({EXPERT + "0.w2_weight_packed": t[EXPERT + "0.w2_weight_packed"][:, 1:]}),
            "wrong form",
            EXPERT + "0.w2_weight_packed",
        ),
    ],
)
def test_tensors_that_are_missing_or_misshapen_are_named(
    to: str,
    change: Callable[[Tensors], object],
    message: str,
    tensor: str,
    folders: dict[str, Path],
    copied: Any,
) -> None:
    folder = copied(folders[to])
    rewritten(folder, change)
    with open_source(folder) as source, pytest.raises(BadInput, match=message) as error:
        source.require_sound()
    assert tensor in str(error.value.tensor)
    assert inspect_source(folder).exit_code() == 3


def test_a_scale_that_is_no_number_is_refused_with_its_place(
    folders: dict[str, Path], copied: Any, tmp_path: Path, convert: Any
) -> None:
    folder = copied(folders["int4"])
    rewritten(folder, lambda t: t[EXPERT + "3.w2_weight_scale"][5, 1].fill_(float("nan")))
    with pytest.raises(BadInput, match="not a finite number") as error:
        convert(folder, tmp_path / "out", "bf16")
    assert error.value.found == "at expert 3, row 5, column 32"


def test_another_tools_packed_experts_are_still_refused(folders: dict[str, Path], copied: Any) -> None:
    folder = copied(folders["int4"])
    rewritten(
        folder,
        lambda t: [
            t.update(
                {
                    name.replace("w13_weight_", "gate_proj.weight_").replace("w2_weight_", "down_proj.weight_"): t.pop(
                        name
                    )
                }
            )
            for name in list(t)
            if ".mlp.experts." in name
        ],
    )
    with pytest.raises(Refused, match="compressed-tensors"):
        open_source(folder)


def test_another_modeling_file_is_told(folders: dict[str, Path], copied: Any) -> None:
    folder = copied(folders["int4"])
    code = folder / "modeling_gptoss_int.py"
    with open_source(folder) as source:
        assert source.notes == []
    code.write_text(code.read_text() + "\nimport os\n")
    with open_source(folder) as source:
        assert any("not this version's" in note for note in source.notes)
    code.unlink()
    with open_source(folder) as source:
        assert any("missing" in note for note in source.notes)

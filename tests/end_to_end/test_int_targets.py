"""Integer folders in real transformers, through compressed-tensors and the modeling file that lies in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.judges import convert

from gptoss_convert.convert.source import open_source

INTEGER = ("int4", "int8", "int8-g32")


@pytest.fixture(scope="module")
def folders(small_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model as each integer target; sharded, so that scales and codes may lie apart."""
    made = tmp_path_factory.mktemp("integer")
    return {to: convert(small_sources / "hf", made / to, to, "--split-size", "300KB") for to in INTEGER}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies a folder's code before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(
    folder: Path, dtype: torch.dtype, *, dequantize: bool = False, trust: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The model and what `from_pretrained` says of its keys."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, trust_remote_code=trust, **options
    )
    model.train(False)
    return model, {key: found for key, found in loading.items() if found}


def decoded(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own class with the values that our reader decodes, each rounded to `dtype`."""
    from transformers import GptOssConfig, GptOssForCausalLM

    keys = json.loads((folder / "config.json").read_text())
    unwanted = ("quantization_config", "auto_map", "architectures", "model_type", "dtype")
    config = GptOssConfig(**{key: value for key, value in keys.items() if key not in unwanted})
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    angles = model.model.rotary_emb
    model = model.to(dtype)
    model.model.rotary_emb = type(angles)(config)  # transformers keeps the angles in float32
    state = {}
    with open_source(folder) as source:
        for name, view in source.views.items():
            values = np.stack([view.read(e, 0, view.stack[1]).values() for e in range(view.stack[0])])
            tensor = torch.from_numpy(values).to(dtype)
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensor = tensor.transpose(1, 2).contiguous()
            state[name] = tensor.reshape(model.get_parameter(name).shape)
    model.load_state_dict(state, strict=True)
    model.train(False)
    return model


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return result.float()


@pytest.mark.parametrize(
    ("to", "dtype", "dequantize"),
    [
        ("int4", torch.bfloat16, False),
        ("int4", torch.bfloat16, True),
        ("int4", torch.float32, False),
        ("int8", torch.bfloat16, True),
        ("int8", torch.float32, True),
        ("int8-g32", torch.bfloat16, False),
        ("int8-g32", torch.float32, True),
    ],
)
def test_every_weight_and_logit_is_that_of_our_decoded_model(
    to: str, dtype: torch.dtype, dequantize: bool, folders: dict[str, Path], ids: list[int]
) -> None:
    model, loading = load(folders[to], dtype, dequantize=dequantize)
    assert loading == {}
    want = decoded(folders[to], dtype)
    assert torch.equal(logits_of(model, ids), logits_of(want, ids))
    found = model.state_dict()  # after a forward pass: only then does compressed-tensors decode attention
    for name, value in want.state_dict().items():
        assert torch.equal(found[name], value), name


def test_int8_in_groups_computes_what_the_release_computes(
    folders: dict[str, Path], ids: list[int], small_logits: torch.Tensor
) -> None:
    model, loading = load(folders["int8-g32"], torch.float32)
    assert loading == {}
    assert torch.equal(logits_of(model, ids), small_logits)


def test_w8a8_also_runs_with_rounded_activations(folders: dict[str, Path], ids: list[int]) -> None:
    model, loading = load(folders["int8"], torch.bfloat16)
    assert loading == {}
    found = logits_of(model, ids)
    assert found.isfinite().all()
    assert not torch.equal(found, logits_of(decoded(folders["int8"], torch.bfloat16), ids))


@pytest.mark.parametrize("to", ["int4", "int8-g32"])
def test_without_its_code_a_packed_folder_loads_random_experts_as_the_card_says(
    to: str, folders: dict[str, Path], ids: list[int]
) -> None:
    model, loading = load(folders[to], torch.bfloat16, trust=False)
    assert type(model).__name__ == "GptOssForCausalLM"
    assert any(name.endswith("experts.gate_up_proj") for name in loading["missing_keys"])
    assert any(name.endswith("w13_weight_packed") for name in loading["unexpected_keys"])
    assert not torch.equal(logits_of(model, ids), logits_of(decoded(folders[to], torch.bfloat16), ids))
    assert "loads it wrongly**: transformers takes its own class" in (folders[to] / "README.md").read_text()


def test_without_its_code_a_w8a8_folder_does_not_run_as_the_card_says(folders: dict[str, Path], ids: list[int]) -> None:
    model, loading = load(folders["int8"], torch.bfloat16, trust=False)
    assert any(name.endswith("gate_up_proj.weight_scale") for name in loading["unexpected_keys"])
    with pytest.raises(RuntimeError):
        logits_of(model, ids)
    assert "does not run**: transformers' own class" in (folders["int8"] / "README.md").read_text()

"""The layouts that fine-tunes and other tools leave: bf16 experts, fused or one by one, under several namings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from support import safetensors_files as st
from support.model import Model, Spec
from support.release import config_hf, hf_entries, hf_tensors, pretty, write_companions

Rope = Literal["parameters", "scaling"]
Meaning = Literal["deinterleaved", "halves"]


def config_bf16(spec: Spec, rope: Rope, with_dtype: bool) -> dict[str, Any]:
    """config.json of a bf16 checkpoint: `parameters` as transformers 5 writes, `scaling` as transformers 4 wrote."""
    config = config_hf(spec)
    del config["quantization_config"]
    if rope == "parameters":
        config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
        config |= {"swiglu_alpha": 1.702, "bos_token_id": None, "transformers_version": "5.23.0"}
    if with_dtype:
        config["dtype" if rope == "parameters" else "torch_dtype"] = "bfloat16"
    return config


def _dense(model: Model) -> dict[str, st.Lazy]:
    """Everything but the experts' weights, under HF names."""
    return {name: tensor for name, tensor in hf_tensors(model).items() if not name.endswith(("_blocks", "_scales"))}


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    """[E, out, in] float32 as [E, in, out] bf16."""
    return weight.to(torch.bfloat16).transpose(1, 2).contiguous()


def bf16_tensors(model: Model) -> dict[str, st.Lazy]:
    """The fused bf16 form: experts as [E, in, out], gate and up still alternating along the last axis."""
    result = _dense(model)
    for layer in range(model.spec.layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        result[prefix + "gate_up_proj"] = lambda layer=layer: _transposed(model.gate_up(layer))  # type: ignore[misc]
        result[prefix + "down_proj"] = lambda layer=layer: _transposed(model.down(layer))  # type: ignore[misc]
    return result


def _entries(model: Model, tensors: dict[str, st.Lazy]) -> dict[str, st.Entry]:
    """Shapes and dtypes; those of expert weights are known without making them."""
    spec, known = model.spec, hf_entries(model.spec)
    h, i, e = spec.hidden, spec.intermediate, spec.experts
    shapes = {
        "gate_up_proj": (e, h, 2 * i),
        "gate_up_proj_blocks": (e, h, 2 * i),
        "down_proj": (e, i, h),
        "down_proj_blocks": (e, i, h),
    }
    entries: dict[str, st.Entry] = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind in shapes:
            entries[name] = ("BF16", shapes[kind])
        else:
            entries[name] = known.get(name) or ("BF16", tuple(tensor().shape))
    return entries


def _write(model: Model, folder: Path, tensors: dict[str, st.Lazy], shard_limit: int | None) -> None:
    """Shards as transformers names them: numbered from 1, "of" the count, with metadata; an indented, sorted index."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = dict(sorted(_entries(model, tensors).items()))
    total = sum(map(st.size, entries.values()))
    parts = st.shards(entries, shard_limit or total * 4 // 10)
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = ["model.safetensors"]
    for name, part in zip(names, parts, strict=True):
        st.write(folder / name, part, tensors, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        metadata = {"total_parameters": total // 2, "total_size": total}
        (folder / "model.safetensors.index.json").write_text(pretty({"metadata": metadata, "weight_map": weight_map}))


def write_bf16(
    model: Model, folder: Path, rope: Rope = "parameters", with_dtype: bool = True, shard_limit: int | None = None
) -> None:
    """The fused bf16 form, as transformers saves it."""
    _write(model, folder, bf16_tensors(model), shard_limit)
    write_companions(model.spec, folder, config_bf16(model.spec, rope, with_dtype))


def write_bf16_bug(model: Model, folder: Path, shard_limit: int | None = None) -> None:
    """What transformers 5.23 saves after dequantizing: the fused bf16 tensors under the names of packed ones."""
    renamed = {
        name + "_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name: tensor
        for name, tensor in bf16_tensors(model).items()
    }
    _write(model, folder, renamed, shard_limit)
    write_companions(model.spec, folder, config_bf16(model.spec, "parameters", with_dtype=True))


def _experts(model: Model, layer: int) -> tuple[st.Lazy, st.Lazy, torch.Tensor, torch.Tensor]:
    """The weights of one layer in (out, in) order, bf16, with their biases."""
    prefix = f"block.{layer}.mlp."
    return (
        lambda: model.gate_up(layer).to(torch.bfloat16),
        lambda: model.down(layer).to(torch.bfloat16),
        model.tensors[prefix + "mlp1_bias"],
        model.tensors[prefix + "mlp2_bias"],
    )


def write_unsloth_linear(model: Model, folder: Path, shard_limit: int | None = None) -> None:
    """One linear layer (out, in) per expert, gate and up rows still alternating; the router one level deeper."""
    tensors = {
        name.replace(".mlp.router.", ".mlp.router.linear."): tensor
        for name, tensor in _dense(model).items()
        if ".mlp.experts." not in name
    }
    for layer in range(model.spec.layers):
        gate_up, down, gate_up_bias, down_bias = _experts(model, layer)
        weights = (("gate_up_projs", gate_up(), gate_up_bias), ("down_projs", down(), down_bias))
        for kind, weight, bias in weights:
            for e in range(model.spec.experts):
                prefix = f"model.layers.{layer}.mlp.experts.{kind}.{e}."
                tensors[prefix + "weight"] = lambda t=weight[e]: t  # type: ignore[misc]
                tensors[prefix + "bias"] = lambda t=bias[e]: t  # type: ignore[misc]
    _write(model, folder, tensors, shard_limit)
    write_companions(model.spec, folder, config_bf16(model.spec, "scaling", with_dtype=True))


def write_per_expert(
    model: Model, folder: Path, meaning: Meaning = "deinterleaved", shard_limit: int | None = None
) -> None:
    """Three linear layers (out, in) per expert.

    deinterleaved: gate_proj is rows 0::2 of the fused rows, up_proj rows 1::2, as the names promise. halves: gate_proj
    is the first half of the alternating rows and up_proj the second, which the names hide.
    """
    tensors = {name: tensor for name, tensor in _dense(model).items() if ".mlp.experts." not in name}
    middle = model.spec.intermediate
    rows = {"deinterleaved": (slice(0, None, 2), slice(1, None, 2)), "halves": (slice(0, middle), slice(middle, None))}
    gate, up = rows[meaning]
    for layer in range(model.spec.layers):
        gate_up, down, gate_up_bias, down_bias = _experts(model, layer)
        fused, out = gate_up(), down()
        for e in range(model.spec.experts):
            prefix = f"model.layers.{layer}.mlp.experts.{e}."
            for kind, weight, bias in (
                ("gate_proj", fused[e, gate], gate_up_bias[e, gate]),
                ("up_proj", fused[e, up], gate_up_bias[e, up]),
                ("down_proj", out[e], down_bias[e]),
            ):
                tensors[f"{prefix}{kind}.weight"] = lambda t=weight: t  # type: ignore[misc]
                tensors[f"{prefix}{kind}.bias"] = lambda t=bias: t  # type: ignore[misc]
    _write(model, folder, tensors, shard_limit)
    write_companions(model.spec, folder, config_bf16(model.spec, "scaling", with_dtype=True))

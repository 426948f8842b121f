"""Converted GGUFs as gguf-py reads and decodes them: every tensor holds the source's values."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray
from support.checkpoints import AWKWARD, SMALL, Model, write_hf
from support.gguf_files import gguf_name
from support.judges import convert
from support.release import hf_tensors

F32 = NDArray[np.float32]

DENSE = {"token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output"}


def truth(model: Model) -> dict[str, F32]:
    """GGUF name → the values that belong there."""
    values: dict[str, F32] = {}
    for name, tensor in hf_tensors(model).items():
        if ".mlp.experts." not in name:
            values[gguf_name(name)] = tensor().float().numpy()
    for layer in range(model.spec.layers):
        prefix = f"blk.{layer}.ffn_"
        bias = model.tensors[f"block.{layer}.mlp.mlp1_bias"].float().numpy()
        gate_up = model.gate_up(layer).numpy()
        for part, first in (("gate", 0), ("up", 1)):
            values[f"{prefix}{part}_exps.weight"] = gate_up[:, first::2]
            values[f"{prefix}{part}_exps.bias"] = bias[:, first::2]
        values[f"{prefix}down_exps.weight"] = model.down(layer).numpy()
        values[f"{prefix}down_exps.bias"] = model.tensors[f"block.{layer}.mlp.mlp2_bias"].float().numpy()
    return values


def decoded(*paths: Path) -> dict[str, F32]:
    """All tensors of a file, or of the parts of one, in float32."""
    tensors = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    return {t.name: dequantize(t.data, t.tensor_type).reshape(tuple(map(int, reversed(t.shape)))) for t in tensors}


@pytest.fixture(scope="module")
def plain() -> Model:
    return Model(SMALL)


@pytest.fixture(scope="module")
def awkward() -> Model:
    return Model(SMALL, awkward=AWKWARD)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16", "f32"])
def test_every_value_is_the_source_s(experts: str, awkward: Model, tmp_path: Path) -> None:
    """Rare but legal MXFP4 groups among them. What is bfloat16 in the source stays exact in BF16 and in F32."""
    write_hf(awkward, tmp_path / "hf")
    dense = "f32" if experts == "f32" else "bf16"
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf", "--experts", experts, "--dense", dense)
    check_equal(decoded(path), truth(awkward))


@pytest.mark.parametrize("experts", ["q8_0", "q5_0", "f16"])
def test_exact_transcodings_hold_every_value(experts: str, plain: Model, tmp_path: Path) -> None:
    write_hf(plain, tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf", "--experts", experts)
    check_equal(decoded(path), truth(plain))


def test_split_files_hold_every_value_once(plain: Model, tmp_path: Path) -> None:
    write_hf(plain, tmp_path / "hf")
    folder = convert(tmp_path / "hf", tmp_path / "parts", "gguf", "--split-size", "200KB")
    parts = sorted(folder.glob("*.gguf"))
    assert sum(len(gguf.GGUFReader(path).tensors) for path in parts) == len(truth(plain))
    check_equal(decoded(*parts), truth(plain))


def test_eight_bit_dense_matrices_are_off_by_half_a_step_at_most(plain: Model, tmp_path: Path) -> None:
    """A step is the block's largest magnitude over 127, itself rounded to float16."""
    write_hf(plain, tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf", "--dense", "q8_0")
    found, wanted = decoded(path), truth(plain)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    rounded = {name for name, kind in types.items() if kind == gguf.GGMLQuantizationType.Q8_0}
    assert rounded == {n for n in wanted if n.endswith("weight") and n.split(".")[-2] in DENSE}
    for name in rounded:
        blocks = wanted.pop(name).reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        assert (np.abs(found.pop(name).reshape(-1, 32) - blocks) <= step * 0.5 + step * 127 * 2**-11).all()
    check_equal(found, wanted)


def check_equal(found: dict[str, F32], wanted: dict[str, F32]) -> None:
    """The same names, and under each the same numbers."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(found[name], values), name

"""The proof of widened and cut files: what must be zero is, what a cut touches is judged by its codecs, the rest as ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.checkpoints import STEADY, Model, write_hf

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.proof import Proof, prove
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import ProofFailed

SPEC = replace(STEADY, heads=4, intermediate=288)  # widened: 160 → 256 columns, 288 → 320
Change = Callable[[np.ndarray], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proofs")
    write_hf(Model(SPEC), folder / "release")
    wide = Options(to="gguf", experts="f32", dense="f32", widen="256x320", proof=False)
    convert(folder / "release", folder / "wide.gguf", wide, silent)
    cut = Options(to="gguf", type="q3_k_s", widen="cut", proof=False, allow_larger=True)
    convert(folder / "release", folder / "cut.gguf", cut, silent)
    return folder


def proved(folder: Path, name: str, tmp_path: Path, changes: dict[str, Change]) -> Proof:
    """The proof of a copy of a file in which some tensors' values [experts, rows, columns] were changed."""
    shutil.copy(folder / name, tmp_path / name)
    reader = gguf.GGUFReader(tmp_path / name, "r+")
    for tensor in reader.tensors:
        if tensor.name in changes:
            changes[tensor.name](tensor.data)
    reader.data.flush()
    with open_source(folder / "release") as source, open_source(tmp_path / name) as artifact:
        return prove(source, artifact, threads=2, advance=lambda _: None)


def columns(first: int, value: float = 3.0) -> Change:
    def change(data: np.ndarray) -> None:
        data[..., first:] = value

    return change


def rows(first: int, value: float = 3.0) -> Change:
    def change(data: np.ndarray) -> None:
        data[..., first:, :] = value

    return change


def times(factor: float) -> Change:
    def change(data: np.ndarray) -> None:
        data *= np.float32(factor)

    return change


def test_the_untouched_file_is_proved_lossless(folder: Path, tmp_path: Path) -> None:
    assert proved(folder, "wide.gguf", tmp_path, {}).lossless


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("token_embd.weight", columns(160, 1e-3)),
        ("blk.1.attn_norm.weight", columns(160)),
        ("blk.0.post_attention_norm.weight", columns(255)),
        ("output_norm.weight", columns(160)),
        ("blk.2.attn_output.weight", rows(160)),
        ("blk.0.attn_output.bias", columns(160)),
        ("blk.1.ffn_down_exps.weight", rows(255)),
        ("blk.1.ffn_down_exps.bias", columns(160)),
        ("blk.0.ffn_gate_exps.weight", rows(288)),
        ("blk.0.ffn_up_exps.weight", rows(319)),
        ("blk.2.ffn_gate_exps.bias", columns(288)),
        ("blk.2.ffn_up_exps.bias", columns(288)),
        ("token_embd.weight", columns(200, np.nan)),
    ],
)
def test_what_is_not_zero_in_padding_that_computes_fails_the_proof_by_name(
    folder: Path, tmp_path: Path, tensor: str, change: Change
) -> None:
    with pytest.raises(ProofFailed, match="is not zero") as error:
        proved(folder, "wide.gguf", tmp_path, {tensor: change})
    assert error.value.tensor == tensor


@pytest.mark.parametrize(
    "tensor",
    [
        "output.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.2.attn_v.weight", "blk.0.ffn_gate_inp.weight",
        "blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight",
    ],
)  # fmt: skip
def test_columns_that_meet_only_zeros_may_hold_anything_finite(folder: Path, tmp_path: Path, tensor: str) -> None:
    def true_rows_only(data: np.ndarray) -> None:
        data[..., :288, 160:] = 3.0  # of gate and up the added rows must be zeros

    assert proved(folder, "wide.gguf", tmp_path, {tensor: true_rows_only}).lossless

    def infinite(data: np.ndarray) -> None:
        data[..., 5, 200] = np.inf

    with pytest.raises(ProofFailed):
        proved(folder, "wide.gguf", tmp_path, {tensor: infinite})


def test_columns_of_down_beyond_the_neurons_may_too(folder: Path, tmp_path: Path) -> None:
    def beyond(data: np.ndarray) -> None:
        data[:, :160, 288:] = 3.0

    assert proved(folder, "wide.gguf", tmp_path, {"blk.0.ffn_down_exps.weight": beyond}).lossless


@pytest.mark.parametrize("name", ["wide.gguf", "cut.gguf"])
@pytest.mark.parametrize(
    ("tensor", "factor"),
    [("blk.0.attn_norm.weight", 1.5), ("blk.1.attn_sinks.weight", 1.5), ("blk.2.ffn_gate_inp.weight", 0.5)],
)
def test_what_no_cut_touches_is_judged_as_in_any_other_file(
    folder: Path, tmp_path: Path, name: str, tensor: str, factor: float
) -> None:
    with pytest.raises(ProofFailed, match="does not hold the source's values"):
        proved(folder, name, tmp_path, {tensor: times(factor)})


@pytest.mark.parametrize("bias", ["blk.0.ffn_gate_exps.bias", "blk.2.ffn_down_exps.bias"])
def test_biases_of_what_is_kept_are_the_sources(folder: Path, tmp_path: Path, bias: str) -> None:
    with pytest.raises(ProofFailed, match="does not hold the source's values"):
        proved(folder, "cut.gguf", tmp_path, {bias: times(1.01)})


def test_what_a_cut_has_dropped_is_told_apart_from_what_its_codecs_have_rounded(folder: Path, tmp_path: Path) -> None:
    proof = proved(folder, "cut.gguf", tmp_path, {})
    found = {tensor.name: tensor for tensor in proof.tensors}
    with open_source(folder / "release") as source, open_source(folder / "cut.gguf") as artifact:
        assert artifact.kept is not None
        kept = artifact.kept[1]
        gone = whole = 0.0
        for expert in range(source.config.experts):
            values = source.views[layer_name(1, DOWN)].read(expert, 0, 160).values().astype(np.float64)
            whole += float((values**2).sum())
            gone += float((np.delete(values, kept[expert], axis=1) ** 2).sum())
    down = found[layer_name(1, DOWN)]
    assert down.lost_by_cutting == pytest.approx((gone / whole) ** 0.5, rel=1e-5)
    assert 0.05 < down.rms_error < 0.25  # Q3_K's own
    bias = found[layer_name(1, GATE_UP + "_bias")]
    assert (bias.verdict, bias.rms_error) == ("different", 0)
    assert bias.lost_by_cutting is not None
    assert found[layer_name(1, "self_attn.sinks")].lost_by_cutting is None
    for layer in proof.layers:
        assert layer.cut_errors is not None
        assert max(layer.expert_errors) < layer.allowed
        assert all(0 < error < 1 for error in layer.cut_errors)


def test_a_gain_that_is_off_by_more_than_float32s_rounding_fails(folder: Path, tmp_path: Path) -> None:
    """Though it is one among many, and small: its share of the vector's norm would pass."""

    def any_floats(gains: np.ndarray) -> None:
        gains[:] = np.random.default_rng(1).uniform(0.5, 2, gains.shape)
        gains[7] = 1e-7

    names = [f"blk.{n}.{part}_norm.weight" for n in range(3) for part in ("attn", "post_attention")]
    convert(folder / "release", tmp_path / "in.gguf", Options(to="gguf", proof=False), silent)
    reader = gguf.GGUFReader(tmp_path / "in.gguf", "r+")
    for tensor in reader.tensors:
        if tensor.name in [*names, "output_norm.weight"]:
            any_floats(tensor.data)
    reader.data.flush()
    convert(tmp_path / "in.gguf", tmp_path / "x.gguf", Options(to="gguf", widen="256x288"), silent)
    reader = gguf.GGUFReader(tmp_path / "x.gguf", "r+")
    (gain,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_norm.weight")
    gain.data[7] *= np.float32(1.000001)
    reader.data.flush()
    with (
        open_source(tmp_path / "in.gguf") as source,
        open_source(tmp_path / "x.gguf") as artifact,
        pytest.raises(ProofFailed, match="gain is not the source's") as error,
    ):
        prove(source, artifact, threads=1, advance=lambda _: None)
    assert error.value.tensor == "blk.1.attn_norm.weight"

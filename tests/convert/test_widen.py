"""Widening: the wide model computes the same function, and reading undoes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import AWKWARD, SMALL, STEADY, Model, write_bf16, write_hf

from gptoss_convert.convert import conversion, target_gguf
from gptoss_convert.convert.names import as_stack, canonical_shapes, is_expert_matrix
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.widen import Gain, Wide, Widening, gain_factor, required, widen, widened_config
from gptoss_convert.errors import Refused
from gptoss_convert.kernels.codecs import CODECS


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def matrix(source: Source, name: str, expert: int = 0) -> torch.Tensor:
    view = source.views[name]
    return torch.from_numpy(view.read(expert, 0, view.stack[1]).values().astype(np.float64))


def layer_output(source: Source, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """Attention's projections and the experts of one layer on a residual stream f64 [T, D], attention itself left out: what
    widening touches. Everything in float64.
    """
    config, prefix = source.config, f"model.layers.{layer}."

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_eps) * matrix(source, prefix + name)[0]

    x = norm(stream, "input_layernorm.weight")
    q, k, v = (
        x @ matrix(source, f"{prefix}self_attn.{p}_proj.weight").T + matrix(source, f"{prefix}self_attn.{p}_proj.bias")
        for p in "qkv"
    )
    mixed = q + torch.cat([k, v, k], 1)[:, : q.shape[1]]
    stream = stream + mixed @ matrix(source, prefix + "self_attn.o_proj.weight").T
    stream = stream + matrix(source, prefix + "self_attn.o_proj.bias")
    x = norm(stream, "post_attention_layernorm.weight")
    router = x @ matrix(source, prefix + "mlp.router.weight").T + matrix(source, prefix + "mlp.router.bias")
    share = torch.softmax(router, -1)
    biases = (
        matrix(source, prefix + "mlp.experts.gate_up_proj_bias"),
        matrix(source, prefix + "mlp.experts.down_proj_bias"),
    )
    for expert in range(config.experts):
        both = x @ matrix(source, prefix + "mlp.experts.gate_up_proj", expert).T + biases[0][expert]
        gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        out = inner @ matrix(source, prefix + "mlp.experts.down_proj", expert).T + biases[1][expert]
        stream = stream + share[:, expert : expert + 1] * out
    return stream


@settings(max_examples=8, deadline=None)
@given(
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)), step=st.sampled_from([32, 48, 50]), seed=st.integers(0, 99)
)
def test_the_wide_forward_equals_the_original(
    tmp_path_factory: pytest.TempPathFactory, extra: tuple[int, int], step: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("wide")
    write_hf(Model(SMALL, awkward=AWKWARD), folder)
    with open_source(folder) as source:
        config = source.config
        wide = widen(source, Widening(config.hidden + step * extra[0], config.intermediate + step * extra[1]))
        stream = torch.randn(3, config.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        padded = torch.zeros(3, wide.config.hidden, dtype=torch.float64)
        padded[:, : config.hidden] = stream
        for layer in range(config.layers):
            want, got = layer_output(source, layer, stream), layer_output(wide, layer, padded)
            assert torch.allclose(got[:, : config.hidden], want, rtol=1e-5, atol=1e-5)
            assert not got[:, config.hidden :].any()


def test_wide_views_have_the_wide_shapes_and_zeros_beyond(tmp_path: Path) -> None:
    write_hf(Model(SMALL), tmp_path)
    with open_source(tmp_path) as source:
        wide = widen(source, Widening(256, 128))
        for name, shape in canonical_shapes(wide.config).items():
            view = wide.views[name]
            assert view.stack == as_stack(shape)
            _, rows, columns = source.views[name].stack
            last = view.stack[0] - 1
            values = view.read(last, 0, view.stack[1]).values()
            assert not values[rows:].any()
            assert not values[:, columns:].any()
            assert values[:rows, :columns].any()


def test_packed_experts_stay_packed_where_blocks_of_32_fit(tmp_path: Path) -> None:
    write_hf(Model(SMALL), tmp_path)
    with open_source(tmp_path) as source:
        wide = widen(source, Widening(192, 128))
        assert {wide.views[name].encoding for name in wide.views if is_expert_matrix(name)} == {"mxfp4"}


def test_a_bf16_gain_comes_back_bit_for_bit() -> None:
    bits = np.arange(0x3000, 0x4800, dtype=np.uint16)  # every bfloat16 from 4.7e-10 to 2.6e5
    gains = (bits.astype(np.uint32) << 16).view(np.float32)[None]

    class Fixed:
        encoding, stack = "bf16", (1, 1, gains.shape[1])

        def read(self, *_: int):
            from gptoss_convert.kernels.chunks import Rows

            return Rows("bf16", bits.view(np.uint8)[None])

    factor = gain_factor(2880, 3072)
    wide = Wide(Fixed(), (1, 1, gains.shape[1] + 192), factor)
    back = Gain(wide, (1, 1, gains.shape[1]), factor, "bf16").read(0, 0, 1)
    assert np.array_equal(back.data.view(np.uint16)[0], bits)


def test_only_what_the_blocks_need_is_widened(tmp_path: Path) -> None:
    config = type("C", (), {"hidden": 2880, "intermediate": 2880})()
    blocks = {"token_embd.weight": "bf16", "blk.0.ffn_down_exps.weight": "mxfp4", "blk.0.attn_output.weight": "q8_0"}
    assert required(config, blocks) is None


def test_epsilon_shrinks_with_the_mean(tmp_path: Path) -> None:
    write_hf(Model(SMALL), tmp_path)
    with open_source(tmp_path) as source:
        wide = widened_config(source.config, Widening(256, 96))
        assert math.isclose(wide.rms_eps, source.config.rms_eps * 160 / 256)


@pytest.mark.parametrize("write", [write_hf, lambda m, f: write_bf16(m, f, rope="parameters", with_dtype=True)])
def test_a_widened_gguf_is_read_as_the_model_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Model, Path], None]
) -> None:
    write(Model(STEADY), tmp_path / "source")
    monkeypatch.setattr(target_gguf, "required", lambda *_: Widening(256, 128))
    outcome = conversion.convert(
        tmp_path / "source", tmp_path / "wide.gguf", conversion.Options(to="gguf", dense="f32"), silent
    )
    assert outcome.proof is not None
    assert outcome.proof.lossless
    assert any("widened from 160 to 256" in note for note in outcome.document["artifact"]["notes"])
    with open_source(tmp_path / "wide.gguf") as read:
        assert (read.config.hidden, read.config.intermediate) == (160, 96)
        assert read.config.rms_eps == 1e-5
        assert any("widened" in note for note in read.notes)


def test_without_leave_to_widen_the_type_is_refused_with_tensor_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(Model(SMALL), tmp_path / "source")
    recipe = tmp_path / "k.toml"
    parts = {"gate": "q3_k", "up": "q3_k", "down": "q3_k", "attention": "bf16", "embedding": "bf16", "head": "bf16"}
    recipe.write_text("".join(f'{part} = "{codec}"\n' for part, codec in parts.items()))
    options = conversion.Options(to="gguf", recipe=recipe, widen="none", allow_larger=True)
    with pytest.raises(Refused, match="do not divide") as error:
        conversion.convert(tmp_path / "source", tmp_path / "out.gguf", options, silent)
    assert error.value.tensor == "blk.0.ffn_gate_exps.weight"
    assert "--widen auto" in str(error.value)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("name", ["q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq2_s", "iq2_xxs"])
def test_padding_costs_the_last_super_block_no_precision(name: str) -> None:
    # 2880 = 11 · 256 + 64: the last super-block holds 64 values and 192 columns of padding.
    codec = CODECS[name]
    values = np.zeros((48, 256), np.float32)
    values[:, :64] = np.random.default_rng(5).standard_normal((48, 64), np.float32)
    importance = (np.arange(256) < 64).astype(np.float32)

    def error(weights: np.ndarray | None) -> float:
        assert codec.encode is not None
        return float(np.square(codec.decode(codec.encode(values, weights))[:, :64] - values[:, :64]).sum())

    assert error(importance) <= 1.001 * error(None)

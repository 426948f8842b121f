"""Widening: the wide model computes the same function, and reading undoes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.checkpoints import SMALL, STEADY, Model, write_bf16, write_hf

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert import conversion
from gptoss_convert.convert.names import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    HEAD,
    as_stack,
    canonical_shapes,
    is_expert_matrix,
)
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import Layout, Source, open_source
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.convert.widen import (
    GAIN_ROUNDING,
    Gain,
    Wide,
    Widening,
    gain_encoding,
    gain_factor,
    is_gain,
    narrow,
    required,
    widen,
    widened_config,
)
from gptoss_convert.errors import Refused
from gptoss_convert.kernels import layer as layer_maths
from gptoss_convert.kernels.chunks import Rows
from gptoss_convert.kernels.codecs import CODECS, encode_float


@dataclass(frozen=True)
class Held:
    """A view of numbers in memory, f32 [E, R, C], in an encoding of floats that holds them exactly."""

    values: np.ndarray
    encoding: str

    @property
    def stack(self) -> Stack:
        return self.values.shape  # type: ignore[return-value]

    def read(self, expert: int, start: int, stop: int) -> Rows:
        return Rows(self.encoding, encode_float(self.values[expert, start:stop], self.encoding))


def random_model(seed: int, hidden: int, intermediate: int, eps: float, encoding: str) -> Source:
    """A model of two layers, one of which slides, with numbers of the size that a trained one has."""
    config = ModelConfig(
        layers=2, experts=5, experts_per_token=2, hidden=hidden, intermediate=intermediate, vocab=30, heads=4, kv_heads=2,
        head_dim=6, sliding_window=3, max_positions=64, original_positions=16, rms_eps=eps,
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    views: dict[str, View] = {}
    for name, shape in canonical_shapes(config).items():
        stack = as_stack(shape)
        values = generator.standard_normal(stack) * (0.3 if name.endswith(("bias", "sinks")) else stack[2] ** -0.5)
        if is_gain(name):
            values = generator.uniform(0.2, 3, stack)
        encoded = Rows(encoding, encode_float(values.astype(np.float32).reshape(-1, stack[2]), encoding))
        views[name] = Held(encoded.values().reshape(stack), encoding)
    return Source(Path("model"), Layout.BF16, config, views, [])


class Weights:
    """Tensors of a source, in float32, without the layer in their names."""

    def __init__(self, source: Source, layer: int | None = None) -> None:
        self._source, self._prefix = source, "" if layer is None else f"model.layers.{layer}."

    def __call__(self, name: str, expert: int = 0) -> torch.Tensor:
        view = self._source.views[self._prefix + name]
        return torch.from_numpy(view.read(expert, 0, view.stack[1]).values())

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self(name + ".weight").T + self(name + ".bias")[0]


def logits(source: Source, ids: torch.Tensor, routed: list[torch.Tensor]) -> torch.Tensor:
    """The whole model: tokens [T] → [T, V], in float32; `routed` receives the experts that each token went to."""
    config, outer = source.config, Weights(source)
    frequencies = layer_maths.yarn_frequencies(
        theta=config.rope_theta, factor=config.rope_factor, width=config.head_dim, original=config.original_positions,
        beta_fast=config.beta_fast, beta_slow=config.beta_slow, truncate=config.truncate,
    )  # fmt: skip
    magnitude = layer_maths.yarn_magnitude(config.rope_factor)
    stream = outer(EMBEDDING)[ids]
    for number in range(config.layers):
        weights = Weights(source, number)
        x = layer_maths.rms_norm(stream, weights("input_layernorm.weight")[0], config.rms_eps)
        q, k, v = (
            weights.linear(x, f"self_attn.{part}_proj").reshape(1, len(ids), -1, config.head_dim) for part in "qkv"
        )
        q, k = (layer_maths.rotate(part, frequencies, magnitude) for part in (q, k))
        window = config.sliding_window if config.sliding[number] else None
        mixed = layer_maths.attention(q, k, v, weights("self_attn.sinks")[0], window)[0]
        stream = stream + weights.linear(mixed, "self_attn.o_proj")
        x = layer_maths.rms_norm(stream, weights("post_attention_layernorm.weight")[0], config.rms_eps)
        experts, shares = layer_maths.route(
            x, weights("mlp.router.weight"), weights("mlp.router.bias")[0], config.experts_per_token
        )
        routed.append(experts)
        out = torch.zeros_like(stream)
        for token, choice in enumerate(experts):
            for share, expert in zip(shares[token], choice.tolist(), strict=True):
                both = x[token] @ weights(GATE_UP, expert).T + weights(GATE_UP + "_bias")[expert]
                inner = layer_maths.swiglu(both, config.swiglu_limit)
                out[token] += share * (weights(DOWN, expert) @ inner + weights(DOWN + "_bias")[expert])
        stream = stream + out
    return layer_maths.rms_norm(stream, outer(FINAL_NORM)[0], config.rms_eps) @ outer(HEAD).T


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    hidden=st.integers(17, 100),
    intermediate=st.integers(9, 100),
    extra=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    eps=st.sampled_from([1e-5, 1.2345678e-5, 0.3]),
    encoding=st.sampled_from(["bf16", "f16", "f32"]),
)
def test_the_wide_model_computes_the_originals_logits(
    seed: int, hidden: int, intermediate: int, extra: tuple[int, int], eps: float, encoding: str
) -> None:
    """In float32, for widths that no block divides: embedding, attention with rope, sinks and window, top-k routing, head."""
    source = random_model(seed, hidden, intermediate, eps, encoding)
    wide = widen(source, Widening(hidden + extra[0], intermediate + extra[1]))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 30, 7))
    routes: list[list[torch.Tensor]] = [[], []]
    want, got = (logits(model, ids, into) for model, into in zip((source, wide), routes, strict=True))
    assume(all(map(torch.equal, *routes)))  # two scores that float32 does not tell apart
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    hidden=st.integers(17, 100),
    intermediate=st.integers(9, 100),
    extra=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    encoding=st.sampled_from(["bf16", "f16", "f32"]),
)
def test_narrowing_a_wide_model_gives_the_original(
    seed: int, hidden: int, intermediate: int, extra: tuple[int, int], encoding: str
) -> None:
    source = random_model(seed, hidden, intermediate, 1e-5, encoding)
    wide = Widening(hidden + extra[0], intermediate + extra[1])
    gain, exact = gain_encoding(source, wide)
    assert (gain, exact) == (encoding, True) or (encoding == "f32" and gain == "f32")
    stored = widen(source, wide)
    stored = replace(stored, config=replace(stored.config, rms_eps=float(str(np.float32(stored.config.rms_eps)))))
    back = narrow(stored, hidden, intermediate, gain)
    assert (back.config.hidden, back.config.intermediate) == (hidden, intermediate)
    assert np.float32(back.config.rms_eps) == np.float32(1e-5)
    for name, view in source.views.items():
        want, found = (v.read(0, 0, view.stack[1]).values() for v in (view, back.views[name]))
        if is_gain(name) and not exact:
            assert (np.abs(found - want.astype(np.float64)) <= GAIN_ROUNDING * (1 + 1e-6) * np.abs(want)).all()
        else:
            assert np.array_equal(found, want)


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

    factor = gain_factor(2880, 3072)
    wide = Wide(Held(gains[None], "bf16"), (1, 1, gains.shape[1] + 192), factor)
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
    tmp_path: Path, write: Callable[[Model, Path], None]
) -> None:
    write(Model(STEADY), tmp_path / "source")
    outcome = conversion.convert(
        tmp_path / "source", tmp_path / "wide.gguf", conversion.Options(to="gguf", dense="f32", widen="256x128"), silent
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


SYMMETRIC = ("q4_0", "q5_0", "q8_0", "q3_k", "q6_k", "mxfp4", "nvfp4", "q2_0")
SHARED = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def padded_error(name: str, columns: int, importance: np.ndarray | None) -> float:
    """Squared error of the first columns of super-blocks whose other columns are padding."""
    codec = CODECS[name]
    assert codec.encode is not None
    values = np.zeros((48, 256), np.float32)
    values[:, :columns] = np.random.default_rng(5).standard_normal((48, columns)) * 0.02
    decoded = codec.decode(codec.encode(values, importance))
    return float(np.square(decoded - values)[:, :columns].sum(dtype=np.float64))


@pytest.mark.parametrize("name", [*SYMMETRIC, *SHARED])
def test_padding_without_importance_costs_the_models_values_no_precision(name: str) -> None:
    """At column 40, within the blocks that share scales, lattices and minima would be spent on zeros that count."""
    mask = (np.arange(256) < 40).astype(np.float32)
    masked, counted = padded_error(name, 40, mask), padded_error(name, 40, np.ones(256, np.float32))
    assert masked < 0.98 * counted if name in SHARED else masked <= counted


@pytest.mark.parametrize("name", [*SYMMETRIC, *SHARED])
def test_at_the_releases_width_it_costs_none_at_all(name: str) -> None:
    """2880 = 11 · 256 + 64: the last super-block holds 64 values, and parts of 16 or 32 do not see the rest."""
    mask = (np.arange(256) < 64).astype(np.float32)
    assert padded_error(name, 64, mask) <= 1.001 * padded_error(name, 64, np.ones(256, np.float32))


def test_the_runner_gives_padding_no_importance(tmp_path: Path) -> None:
    write_hf(Model(replace(STEADY, heads=4)), tmp_path / "source")
    parts = {"gate": "q6_k", "up": "q6_k", "down": "q6_k", "attention": "iq2_s", "embedding": "q6_k", "head": "q6_k"}
    (tmp_path / "r.toml").write_text("".join(f'{part} = "{codec}"\n' for part, codec in parts.items()))
    options = conversion.Options(to="gguf", recipe=tmp_path / "r.toml", allow_larger=True, proof=False)
    conversion.convert(tmp_path / "source", tmp_path / "x.gguf", options, silent)
    codec, name = CODECS["iq2_s"], "model.layers.1.self_attn.q_proj.weight"
    assert codec.encode is not None
    with open_source(tmp_path / "source") as source, open_source(tmp_path / "x.gguf") as made:
        values = np.zeros((256, 256), np.float32)
        values[:, :160] = source.views[name].read(0, 0, 256).values()
        found = made.wide_views[name].read(0, 0, 256)
    assert isinstance(found, Rows)
    assert np.array_equal(found.data, codec.encode(values, (np.arange(256) < 160).astype(np.float32)))
    assert not np.array_equal(found.data, codec.encode(values, np.ones(256, np.float32)))

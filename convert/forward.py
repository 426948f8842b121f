"""The model, one layer at a time: any source or artifact of ours, run in torch without ever being in memory as a whole.

    token ids ─ embed ─ for each layer:  attention_inputs ─► attention_outputs ─► add_attention ─► choose ─► add_experts ─► logits

`Weights` reads and decodes what is asked for, an expert's matrix at a time, straight from its packed form; `Walk` holds what
flows: x, the residual stream f32 [N, D] of all N tokens, u, the experts' inputs f32 [N, D], and each token's experts and shares.
Beyond SPILL_BYTES each of x and u is a file that disappears with it. Everything is float32 (TF32 is left off, as torch
leaves it), on CPU or CUDA; the sum over a token's experts runs by ascending expert, so that nothing depends on how many tokens
are taken at once but the last bits of matrix products.

Memory: walk_memory.py adds it up; a test holds 120b's shapes under 8 GiB.

Nothing of a layer is hidden in one call, because calibration and GPTQ look at each step's inputs and change the weights
between two steps (`Weights.replace`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.calibration import DEVICE
from gptoss_convert.convert.names import DOWN, EMBEDDING, FINAL_NORM, GATE_UP, HEAD, canonical_shapes, layer_name
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.walk_memory import EMBEDDING_ROWS, HEAD_BYTES, SPILL_BYTES, TOKENS_AT_ONCE
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.output import reserve
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels.chunks import Chunk, Mxfp4
from gptoss_convert.kernels.products import by_rows

I32 = NDArray[np.int32]


def choose_device(name: str) -> torch.device:
    """The device of this name, or UsageError where there is none."""
    if not DEVICE.fullmatch(name):
        raise UsageError("no such device", found=name, expected="cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "torch cannot use this device", found=f"{name}: {str(error).splitlines()[0][:200]}", expected="cpu, or a GPU",
            remedy="install torch for CUDA and its driver, or leave --device out",
        ) from error  # fmt: skip
    return device


class Weights:
    """A source's tensors on a device as float32. Dense tensors of a layer are kept until `forget`."""

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, torch.device(device)
        self._shapes = canonical_shapes(source.config)
        self._kept: dict[str, Tensor] = {}

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.source.config

    def dense(self, name: str) -> Tensor:
        """A tensor that is no expert matrix, in its canonical shape."""
        if name not in self._kept:
            rows = self.source.views[name].stack[1]
            self._kept[name] = self.rows(name, 0, rows).reshape(self._shapes[name])
        return self._kept[name]

    def of_layer(self, layer: int, inner: str) -> Tensor:
        """`dense` by layer and inner name."""
        return self.dense(layer_name(layer, inner))

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's matrix [R, C] of a stack."""
        return self._values(self.source.views[name].read(expert, 0, self.source.views[name].stack[1]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix [R, C], not kept."""
        return self._values(self.source.views[name].read(0, start, stop))

    def replace(self, name: str, values: Tensor) -> None:
        """Use these values for a dense tensor until `forget`."""
        self._kept[name] = values.to(self.device)

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def _values(self, chunk: Chunk) -> Tensor:
        if isinstance(chunk, Mxfp4) and self.device.type != "cpu":
            blocks, scales = (torch.from_numpy(part).to(self.device) for part in (chunk.blocks, chunk.scales))
            return maths.decode_mxfp4(blocks, scales)
        return torch.from_numpy(np.ascontiguousarray(chunk.values())).to(self.device)


class Store:
    """f32 [N, width] on the CPU: in memory, or beyond `limit` bytes in a file that nobody sees and that goes with it."""

    def __init__(self, tokens: int, width: int, folder: Path | None = None, limit: int = SPILL_BYTES) -> None:
        self.spilled = 4 * tokens * width > limit
        if self.spilled:
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                reserve(file.fileno(), 4 * tokens * width, Path(file.name).parent)
                array = np.memmap(file, np.float32, "r+", shape=(tokens, width))
        else:
            array = np.zeros((tokens, width), np.float32)  # type: ignore[assignment]
        self.data = torch.from_numpy(array)


class Walk:
    """All sequences on their way through the layers. `spans`: the tokens of runs of equally long sequences, and how many."""

    def __init__(self, weights: Weights, sequences: Sequence[I32], folder: Path | None = None) -> None:
        self.weights, self.config = weights, weights.config
        self.ids = torch.from_numpy(np.concatenate([np.asarray(s, np.int64) for s in sequences]))
        if int(self.ids.min()) < 0 or int(self.ids.max()) >= self.config.vocab:
            raise BadInput(
                "a token is none of the model's rows", file=weights.source.path,
                found=int(self.ids.max()), expected=f"ids below {self.config.vocab}",
            )  # fmt: skip
        self.spans = list(_spans([len(s) for s in sequences]))
        count = len(self.ids)
        self.x = Store(count, self.config.hidden, folder).data
        self.u = Store(count, self.config.hidden, folder).data
        self.experts = torch.zeros((count, self.config.experts_per_token), dtype=torch.int64)
        self.shares = torch.zeros((count, self.config.experts_per_token))
        c = self.config
        self._frequencies = maths.yarn_frequencies(
            theta=c.rope_theta, factor=c.rope_factor, width=c.head_dim, original=c.original_positions,
            beta_fast=c.beta_fast, beta_slow=c.beta_slow, truncate=c.truncate,
        )  # fmt: skip
        own = c.attention_factor
        self._magnitude = maths.yarn_magnitude(c.rope_factor) if own is None else own

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.ids)

    def run(self) -> None:
        """Every layer; `logits` may be asked for afterwards."""
        self.embed()
        for layer in range(self.config.layers):
            self.attend(layer)
            self.choose(layer)
            self.add_experts(layer)
            self.weights.forget()

    def embed(self) -> None:
        """x of every token: the rows of the embedding, read a few thousand at a time."""
        for start in range(0, self.config.vocab, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, self.config.vocab)
            here = torch.nonzero((self.ids >= start) & (self.ids < stop))[:, 0]
            if len(here):
                self.x[here] = self.weights.rows(EMBEDDING, start, stop).cpu()[self.ids[here] - start]

    def attention_inputs(self, layer: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Of each span: its tokens, how many sequences they are, and what q, k and v multiply, [T, D]."""
        gain = self.weights.of_layer(layer, "input_layernorm.weight")
        for span, count in self.spans:
            yield span, count, maths.rms_norm(self.x[span].to(gain.device), gain, self.config.rms_eps)

    def attention_outputs(self, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Of each span: what the output projection multiplies, [T, H · head_dim]."""
        c, of = self.config, self.weights.of_layer
        window = c.sliding_window if c.sliding[layer] else None
        for span, count, h in self.attention_inputs(layer):
            q, k, v = (
                _affine(h, of(layer, f"self_attn.{p}_proj.weight"), of(layer, f"self_attn.{p}_proj.bias")).reshape(
                    count, -1, heads, c.head_dim
                )
                for p, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
            )
            q, k = (maths.rotate(t, self._frequencies, self._magnitude) for t in (q, k))
            out = maths.attention(q, k, v, of(layer, "self_attn.sinks"), window)
            yield span, out.reshape(len(h), -1)

    def add_attention(self, span: slice, layer: int, output: Tensor) -> None:
        """x += output projection of [T, H · head_dim]."""
        of = self.weights.of_layer
        added = _affine(output, of(layer, "self_attn.o_proj.weight"), of(layer, "self_attn.o_proj.bias"))
        self.x[span] += added.cpu()

    def attend(self, layer: int) -> None:
        """The whole of attention. Spans are independent, so x may change while they are walked through."""
        for span, output in self.attention_outputs(layer):
            self.add_attention(span, layer, output)

    def choose(self, layer: int) -> None:
        """u, and every token's experts and shares."""
        of = self.weights.of_layer
        gain = of(layer, "post_attention_layernorm.weight")
        router, bias = of(layer, "mlp.router.weight"), of(layer, "mlp.router.bias")
        for start in range(0, self.tokens, TOKENS_AT_ONCE):
            span = slice(start, start + TOKENS_AT_ONCE)
            u = maths.rms_norm(self.x[span].to(gain.device), gain, self.config.rms_eps)
            experts, shares = maths.route(u, router, bias, self.config.experts_per_token)
            self.u[span], self.experts[span], self.shares[span] = u.cpu(), experts.cpu(), shares.cpu()

    def chosen(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens [n] that an expert gets, ascending, and its share of each."""
        token, place = torch.nonzero(self.experts == expert, as_tuple=True)
        return token, self.shares[token, place]

    def inputs(self, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """u of some tokens, TOKENS_AT_ONCE at a time: which of them, and [T, D] on the device."""
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            part = slice(start, min(start + TOKENS_AT_ONCE, len(tokens)))
            yield part, self.u[tokens[part]].to(self.weights.device)

    def activate(self, layer: int, expert: int, gate_up: Tensor, u: Tensor) -> Tensor:
        """u [T, D] through an expert's gate_up [2F, D] → what its down multiplies, [T, F]."""
        bias = self.weights.of_layer(layer, GATE_UP + "_bias")[expert]
        limit = self.config.swiglu_limit
        return by_rows(u, len(gate_up) // 2, lambda part: maths.swiglu(part @ gate_up.T + bias, limit))

    def project(self, layer: int, expert: int, down: Tensor, activation: Tensor) -> Tensor:
        """An expert's output [T, D]."""
        return _affine(activation, down, self.weights.of_layer(layer, DOWN + "_bias")[expert])

    def add_experts(self, layer: int) -> None:
        """x += every expert's outputs, by their shares."""
        for expert in range(self.config.experts):
            tokens, shares = self.chosen(expert)
            if not len(tokens):
                continue
            gate_up, down = (self.weights.expert(layer_name(layer, name), expert) for name in (GATE_UP, DOWN))
            for part, u in self.inputs(tokens):
                y = self.project(layer, expert, down, self.activate(layer, expert, gate_up, u))
                self.add(tokens[part], shares[part], y)

    def add(self, tokens: Tensor, shares: Tensor, y: Tensor) -> None:
        """x of these tokens += share · y."""
        self.x.index_add_(0, tokens, y.cpu() * shares[:, None])

    @property
    def tokens_of_logits(self) -> int:
        """How many tokens' logits are asked for at a time."""
        return max(HEAD_BYTES // (4 * self.config.vocab), 1)

    def logits(self, tokens: Tensor) -> Tensor:
        """f32 [T, V] of some tokens after the last layer; the head is read in pieces."""
        gain = self.weights.dense(FINAL_NORM)
        h = maths.rms_norm(self.x[tokens].to(gain.device), gain, self.config.rms_eps)
        out = torch.empty((len(tokens), self.config.vocab), device=gain.device)
        rows = max(HEAD_BYTES // (4 * self.config.hidden), 1)
        for start in range(0, self.config.vocab, rows):
            stop = min(start + rows, self.config.vocab)
            head = self.weights.rows(HEAD, start, stop)
            out[:, start:stop] = by_rows(h, len(head), lambda part, head=head: part @ head.T)  # type: ignore[misc]
        return out


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T, C] · weightᵀ + bias, weight [R, C]."""
    return by_rows(x, len(weight), lambda part: part @ weight.T + bias)


def _spans(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Runs of equally long sequences, at most TOKENS_AT_ONCE tokens each, as (tokens, sequences)."""
    at = first = 0
    while first < len(lengths):
        most = max(TOKENS_AT_ONCE // max(lengths[first], 1), 1)
        last = first
        while last < len(lengths) and last - first < most and lengths[last] == lengths[first]:
            last += 1
        size = lengths[first] * (last - first)
        yield slice(at, at + size), last - first
        at, first = at + size, last

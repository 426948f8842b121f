"""GPTQ over a plan: expert by expert, while the text flows through the layers that are rounded already.

    for each layer:
        inputs of q, k, v  ─► Hessian ─► q, k, v rounded ─► inputs of the output projection, as these now make them ─► it, rounded
        router ─► for each expert: inputs of gate/up ─► rounded ─► inputs of down, as the rounded gate/up make them ─► down,
            rounded
        x goes on through the rounded layer
    the head, by the final normed stream; the embedding, which nothing is multiplied with, by its codec alone

Both stages do those steps of the plan that hold such matrices, and write and journal them as the runner would; the runner finds
them done. A killed run is taken up layer by layer: a layer whose bytes have their digests is decoded and run through, not
rounded again. An expert's Hessian is shrunk as quant/shrinkage.py says. `FromHessians` takes Hessians that `calibrate --hessians`
has written, and needs neither text nor a pass: then all inputs are those of the source's own layers.

Memory: walk_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptoss_convert.convert.calibrate import other_tokens
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.hessians import Reader
from gptoss_convert.convert.moments import Hessian
from gptoss_convert.convert.names import DOWN, EMBEDDING, FINAL_NORM, GATE_UP, HEAD, layer_name
from gptoss_convert.convert.plan import BLOCKS, SCALES, Plan
from gptoss_convert.convert.rounding_matrix import Rounder
from gptoss_convert.convert.run import padding_importance
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.texts import Texts
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.convert.walk_memory import TOKENS_AT_ONCE
from gptoss_convert.errors import Refused
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels.chunks import Chunk, Rows
from gptoss_convert.kernels.products import use_threads
from gptoss_convert.quant.encode import encode
from gptoss_convert.quant.shrinkage import effective, others_wanted, shrink


@dataclass(frozen=True)
class Encoded:
    """A view whose values are what they will be in the output: of the tensors that the runner itself rounds."""

    base: View
    codec: str

    @property
    def stack(self) -> Stack:
        """See View."""
        return self.base.stack

    @property
    def encoding(self) -> str:
        """See View."""
        return self.codec

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        chunk = self.base.read(expert, start, stop)
        return Rows(self.codec, encode(chunk, self.codec, "", start, padding_importance(self.base)))


class Stage(Rounder):
    """GPTQ by a text. Call it with the open output and the steps that are done; it returns those that it did."""

    def __init__(
        self, plan: Plan, texts: Texts, *, device: str = "cpu", threads: int = 1, advance: Callable[[int], None]
    ) -> None:
        super().__init__(plan, threads)
        self.texts, self.advance, self.device = texts, advance, choose_device(device)

    def __call__(self, output: Output, done: set[int]) -> set[int]:
        """Round what is to be rounded; `done`: steps whose bytes are there."""
        before = set(done)
        self.begin(output, done)
        use_threads(self.threads)
        walk = Walk(Weights(self._half_rounded(), self.device), self.texts.sequences, output.partial)
        walk.embed()
        for layer in range(walk.config.layers):
            self._attention(walk, layer)
            walk.choose(layer)
            self._experts(walk, layer)
            walk.weights.forget()
            self.advance(1)
        self._head(walk)
        return self.done - before

    def _half_rounded(self) -> Source:
        """The plan's source with the embedding, and what is not matrix, as the output will hold them."""
        source, views = self.plan.source, dict(self.plan.source.views)
        for name in (EMBEDDING,):
            (codec,) = {slot.codec for slot in self.plan.slots[name]}
            if codec != views[name].encoding and codec not in (BLOCKS, SCALES):
                views[name] = Encoded(views[name], codec)
        return replace(source, views=views)

    # --- a layer ---------------------------------------------------------------------------------------------------------

    def _attention(self, walk: Walk, layer: int) -> None:
        names = [layer_name(layer, f"self_attn.{p}_proj.weight") for p in "qkv"]
        last = layer_name(layer, "self_attn.o_proj.weight")
        self._dense(walk, names, (h for _, _, h in walk.attention_inputs(layer)))
        self._dense(walk, [last], (a for _, a in walk.attention_outputs(layer)))
        walk.attend(layer)

    def _dense(self, walk: Walk, names: list[str], inputs: Iterable[Tensor]) -> None:
        """Round matrices that have the same inputs, and let the walk use them as rounded."""
        wanted = [name for name in names if self.codecs(name)]
        open_ones = [name for name in wanted if not self.is_done(name, 0)]
        if open_ones:
            columns = self.plan.source.views[open_ones[0]].stack[2]
            hessian = Hessian(columns, self.device)
            for batch in inputs:
                hessian.add(batch)
            mean = hessian.mean
            for name in open_ones:
                self.round(name, 0, mean, hessian.count)
        for name in wanted:
            walk.weights.replace(name, torch.from_numpy(self.written(name, 0)))

    def _experts(self, walk: Walk, layer: int) -> None:
        into, out = layer_name(layer, GATE_UP), layer_name(layer, DOWN)
        everything: Hessian | None = None
        self.report.own[layer] = []
        for expert in range(walk.config.experts):
            tokens, shares = walk.chosen(expert)
            self.report.own[layer].append(len(tokens))
            if self.codecs(into) and not self.is_done(into, expert):
                if everything is None:
                    everything = self._over(walk, torch.arange(walk.tokens))
                self.round(into, expert, *self._gate_up_hessian(walk, tokens, everything))
            gate_up = self._matrix(walk, into, expert)
            if self.codecs(out) and not self.is_done(out, expert):
                self.round(out, expert, *self._down_hessian(walk, layer, expert, tokens, gate_up))
            down = self._matrix(walk, out, expert)
            for part, u in walk.inputs(tokens):
                y = walk.project(layer, expert, down, walk.activate(layer, expert, gate_up, u))
                walk.add(tokens[part], shares[part], y)

    def _over(self, walk: Walk, tokens: Tensor) -> Hessian:
        hessian = Hessian(walk.config.hidden, self.device)
        for _, u in walk.inputs(tokens):
            hessian.add(u)
        return hessian

    def _gate_up_hessian(self, walk: Walk, tokens: Tensor, everything: Hessian) -> tuple[Tensor, float]:
        own = self._over(walk, tokens)
        return _shrunk(own, everything.without(own), walk.config.hidden)

    def _down_hessian(
        self, walk: Walk, layer: int, expert: int, tokens: Tensor, gate_up: Tensor
    ) -> tuple[Tensor, float]:
        columns = walk.config.intermediate
        own, others = Hessian(columns, self.device), Hessian(columns, self.device)
        for hessian, chosen in (
            (own, tokens), (others, other_tokens(walk, expert, others_wanted(len(tokens), columns)))
        ):  # fmt: skip
            for _, u in walk.inputs(chosen):
                hessian.add(walk.activate(layer, expert, gate_up, u))
        return _shrunk(own, others, columns)

    def _matrix(self, walk: Walk, name: str, expert: int) -> Tensor:
        """An expert's matrix as the output has it."""
        if self.codecs(name):
            return torch.from_numpy(self.written(name, expert)).to(self.device)
        return walk.weights.expert(name, expert)

    def _head(self, walk: Walk) -> None:
        if not self.codecs(HEAD) or self.is_done(HEAD, 0):
            return
        hessian = Hessian(walk.config.hidden, self.device)
        gain = walk.weights.dense(FINAL_NORM)
        for start in range(0, walk.tokens, TOKENS_AT_ONCE):
            x = walk.x[start : start + TOKENS_AT_ONCE].to(self.device)
            hessian.add(maths.rms_norm(x, gain, walk.config.rms_eps))
        self.round(HEAD, 0, hessian.mean, hessian.count)


def _shrunk(own: Hessian, others: Hessian, columns: int) -> tuple[Tensor, float]:
    """An expert's Hessian, and how many tokens' worth stand behind it."""
    tokens = effective(own.count, others.count, columns)
    return (shrink(own.mean, others.mean, own.count, columns) if others.count else own.mean), tokens


class FromHessians(Rounder):
    """GPTQ by Hessians on disk. To be called like Stage."""

    def __init__(self, plan: Plan, reader: Reader, *, threads: int = 1, advance: Callable[[int], None]) -> None:
        super().__init__(plan, threads)
        self.reader, self.advance = reader, advance

    def __call__(self, output: Output, done: set[int]) -> set[int]:
        """Round what is to be rounded; `done`: steps whose bytes are there."""
        before = set(done)
        self.begin(output, done)
        use_threads(self.threads)
        config, total = self.plan.source.config, int(self.reader.facts["tokens"])
        for layer in range(config.layers):
            own = self.reader.own(layer)
            self.report.own[layer] = own
            for part in "qkvo":
                self._one(layer, layer_name(layer, f"self_attn.{part}_proj.weight"), 0, total)
            for expert, count in enumerate(own):
                for name, columns in ((GATE_UP, config.hidden), (DOWN, config.intermediate)):
                    self._one(layer, layer_name(layer, name), expert, effective(count, total - count, columns))
            self.advance(1)
        self._one(None, HEAD, 0, total)
        return self.done - before

    def _one(self, layer: int | None, name: str, expert: int, tokens: float) -> None:
        if self.codecs(name) and not self.is_done(name, expert):
            self.round(name, expert, self._padded(self.reader.hessian(layer, name, expert), name), tokens)

    def _padded(self, hessian: Tensor, name: str) -> Tensor:
        """With zeros for the columns that widening adds."""
        more = self.plan.source.views[name].stack[2] - len(hessian)
        if more < 0:
            raise Refused(
                "Hessians of the whole model do not fit one whose neurons are cut", tensor=name, found=len(hessian),
                expected=len(hessian) + more, remedy="give the text itself to --calibration",
            )  # fmt: skip
        return torch.nn.functional.pad(hessian, (0, more, 0, more))

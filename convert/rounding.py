"""Rounding that looks at the data: GPTQ, expert by expert, while the text flows through the layers that are rounded already.

    for each layer:
        inputs of q, k, v  ─► Hessian ─► q, k, v rounded ─► inputs of the output projection, as these now make them ─► it, rounded
        router ─► for each expert: inputs of gate/up ─► rounded ─► inputs of down, as the rounded gate/up make them ─► down,
            rounded
        x goes on through the rounded layer
    the head, by the final normed stream; the embedding, which nothing is multiplied with, by its codec alone

The stage does those steps of the plan that hold such matrices, and writes and journals them as the runner would; the runner finds
them done. A killed run is taken up layer by layer: a layer whose bytes have their digests is decoded and run through, not
rounded again.

Codecs whose codes stand for a value each go through kernels/gptq.py, lattice types through kernels/gptq_lattice.py. What a codec
holds exactly is left to the runner. An expert's Hessian is shrunk as quant/shrinkage.py says. A factorisation that fails at every
damping is an error that names the tensor and the expert.

Memory: the walk's, three Hessians of the widest input (two in float64 while one is factorised), one expert's matrices.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import blake3
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert.convert.calibrate import other_tokens
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.names import DOWN, EMBEDDING, FINAL_NORM, GATE_UP, HEAD, is_gate_up, layer_name
from gptoss_convert.convert.plan import BLOCKS, SCALES, Piece, Plan, Step
from gptoss_convert.convert.run import piece_bytes, require_finite
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.texts import Texts
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.convert.walk_memory import TOKENS_AT_ONCE
from gptoss_convert.errors import Refused
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels import gain, gptq, gptq_lattice, mxfp4
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, FLOATS
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.grids import grid
from gptoss_convert.quant.encode import encode
from gptoss_convert.quant.shrinkage import others_wanted, own_weight, shrink

SLAB = 512  # rows that one thread takes: fixed, so that the number of threads changes nothing
Factors = dict[tuple[int, ...], gptq.Factor]  # by the runs that stay whole in the order of columns
EXACT = {"mxfp4": ("mxfp4", "q8_0", "q5_0", "int8_g32")}  # source's encoding → codecs that hold its values


@dataclass
class Report:
    """What was done: tensors by method, dampings used, and of each rounded matrix the share of its output's energy lost."""

    methods: Counter[str] = field(default_factory=Counter)
    dampings: Counter[float] = field(default_factory=Counter)
    loss: dict[str, list[float]] = field(default_factory=dict)
    own: dict[int, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For certificates."""
        return {
            "matrices": dict(sorted(self.methods.items())),
            "damping": {f"{k:g}": v for k, v in sorted(self.dampings.items())},
            "output_energy_lost": {name: round(float(np.mean(found)), 8) for name, found in self.loss.items()},
        }


class Hessian:
    """Sum of x xᵀ, f32 [C, C], and the count."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros((columns, columns), device=device)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [T, C]."""
        self.total.addmm_(inputs.T, inputs)
        self.count += len(inputs)

    @property
    def mean(self) -> Tensor:
        """[C, C]; zeros where nothing was counted."""
        return self.total / max(self.count, 1)


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
        return Rows(self.codec, encode(chunk, self.codec, "", start))


class Stage:
    """GPTQ over a plan. Call it with the open output and the steps that are done; it returns those that it did."""

    def __init__(
        self, plan: Plan, texts: Texts, *, device: str = "cpu", threads: int = 1, advance: Callable[[int], None]
    ) -> None:
        self.plan, self.texts, self.advance = plan, texts, advance
        self.report = Report()
        self.device = choose_device(device)
        self.threads = threads
        self._steps: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, step in enumerate(plan.steps):
            self._steps[step.tensor, step.expert].append(index)
        self._output: Output
        self._done: set[int]

    def __call__(self, output: Output, done: set[int]) -> set[int]:
        """Round what is to be rounded; `done`: steps whose bytes are there."""
        self._output, self._done = output, done
        before = set(done)
        walk = Walk(Weights(self._half_rounded(), self.device), self.texts.sequences, output.partial)
        walk.embed()
        for layer in range(walk.config.layers):
            self._attention(walk, layer)
            walk.choose(layer)
            self._experts(walk, layer)
            walk.weights.forget()
            self.advance(1)
        self._head(walk)
        return self._done - before

    def _half_rounded(self) -> Source:
        """The plan's source with the embedding, and what is not matrix, as the output will hold them."""
        source, views = self.plan.source, dict(self.plan.source.views)
        for name in (EMBEDDING,):
            (codec,) = {slot.codec for slot in self.plan.slots[name]}
            if codec != views[name].encoding and codec not in (BLOCKS, SCALES):
                views[name] = Encoded(views[name], codec)
        return replace(source, views=views)

    # --- what is to be done ------------------------------------------------------------------------------------------

    def codecs(self, name: str) -> dict[str, str]:
        """Part ("", "gate", "up") → codec of a matrix, for those parts that are rounded."""
        source = self.plan.source.views[name].encoding
        found = {}
        for slot in self.plan.slots[name]:
            codec = "mxfp4" if slot.codec in (BLOCKS, SCALES) else slot.codec
            if codec not in FLOATS and codec != source and codec not in EXACT.get(source, ()):
                found[slot.part] = codec
        return found

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
        open_ones = [name for name in wanted if not self._is_done(name, 0)]
        if open_ones:
            columns = self.plan.source.views[open_ones[0]].stack[2]
            hessian = Hessian(columns, self.device)
            for batch in inputs:
                hessian.add(batch)
            mean = hessian.mean
            for name in open_ones:
                self._round(name, 0, mean)
        for name in wanted:
            walk.weights.replace(name, torch.from_numpy(self._written(name, 0)))

    def _experts(self, walk: Walk, layer: int) -> None:
        into, out = layer_name(layer, GATE_UP), layer_name(layer, DOWN)
        everything: Hessian | None = None
        self.report.own[layer] = []
        for expert in range(walk.config.experts):
            tokens, shares = walk.chosen(expert)
            self.report.own[layer].append(len(tokens))
            if self.codecs(into) and not self._is_done(into, expert):
                if everything is None:
                    everything = self._over(walk, torch.arange(walk.tokens))
                self._round(into, expert, self._gate_up_hessian(walk, tokens, everything))
            gate_up = self._matrix(walk, into, expert)
            if self.codecs(out) and not self._is_done(out, expert):
                self._round(out, expert, self._down_hessian(walk, layer, expert, tokens, gate_up))
            down = self._matrix(walk, out, expert)
            for part, u in walk.inputs(tokens):
                y = walk.project(layer, expert, down, walk.activate(layer, expert, gate_up, u))
                walk.add(tokens[part], shares[part], y)

    def _over(self, walk: Walk, tokens: Tensor) -> Hessian:
        hessian = Hessian(walk.config.hidden, self.device)
        for _, u in walk.inputs(tokens):
            hessian.add(u)
        return hessian

    def _gate_up_hessian(self, walk: Walk, tokens: Tensor, everything: Hessian) -> Tensor:
        own = self._over(walk, tokens)
        rest = Hessian(1, self.device)
        rest.total, rest.count = everything.total - own.total, everything.count - own.count
        return shrink(own.mean, rest.mean, own.count, walk.config.hidden) if rest.count else own.mean

    def _down_hessian(self, walk: Walk, layer: int, expert: int, tokens: Tensor, gate_up: Tensor) -> Tensor:
        columns = walk.config.intermediate
        own, others = Hessian(columns, self.device), Hessian(columns, self.device)
        for hessian, chosen in (
            (own, tokens), (others, other_tokens(walk, expert, others_wanted(len(tokens), columns)))
        ):  # fmt: skip
            for _, u in walk.inputs(chosen):
                hessian.add(walk.activate(layer, expert, gate_up, u))
        return shrink(own.mean, others.mean, own.count, columns) if others.count else own.mean

    def _matrix(self, walk: Walk, name: str, expert: int) -> Tensor:
        """An expert's matrix as the output has it."""
        if self.codecs(name):
            return torch.from_numpy(self._written(name, expert)).to(self.device)
        return walk.weights.expert(name, expert)

    def _head(self, walk: Walk) -> None:
        if not self.codecs(HEAD) or self._is_done(HEAD, 0):
            return
        hessian = Hessian(walk.config.hidden, self.device)
        gain = walk.weights.dense(FINAL_NORM)
        for start in range(0, walk.tokens, TOKENS_AT_ONCE):
            x = walk.x[start : start + TOKENS_AT_ONCE].to(self.device)
            hessian.add(maths.rms_norm(x, gain, walk.config.rms_eps))
        self._round(HEAD, 0, hessian.mean)

    # --- a matrix --------------------------------------------------------------------------------------------------------

    def _round(self, name: str, expert: int, hessian: Tensor) -> None:
        """Round one matrix by its Hessian and write it, a run of steps at a time; one factor for each order of columns."""
        factors: Factors = {}
        diagonal = hessian.diagonal().cpu().numpy().astype(np.float32)
        energy = lost = 0.0
        for index in self._steps[name, expert]:
            step = self.plan.steps[index]
            chunk = self.plan.source.views[name].read(expert, step.start, step.stop)
            require_finite(chunk, self.plan.source, step)
            weight = chunk.values()
            parts: dict[str, U8] = {}
            for part, codec in self._all_codecs(name).items():
                select = slice({"": 0, "gate": 0, "up": 1}[part], None, 2 if part else 1)
                rows = np.ascontiguousarray(weight[select])
                made = self._rows(rows, chunk.select(select), codec, name, expert, step, hessian, diagonal, factors)
                if part in self.codecs(name):
                    made = gain.restore(made, codec, *_outputs(rows, CODECS[codec].decode(made), hessian))
                parts[part] = made
                e, f = _energies(rows[:SLAB], CODECS[codec].decode(made[:SLAB]), hessian)
                energy, lost = energy + e, lost + f
            self._write(index, step, parts)
        self.report.loss.setdefault(name, []).append(lost / energy if energy else 0.0)

    def _all_codecs(self, name: str) -> dict[str, str]:
        return {slot.part: "mxfp4" if slot.codec in (BLOCKS, SCALES) else slot.codec for slot in self.plan.slots[name]}

    def _rows(
        self, weight: F32, chunk: Chunk, codec: str, name: str, expert: int, step: Step,
        hessian: Tensor, diagonal: F32, factors: Factors,
    ) -> U8:  # fmt: skip
        """Rows of one part in its codec."""
        if codec in FLOATS or codec in EXACT.get(chunk.encoding, ()):
            return encode(chunk, codec, name, step.start)
        found, lattice = grid(codec), codec in gptq_lattice.RULES
        if found is None and not lattice:
            self.report.methods["importance"] += step.start == 0
            return encode(chunk, codec, name, step.start, diagonal)
        runs = (found.block,) if found else gptq_lattice.runs(codec)
        if runs not in factors:
            factors[runs] = self._factor(name, expert, hessian, runs)
            self.report.dampings[factors[runs].damping] += 1
        self.report.methods["gptq"] += step.start == 0
        factor, quantize = factors[runs], gptq_lattice.quantize if lattice else gptq.quantize
        slabs = [weight[at : at + SLAB] for at in range(0, len(weight), SLAB)]
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                return np.concatenate(list(pool.map(lambda slab: quantize(slab, factor, codec), slabs)))
        except ValueError as error:
            raise Refused(
                "a value is too large for the codec", tensor=name, found=f"expert {expert}, codec {codec}",
                expected="values within the range of its scales", remedy=str(error),
            ) from error  # fmt: skip

    def _factor(self, name: str, expert: int, hessian: Tensor, runs: tuple[int, ...]) -> gptq.Factor:
        try:
            return gptq.factorise(hessian, *runs)
        except gptq.NotPositive as error:
            raise Refused(
                "the calibration text gives no usable Hessian", tensor=name, found=f"expert {expert}: {error}",
                expected="a positive definite matrix", remedy="give more, or other, text; or --method importance",
            ) from error  # fmt: skip

    def _write(self, index: int, step: Step, parts: dict[str, U8]) -> None:
        hasher = blake3.blake3()
        for piece in step.pieces:
            data = np.ascontiguousarray(piece_bytes(_as_chunk(parts[piece.part], piece), replace(piece, part=""), step))
            view = memoryview(data).cast("B")  # type: ignore[arg-type]
            assert len(view) == piece.nbytes
            self._output.write(self.plan.files[piece.file].name, piece.offset, view)
            hasher.update(view)
        self._output.record({"step": index, "digest": hasher.hexdigest()})
        self._done.add(index)

    def _is_done(self, name: str, expert: int) -> bool:
        return all(index in self._done for index in self._steps[name, expert])

    def _written(self, name: str, expert: int) -> F32:
        """An expert's matrix f32 [R, C] as its bytes lie in the output."""
        _, rows, columns = self.plan.source.views[name].stack
        out = np.empty((rows, columns), np.float32)
        for index in self._steps[name, expert]:
            step = self.plan.steps[index]
            here = out[step.start : step.stop]
            by_part: dict[str, list[tuple[Piece, bytes]]] = defaultdict(list)
            for piece in step.pieces:
                data = self._output.read(self.plan.files[piece.file].name, piece.offset, piece.nbytes)
                by_part[piece.part].append((piece, data))
            for part, pieces in by_part.items():
                select = slice({"": 0, "gate": 0, "up": 1}[part], None, 2 if is_gate_up(name) and part else 1)
                here[select] = _decoded(pieces, len(here[select]), columns)
        return out


def _as_chunk(rows: U8, piece: Piece) -> Chunk:
    if piece.codec in (BLOCKS, SCALES):
        return Mxfp4(*mxfp4.from_ggml(rows))
    return Rows(piece.codec, rows)


def _decoded(pieces: list[tuple[Piece, bytes]], rows: int, columns: int) -> F32:
    """Values f32 [rows, columns] of one part's pieces: one row codec, MXFP4's two halves, or an integer codec's."""
    arrays = {piece.field or piece.codec: np.frombuffer(data, np.uint8) for piece, data in pieces}
    if BLOCKS in arrays:
        blocks = arrays[BLOCKS].reshape(rows, columns // mxfp4.BLOCK, mxfp4.CODE_BYTES)
        return mxfp4.decode(blocks, arrays[SCALES].reshape(rows, -1))
    piece, data = pieces[0]
    if piece.field:
        from gptoss_convert.convert.plan import INT_CODES, INT_SCALES
        from gptoss_convert.kernels.int_rows import join

        return CODECS[piece.codec].decode(
            join(piece.codec, arrays[INT_SCALES].reshape(rows, -1), arrays[INT_CODES].reshape(rows, -1))
        )
    return CODECS[piece.codec].decode(np.frombuffer(data, np.uint8).reshape(rows, -1))


def _outputs(weight: F32, values: F32, hessian: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row by row, w H wᵀ and w H qᵀ: f64 [R]."""
    w, q = (torch.from_numpy(np.ascontiguousarray(a)).to(hessian.device) for a in (weight, values))
    seen = w @ hessian
    wanted, held = ((seen * a).sum(1, dtype=torch.float64).cpu().numpy() for a in (w, q))
    return wanted, held


def _energies(weight: F32, values: F32, hessian: Tensor) -> tuple[float, float]:
    """tr W H Wᵀ and tr (W − Q) H (W − Q)ᵀ."""
    w, lost = (torch.from_numpy(np.ascontiguousarray(a)).to(hessian.device) for a in (weight, weight - values))
    return tuple(float(((a @ hessian) * a).sum(dtype=torch.float64)) for a in (w, lost))  # type: ignore[return-value]


def thread_count(threads: int) -> int:
    """As asked for, or one a core."""
    return threads or len(os.sched_getaffinity(0))


def own_weights(report: Report, columns: int) -> list[float]:
    """w of every expert, layer after layer."""
    return [own_weight(n, columns) for layer in sorted(report.own) for n in report.own[layer]]

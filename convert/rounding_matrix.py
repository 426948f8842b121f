"""Rounding one matrix by its Hessian onto whatever codec the plan has for it, and writing it where the plan says.

    weight rows ─► columns in order, made up for by the rest (kernels/gptq.py, gptq_lattice.py) ─► rows' gain ─► journalled

Codecs whose codes stand for a value each go through kernels/gptq.py, lattice types through kernels/gptq_lattice.py. What a codec
holds exactly is left to the runner. Damping is by rule (quant/shrinkage.py), ten times as much where a factorisation fails, then
an error that names the tensor and the expert.

What was done to a matrix is journalled after its last step, so that a run that was killed and taken up reports what an
uninterrupted one does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import blake3
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert.convert.names import is_gate_up
from gptoss_convert.convert.own_encodings import EXACT, rounded_codecs
from gptoss_convert.convert.plan import BLOCKS, INT_CODES, INT_SCALES, SCALES, Piece, Plan, Step
from gptoss_convert.convert.run import piece_bytes, require_finite
from gptoss_convert.errors import Refused
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels import gain, gptq, gptq_lattice, mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, FLOATS
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.grids import grid
from gptoss_convert.kernels.int_rows import join
from gptoss_convert.kernels.products import by_rows
from gptoss_convert.quant.encode import encode
from gptoss_convert.quant.shrinkage import damping

SLAB = 512  # rows that one thread takes: fixed, so that the number of threads changes nothing
ORDER = "blocks of the codec, and columns within them, by falling mean square of their inputs"
Factors = dict[tuple[int, ...], gptq.Factor]  # by the runs that stay whole in the order of columns


@dataclass
class Report:
    """What was done. matrices: (name, expert) → what `Rounder` journals of it; own: tokens of every expert, layer by layer."""

    matrices: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    own: dict[int, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For certificates: how many matrices, dampings used, and of each tensor the share of its outputs' energy lost."""
        dampings = sorted(m["damping"] for m in self.matrices.values() if m["damping"] is not None)
        lost: dict[str, list[float]] = defaultdict(list)
        for (name, _), found in sorted(self.matrices.items()):
            lost[name].append(found["lost"])
        return {
            "matrices": dict(sorted(Counter(m for found in self.matrices.values() for m in found["methods"]).items())),
            "order": ORDER,
            "damping": {
                "least": dampings[0], "median": dampings[len(dampings) // 2], "most": dampings[-1],
                "raised_after_a_failure": sum(m["raised"] for m in self.matrices.values()),
            } if dampings else None,
            "output_energy_lost": {name: round(float(np.mean(found)), 8) for name, found in lost.items()},
        }  # fmt: skip


class Rounder:
    """Rounds the matrices of a plan. `begin` first, with the open output and the steps that are done."""

    def __init__(self, plan: Plan, threads: int) -> None:
        self.plan, self.threads, self.report = plan, threads, Report()
        self._steps: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, step in enumerate(plan.steps):
            self._steps[step.tensor, step.expert].append(index)
        self._output: Output
        self.done: set[int]

    def begin(self, output: Output, done: set[int]) -> None:
        """Take up where an earlier run has stopped."""
        self._output, self.done = output, done
        for record in output.journalled:
            if "matrix" in record:
                self.report.matrices[record["matrix"], record["expert"]] = record["rounded"]

    def codecs(self, name: str) -> dict[str, str]:
        """Part ("", "gate", "up") → codec of a matrix, for those parts that are rounded."""
        return rounded_codecs(self.plan, name)

    def is_done(self, name: str, expert: int) -> bool:
        """Whether every step of a matrix is written and its report journalled."""
        return (name, expert) in self.report.matrices and all(i in self.done for i in self._steps[name, expert])

    def round(self, name: str, expert: int, hessian: Tensor, tokens: float) -> None:
        """Round one matrix by its Hessian f32 [C, C] and write it, a run of steps at a time. tokens: what stands behind H."""
        work = _Matrix(self, name, expert, hessian, tokens)
        for index in self._steps[name, expert]:
            step = self.plan.steps[index]
            chunk = self.plan.source.views[name].read(expert, step.start, step.stop)
            require_finite(chunk, self.plan.source, step)
            self._write(index, step, work.rows(chunk, step.start))
        found = work.report()
        self.report.matrices[name, expert] = found
        self._output.record({"matrix": name, "expert": expert, "rounded": found})

    def _write(self, index: int, step: Step, parts: dict[str, U8]) -> None:
        hasher = blake3.blake3()
        for piece in step.pieces:
            data = np.ascontiguousarray(piece_bytes(_as_chunk(parts[piece.part], piece), replace(piece, part=""), step))
            view = memoryview(data).cast("B")  # type: ignore[arg-type]
            assert len(view) == piece.nbytes
            self._output.write(self.plan.files[piece.file].name, piece.offset, view)
            hasher.update(view)
        self._output.record({"step": index, "digest": hasher.hexdigest()})
        self.done.add(index)

    def written(self, name: str, expert: int) -> F32:
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


class _Matrix:
    """One matrix on its way: its factors, one for each order of columns, and what is to be reported."""

    def __init__(self, rounder: Rounder, name: str, expert: int, hessian: Tensor, tokens: float) -> None:
        self.name, self.expert, self.hessian, self.tokens = name, expert, hessian, tokens
        self.threads, self.rounded = rounder.threads, rounder.codecs(name)
        self.codecs = {
            slot.part: "mxfp4" if slot.codec in (BLOCKS, SCALES) else slot.codec for slot in rounder.plan.slots[name]
        }
        self.factors: Factors = {}
        self.methods: set[str] = set()
        self.energy = self.lost = 0.0

    def report(self) -> dict[str, Any]:
        """What is journalled of it."""
        used = [factor.damping for factor in self.factors.values()]
        return {
            "methods": sorted(self.methods), "damping": max(used) if used else None,
            "raised": bool(used) and max(used) > damping(self.tokens, len(self.hessian)),
            "lost": self.lost / self.energy if self.energy else 0.0,
        }  # fmt: skip

    def rows(self, chunk: Chunk, start: int) -> dict[str, U8]:
        """Rows from `start` on, part by part, in their codecs."""
        weight, parts = chunk.values(), {}
        for part, codec in self.codecs.items():
            select = slice({"": 0, "gate": 0, "up": 1}[part], None, 2 if part else 1)
            rows = np.ascontiguousarray(weight[select])
            made = self._encoded(rows, chunk.select(select), codec, start)
            if part in self.rounded:
                made = gain.restore(made, codec, *_outputs(rows, CODECS[codec].decode(made), self.hessian))
            parts[part] = made
            energy, lost = _energies(rows[:SLAB], CODECS[codec].decode(made[:SLAB]), self.hessian)
            self.energy, self.lost = self.energy + energy, self.lost + lost
        return parts

    def _encoded(self, weight: F32, chunk: Chunk, codec: str, start: int) -> U8:
        """Rows of one part in its codec."""
        if codec in FLOATS or codec in EXACT.get(chunk.encoding, ()):
            return encode(chunk, codec, self.name, start)
        found, lattice = grid(codec), codec in gptq_lattice.RULES
        if found is None and not lattice:
            self.methods.add("importance")
            return encode(chunk, codec, self.name, start, self.hessian.diagonal().cpu().numpy().astype(np.float32))
        self.methods.add("gptq")
        factor = self._factor((found.block,) if found else gptq_lattice.runs(codec))
        quantize = gptq_lattice.quantize if lattice else gptq.quantize
        slabs = [weight[at : at + SLAB] for at in range(0, len(weight), SLAB)]
        try:
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return np.concatenate(list(pool.map(lambda slab: quantize(slab, factor, codec), slabs)))
        except ValueError as error:
            raise Refused(
                "a value is too large for the codec", tensor=self.name, found=f"expert {self.expert}, codec {codec}",
                expected="values within the range of its scales", remedy=str(error),
            ) from error  # fmt: skip

    def _factor(self, runs: tuple[int, ...]) -> gptq.Factor:
        if runs not in self.factors:
            try:
                first = damping(self.tokens, len(self.hessian))
                self.factors[runs] = gptq.factorise(self.hessian, *runs, damping=first)
            except gptq.NotPositive as error:
                raise Refused(
                    "the calibration text gives no usable Hessian", tensor=self.name,
                    found=f"expert {self.expert}: {error}", expected="a positive definite matrix",
                    remedy="give more, or other, text; or --method importance",
                ) from error  # fmt: skip
        return self.factors[runs]


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
        return CODECS[piece.codec].decode(
            join(piece.codec, arrays[INT_SCALES].reshape(rows, -1), arrays[INT_CODES].reshape(rows, -1))
        )
    return CODECS[piece.codec].decode(np.frombuffer(data, np.uint8).reshape(rows, -1))


def _outputs(weight: F32, values: F32, hessian: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row by row, w H wᵀ and w H qᵀ: f64 [R]."""
    w, q = (torch.from_numpy(np.ascontiguousarray(a)).to(hessian.device) for a in (weight, values))
    seen = by_rows(w, len(hessian), lambda part: part @ hessian)
    wanted, held = ((seen * a).sum(1, dtype=torch.float64).cpu().numpy() for a in (w, q))
    return wanted, held


def _energies(weight: F32, values: F32, hessian: Tensor) -> tuple[float, float]:
    """tr W H Wᵀ and tr (W − Q) H (W − Q)ᵀ."""
    w, lost = (torch.from_numpy(np.ascontiguousarray(a)).to(hessian.device) for a in (weight, weight - values))
    wanted, gone = (by_rows(a, len(hessian), lambda part: part @ hessian) * a for a in (w, lost))
    return float(wanted.sum(dtype=torch.float64)), float(gone.sum(dtype=torch.float64))

"""The plan: from headers alone, what every output byte will be and where it comes from.

    canonical tensor ──► slots (which output tensors its values go to, in which codec)
                    ──► layout (files, headers, offsets)  ──► steps (rows of one matrix → pieces of the files)

A step is a pure function of the source and itself and writes ranges that no other step writes, so any executor may run any
of them in any order, and the bytes come out the same. Forecasts, the progress bar, the dry run, resuming and the memory
bound all follow from the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import blake3

from gptoss_convert import __version__
from gptoss_convert.convert.names import Shape, as_stack, canonical_shapes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Transposed, View, reads_whole
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32

LEAF_ROWS = 1024  # steps begin at multiples of it; the proof's digests are over as many rows
STEP_VALUES = 6 << 20  # values of a step where rows are divided
BLOCKS, SCALES = "blocks", "scales"  # the two halves of MXFP4 in release order, as codecs of an output tensor
# The two halves of a codec of `int_rows`, as fields of an output tensor.
INT_SCALES, INT_CODES = "int scales", "int codes"

STEP_MEMORY = 640 << 20  # what all threads together may hold of steps
# Resident memory before the first step (interpreter, numpy, numba, tokenizer) as measured, and per value of a step.
BASE_MEMORY = 420 << 20
ENCODED_BYTES_PER_VALUE = 6  # read and written copies and the transient of ROWS_AT_ONCE rows
WHOLE_BYTES_PER_VALUE = (
    12  # float32 of a whole expert, its bfloat16 and that transposed; float32 read back and interleaved
)


@dataclass(frozen=True)
class Slot:
    """An output tensor that takes values of a canonical one.

    codec: a row codec, or BLOCKS or SCALES; part: "" all rows, "gate" the even or "up" the odd ones (of a bias, columns);
    shape: the output tensor's; first_row: where the canonical rows go in a taller output tensor (qkv); field: INT_SCALES or
    INT_CODES where the tensor holds only these of the codec's rows, in elements of `width` bytes, a row after the other
    unless transposed; expert: the only one whose
    values it takes.
    """

    name: str
    codec: str
    shape: Shape
    part: str = ""
    first_row: int = 0
    transposed: bool = False
    field: str = ""
    width: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class OutFile:
    """An output file: name, its first bytes, its size in bytes."""

    name: str
    head: bytes
    size: int


@dataclass(frozen=True)
class Place:
    """Where an output tensor lies: file index, offset and length in bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """A range of an output file and how a step's chunk becomes its bytes."""

    file: int
    offset: int
    nbytes: int
    codec: str
    part: str
    columns: bool  # whether `part` takes columns (of a bias) and not rows
    transposed: bool
    field: str = ""  # as in Slot


@dataclass(frozen=True)
class Step:
    """Rows start … stop of one expert's matrix of a canonical tensor, and the pieces they become."""

    tensor: str
    expert: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass
class Plan:
    """Everything about an output before a byte of tensor data is read.

    source: what the steps read, which may be a transformation of what the user gave; options: what was asked for, as it enters
    the certificate; slots: canonical name → its output tensors; files: the large files; places: output tensor → where;
    small: further files by name, whole.
    """

    target: str
    source: Source
    options: dict[str, Any]
    slots: dict[str, list[Slot]]
    files: list[OutFile] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)  # what the plan gives up by design
    rounding: dict[str, Any] = field(default_factory=dict)  # what GPTQ reports when it is through
    importance: Mapping[str, F32] = field(
        default_factory=dict
    )  # canonical matrix → f32 [E, C] of the true model's columns

    @property
    def output_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + sum(map(len, self.small.values()))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Canonical shapes of what is read."""
        return canonical_shapes(self.source.config)

    def digest(self) -> str:
        """A name for this work on this source, to tell whether an unfinished output belongs to it."""
        hasher = blake3.blake3()
        for part in (
            {"target": self.target, "options": self.options, "version": __version__},
            {"layout": self.source.layout, "gate_proj": self.source.gate_meaning},
            [[f.name, f.size, blake3.blake3(f.head).hexdigest()] for f in self.files],
            {name: blake3.blake3(data).hexdigest() for name, data in self.small.items()},
            [[f.name, *asdict(f.identity).values()] for f in self.source.files],
            {name: blake3.blake3(values.tobytes()).hexdigest() for name, values in self.importance.items()},
        ):
            hasher.update(json.dumps(part, sort_keys=True).encode())
        for step in self.steps:
            hasher.update(repr(step).encode())
        return hasher.hexdigest()


def slot_bytes(slot: Slot) -> int:
    """Bytes of an output tensor."""
    if slot.codec in (BLOCKS, SCALES):
        return _product(slot.shape)  # of bytes, already counted in the shape
    if slot.field:
        return _product(slot.shape) * slot.width
    *outer, columns = slot.shape
    return _product(outer) * CODECS[slot.codec].row_bytes(columns)


def _product(numbers: Iterable[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def make_steps(plan: Plan) -> list[Step]:
    """The steps of a plan whose files are laid out, in the order of their first byte."""
    steps: list[Step] = []
    for name, shape in plan.shapes.items():
        experts, rows, columns = as_stack(shape)
        slots = plan.slots[name]
        whole = any(slot.transposed for slot in slots) or reads_whole(plan.source.views[name])
        height = rows if whole else rows_per_step(columns)
        own: dict[int | None, list[Slot]] = {}
        for slot in slots:
            own.setdefault(slot.expert, []).append(slot)
        for expert in range(experts):
            taking = own.get(None, []) + own.get(expert, [])
            for start in range(0, rows, height):
                stop = min(start + height, rows)
                part = (expert, start, stop)
                pieces = tuple(_piece(slot, plan.places[slot.name], part, (rows, columns)) for slot in taking)
                steps.append(Step(name, expert, start, stop, pieces))
    return sorted(steps, key=lambda step: (step.pieces[0].file, step.pieces[0].offset))


def rows_per_step(columns: int) -> int:
    """Rows that a step takes of a matrix that may be divided: a multiple of LEAF_ROWS."""
    return max(STEP_VALUES // columns // LEAF_ROWS, 1) * LEAF_ROWS


def _piece(slot: Slot, place: Place, part: tuple[int, int, int], matrix: tuple[int, int]) -> Piece:
    """The range of the output tensor that rows start … stop of an expert's matrix [rows, columns] fill."""
    expert, start, stop = part
    rows, columns = matrix
    if slot.field:
        size = CODECS[slot.codec].field_bytes(columns)[slot.field == INT_CODES]
        first = slot.first_row + (expert * rows if slot.expert is None else 0) + start
        at, nbytes = place.offset + first * size, (stop - start) * size
        return Piece(place.file, at, nbytes, slot.codec, "", False, slot.transposed, slot.field)
    if slot.transposed:
        size = rows * CODECS[slot.codec].row_bytes(columns)
        return Piece(place.file, place.offset + expert * size, size, slot.codec, slot.part, False, True)
    if len(slot.shape) == 1:  # a vector, or a run of a longer one: counted in elements
        size, first, count = CODECS[slot.codec].row_bytes(1), slot.first_row, columns
    else:
        in_bytes = slot.codec in (BLOCKS, SCALES)
        size = _product(slot.shape[2:]) if in_bytes else CODECS[slot.codec].row_bytes(slot.shape[-1])
        if slot.part and len(slot.shape) == 3:
            start, stop, rows = start // 2, stop // 2, rows // 2
        first, count = slot.first_row + expert * rows + start, stop - start
    columns_only = bool(slot.part) and len(slot.shape) == 2
    return Piece(place.file, place.offset + first * size, count * size, slot.codec, slot.part, columns_only, False)


def peak_memory(plan: Plan, threads: int) -> int:
    """Resident bytes at most: the process, and for each thread the largest step it may hold."""
    largest, shapes = 0, plan.shapes
    for step in plan.steps:
        values = (step.stop - step.start) * as_stack(shapes[step.tensor])[2]
        whole = any(piece.transposed for piece in step.pieces) or _reads_twice(plan.source.views[step.tensor])
        largest = max(largest, values * (WHOLE_BYTES_PER_VALUE if whole else ENCODED_BYTES_PER_VALUE))
    return BASE_MEMORY + threads * largest + sum(len(file.head) for file in plan.files)


def threads_within(bytes_each: int, wanted: int) -> int:
    """Threads, at most as many as wanted, that hold no more than STEP_MEMORY together; one at least."""
    return max(1, min(wanted, STEP_MEMORY // max(bytes_each, 1)))


def _reads_twice(view: View) -> bool:
    """Whether reading holds a whole matrix as float32, or twice: a transposed view of float32 or within another view."""
    return reads_whole(view) and (view.encoding == "f32" or not isinstance(view, Transposed))


def greedy_shards(sizes: Sequence[tuple[str, int]], limit: int) -> Iterator[list[str]]:
    """Names in order, a new shard whenever the next tensor would make the current one larger than `limit` bytes."""
    shard: list[str] = []
    total = 0
    for name, size in sizes:
        if shard and total + size > limit:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += size
    if shard:
        yield shard

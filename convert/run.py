"""The runner: executes a plan's steps on a few threads, hashes source and output on the way, publishes nothing itself.

    per thread: read a step's rows ─► check they are finite ─► encode each piece ─► write it ─► journal the step's digest

Resident memory is threads × the largest step (plan.peak_memory). Results do not depend on the number of threads: a step is a
pure function and owns its ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import blake3
import numpy as np

from gptoss_convert.convert.columns import fit
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.own_encodings import stored_part
from gptoss_convert.convert.plan import BLOCKS, INT_CODES, SCALES, Piece, Plan, Step
from gptoss_convert.convert.progress import Advance
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import View
from gptoss_convert.convert.widen import Wide
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import BadInput, GptOssError
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, encode_float
from gptoss_convert.kernels.floats import F32, transpose
from gptoss_convert.kernels.int_rows import split
from gptoss_convert.quant.encode import encode, encode_packed

READ_BYTES = 1 << 20  # half a core's cache: hashed while it is still there


@dataclass(frozen=True)
class Digests:
    """SHA-256 in hex by file name."""

    source: dict[str, str]
    output: dict[str, str]


class SourceHashing:
    """SHA-256 of the source's files, worked out beside everything else from the moment the source is open."""

    def __init__(self, source: Source) -> None:
        self._digests: dict[str, str] = {}
        self._workers = Workers()
        self._workers.start(lambda: _hash_source(source, self._digests, self._workers.stopped))

    def join(self) -> dict[str, str]:
        """The digests by file name, when all are there."""
        self._workers.join()
        return self._digests

    def __enter__(self) -> SourceHashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stopped.set()
        with contextlib.suppress(GptOssError):  # told by `join`, or of no interest beside what ends the run
            self._workers.join()


Prepare = Callable[[Output, set[int]], set[int]]
"""Called with the open output and the finished steps before the runner begins; does some steps itself and returns them."""


def execute(
    plan: Plan,
    output: Output,
    *,
    hashing: SourceHashing,
    threads: int,
    advance: Advance,
    prepare: Prepare | None = None,
) -> Digests:
    """Do every step that an earlier run, or `prepare`, has not finished; returns the digests of all source and output files."""
    files = [(file.name, file.size) for file in plan.files]
    source = plan.source
    journal = output.open(plan.digest(), files)
    done = _verified(journal, plan, output)
    if prepare is not None:
        done |= prepare(output, set(done))
    front = _Front(plan)
    for index, file in enumerate(plan.files):
        output.write(file.name, 0, file.head)
        _clear_gaps(plan, index, output)
        front.open(index)
    workers = Workers()
    for index in done:
        front.finish(plan.steps[index])
        advance(plan.steps[index].nbytes)

    def work(index: int) -> None:
        step = plan.steps[index]
        output.record({"step": index, "digest": do_step(step, plan, output)})
        front.finish(step)
        advance(step.nbytes)

    digests = {name: hashlib.sha256(data).hexdigest() for name, data in plan.small.items()}
    workers.each((i for i in range(len(plan.steps)) if i not in done), work, threads)
    workers.start(lambda: _hash_output(plan, output, front, digests, workers.stopped))
    workers.join()
    for name, data in plan.small.items():
        output.write_small(name, data)
    read = hashing.join()
    source.check_unchanged()
    return Digests(read, digests)


def _clear_gaps(plan: Plan, index: int, output: Output) -> None:
    """What lies between the tensors of a file is zeros, whatever an earlier run has left there."""
    file = plan.files[index]
    end = len(file.head)
    ranges = sorted((place.offset, place.nbytes) for place in plan.places.values() if place.file == index)
    for offset, nbytes in [*ranges, (file.size, 0)]:
        if offset > end:
            output.write(file.name, end, bytes(offset - end))
        end = offset + nbytes


def _verified(journal: Sequence[dict[str, Any]], plan: Plan, output: Output) -> set[int]:
    """The journalled steps whose bytes on disk are what the journal says."""
    done: set[int] = set()
    for record in journal:
        index, digest = record.get("step"), record.get("digest")
        if not isinstance(index, int) or not 0 <= index < len(plan.steps):
            continue
        hasher = blake3.blake3()
        for piece in plan.steps[index].pieces:
            hasher.update(output.read(plan.files[piece.file].name, piece.offset, piece.nbytes))
        if hasher.hexdigest() == digest:
            done.add(index)
    return done


def do_step(step: Step, plan: Plan, output: Output) -> str:
    """Read, check, encode and write one step; returns the digest of the bytes written."""
    chunk = plan.source.views[step.tensor].read(step.expert, step.start, step.stop)
    require_finite(chunk, plan.source, step)
    importance, calibrated = column_importance(plan, step), step.tensor in plan.importance
    hasher = blake3.blake3()
    if any(piece.codec in (BLOCKS, SCALES) for piece in step.pieces):
        chunk = encode_packed(chunk, importance)
    fielded = next((piece.codec for piece in step.pieces if piece.field), None)
    if fielded:  # once for both halves
        chunk = Rows(fielded, encode(chunk, fielded, step.tensor, step.start, importance, calibrated))
    for piece in step.pieces:
        own = _stored_rows(chunk, piece, step, plan.source)
        data = piece_bytes(chunk, piece, step, importance, calibrated) if own is None else own
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        assert len(view) == piece.nbytes
        output.write(plan.files[piece.file].name, piece.offset, view)
        hasher.update(view)
    return hasher.hexdigest()


def _stored_rows(chunk: Chunk, piece: Piece, step: Step, source: Source) -> np.ndarray[Any, Any] | None:
    """Rows that the source holds in the piece's codec already, though the chunk cannot show them (`own_encodings`)."""
    canonical = source.views[step.tensor]
    shown = chunk.encoding == piece.codec and not isinstance(canonical, Wide)
    if piece.columns or piece.transposed or shown or piece.codec in (BLOCKS, SCALES):
        return None
    view = stored_part(canonical, piece.part, piece.codec)
    if view is None:
        return None
    start, stop = (step.start // 2, step.stop // 2) if piece.part else (step.start, step.stop)
    rows = view.read(step.expert, start, stop)
    require_finite(rows, source, replace(step, start=start, stop=stop))
    return np.ascontiguousarray(encode(rows, piece.codec, _place(step, piece.part), start))


def require_finite(chunk: Chunk, source: Source, step: Step) -> None:
    """Refuse NaN, infinity and the scale byte that means it."""
    bad = chunk.first_bad()
    if bad is not None:
        expert = f"expert {step.expert}, " if step.expert else ""
        raise BadInput(
            "a value is not a finite number" if isinstance(chunk, Rows) else "a scale byte that no finite value has",
            file=source.path,
            tensor=", ".join(source.names.get(step.tensor, (step.tensor,))[:2]),
            found=f"at {expert}row {step.start + bad[0]}, column {bad[1]}",
            remedy="the file is corrupt; run verify and fetch it again",
        )


def column_importance(plan: Plan, step: Step) -> F32 | None:
    """f32 [C]: as calibrated; nothing for the columns that widening added, which only ever meet zeros; None: all count alike."""
    view = plan.source.views[step.tensor]
    if step.tensor in plan.importance:
        return fit(plan.importance[step.tensor][step.expert], view, step.expert)
    return padding_importance(view)


def padding_importance(view: View) -> F32 | None:
    """f32 [C]: nothing for the columns that widening added; None where it added none."""
    if not isinstance(view, Wide) or view.true_columns == view.stack[2]:
        return None
    return (np.arange(view.stack[2]) < view.true_columns).astype(np.float32)


def piece_bytes(
    chunk: Chunk, piece: Piece, step: Step, importance: F32 | None = None, calibrated: bool = False
) -> np.ndarray[Any, Any]:
    """The bytes that a chunk becomes in one output tensor."""
    if piece.part and not piece.columns:
        chunk = chunk.select(slice(0 if piece.part == "gate" else 1, None, 2))
    if piece.codec in (BLOCKS, SCALES):
        assert isinstance(chunk, Mxfp4)
        return np.ascontiguousarray(chunk.blocks if piece.codec == BLOCKS else chunk.scales)
    if piece.field:
        assert isinstance(chunk, Rows)
        half = split(piece.codec, chunk.data)[piece.field == INT_CODES]
        return transpose(half) if piece.transposed else half
    if piece.transposed:
        return _transposed(chunk, piece.codec, step)
    if piece.columns:
        values = chunk.values()[:, 0 if piece.part == "gate" else 1 :: 2]
        return np.ascontiguousarray(encode_float(np.ascontiguousarray(values), piece.codec))
    first = step.start // 2 if piece.part else step.start
    return np.ascontiguousarray(encode(chunk, piece.codec, _place(step, piece.part), first, importance, calibrated))


def _place(step: Step, part: str) -> str:
    """Where a step's piece is, for errors; rows are counted within it."""
    parts = [step.tensor, f"expert {step.expert}" if is_expert_matrix(step.tensor) else "", part]
    return ", ".join(filter(None, parts))


def _transposed(chunk: Chunk, codec: str, step: Step) -> np.ndarray[Any, Any]:
    """[out, in] → floats [in, out]; decoded some rows at a time."""
    rows, columns = chunk.shape
    words = np.empty((rows, columns), f"<u{CODECS[codec].row_bytes(1)}")
    for start in range(0, rows, ROWS_AT_ONCE):
        part = chunk.select(slice(start, start + ROWS_AT_ONCE))
        words[start : start + ROWS_AT_ONCE] = encode(part, codec, step.tensor, start).view(words.dtype)
    return transpose(words)


class _Front:
    """How far each output file is complete from its beginning: gaps between pieces (header, padding) count as written."""

    def __init__(self, plan: Plan) -> None:
        self._condition = threading.Condition()
        self._pending: list[list[int]] = [[] for _ in plan.files]
        self._done: list[set[int]] = [set() for _ in plan.files]
        self._at = [0] * len(plan.files)
        self._sizes = [file.size for file in plan.files]
        self._open = [False] * len(plan.files)
        for step in plan.steps:
            for piece in step.pieces:
                self._pending[piece.file].append(piece.offset)
        for offsets in self._pending:
            offsets.sort()

    def open(self, file: int) -> None:
        with self._condition:
            self._open[file] = True
            self._condition.notify_all()

    def finish(self, step: Step) -> None:
        with self._condition:
            for piece in step.pieces:
                self._done[piece.file].add(piece.offset)
                offsets, at = self._pending[piece.file], self._at[piece.file]
                while at < len(offsets) and offsets[at] in self._done[piece.file]:
                    at += 1
                self._at[piece.file] = at
            self._condition.notify_all()

    def wait(self, file: int, beyond: int, stopped: threading.Event) -> int:
        """The end of the finished part once it exceeds `beyond` bytes."""
        with self._condition:
            while not stopped.is_set():
                offsets, at = self._pending[file], self._at[file]
                end = offsets[at] if at < len(offsets) else self._sizes[file]
                if end > beyond and self._open[file]:
                    return end
                self._condition.wait(0.2)
        return beyond


def _hash_source(source: Source, digests: dict[str, str], stopped: threading.Event) -> None:
    buffer = bytearray(READ_BYTES)
    for file in source.files:
        hasher = hashlib.sha256()
        for offset in range(0, file.size, READ_BYTES):
            if stopped.is_set():
                return
            view = memoryview(buffer)[: min(READ_BYTES, file.size - offset)]
            file.read_into(offset, view)
            hasher.update(view)
        digests[file.name] = hasher.hexdigest()


def _hash_output(plan: Plan, output: Output, front: _Front, digests: dict[str, str], stopped: threading.Event) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    for index, file in enumerate(plan.files):
        hasher, at = hashlib.sha256(), 0
        while at < file.size:
            end = front.wait(index, at, stopped)
            if stopped.is_set():
                return
            while at < end:
                got = output.read_into(file.name, at, buffer[: min(READ_BYTES, end - at)])
                hasher.update(buffer[:got])
                at += got
        digests[file.name] = hasher.hexdigest()

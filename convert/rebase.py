"""Fine-tunes of a release, back in MXFP4 with `--base`: what the tuning did not change keeps the release's very bytes.

A block of 32 weights whose values are those of the release's block takes its codes and scale as they are; every other block is
encoded anew (`mxfp4.encode`: the better of the scales by squared error). Where that comes out at the release's values again, the
release's bytes are taken too: the same values, and no second spelling of them. Re-encoding alone would keep the values of
unchanged blocks, not their bytes: a block whose largest code is small has a smaller scale that holds the same values.

The report counts blocks by three questions, each against all of them (−0 = 0 throughout):

    unchanged, changed          did the tuning change a value of the block?
    value-equal to the release  are the written values the release's?
    kept                        are the written bytes the release's, too? (always, where the values are)
    exact, rounded              are the written values the fine-tune's?

Every unchanged block is kept; a count that says otherwise is no report but a failed proof. A changed block that is kept was
rounded to the release's values, because no other MXFP4 block that was tried is nearer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.plan import Step
from gptoss_convert.convert.run import require_finite
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.target_gguf import gguf_slots
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import ProofFailed, Refused, UsageError
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Mxfp4
from gptoss_convert.kernels.floats import F32
from gptoss_convert.quant.encode import encode_packed
from gptoss_convert.quant.recipe import Recipe

Flags = NDArray[np.bool_]  # [R, G]: one for each block


@dataclass(frozen=True)
class Rebased:
    """A floating-point view of a fine-tune in MXFP4, with the blocks of `release` wherever these hold the same values.

    tuned, name: where `base` comes from, for errors: a value that is no number has no encoding and is refused here.
    """

    base: View
    release: View
    tuned: Source
    name: str

    encoding = "mxfp4"

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack

    def read(self, expert: int, start: int, stop: int) -> Mxfp4:
        """See View."""
        tuned = self.base.read(expert, start, stop)
        require_finite(tuned, self.tuned, Step(self.name, expert, start, stop, ()))
        there = _packed(self.release.read(expert, start, stop))
        blocks, scales = np.array(there.blocks), np.array(there.scales)
        for part in _slices(stop - start):
            wanted, old = tuned.select(part), there.select(part)
            same = _equal_blocks(wanted.values(), old.values())
            if same.all():
                continue
            anew = encode_packed(wanted)
            same |= _equal_blocks(anew.values(), old.values())
            blocks[part] = np.where(same[..., None], old.blocks, anew.blocks)
            scales[part] = np.where(same, old.scales, anew.scales)
        return Mxfp4(blocks, scales)


def _packed(chunk: Chunk) -> Mxfp4:
    assert isinstance(chunk, Mxfp4)
    return chunk


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


def _equal_blocks(a: F32, b: F32) -> Flags:
    """[R, G]: whether all 32 values of a block are the same numbers."""
    equal: Flags = (a == b).reshape(a.shape[0], -1, mxfp4.BLOCK).all(axis=2)
    return equal


def rebase(source: Source, release: Source) -> Source:
    """The source with its experts in MXFP4 by way of the release."""
    experts = [name for name in source.views if is_expert_matrix(name)]
    if all(source.views[name].encoding == "mxfp4" for name in experts):
        raise Refused("the experts are MXFP4 already; --base is for fine-tunes in bf16", file=source.path)
    views = dict(source.views)
    for name in experts:
        there = release.views.get(name)
        if there is None or there.encoding != "mxfp4" or there.stack != source.views[name].stack:
            raise Refused(
                "the base is not the MXFP4 release of this model",
                file=release.path,
                tensor=name,
                found="no such tensor" if there is None else f"{there.encoding} {list(there.stack)}",
                expected=f"mxfp4 {list(source.views[name].stack)}",
            )
        views[name] = Rebased(source.views[name], there, source, name)
    files = [*source.files, *release.files]
    return replace(source, views=views, files=files, names=dict(source.names))


def require_mxfp4_experts(config: ModelConfig, recipe: Recipe) -> None:
    """Refuse a recipe that gives any expert matrix another codec, or other neurons, than the release has.

    There is no release's block to keep then, and going by way of MXFP4 would round twice.
    """
    slots = [slot for group in gguf_slots(config, recipe).values() for slot in group]
    other = next((s for s in slots if "_exps.weight" in s.name and s.codec != "mxfp4"), None)
    if other is not None:
        raise UsageError(
            "--base is for experts that become MXFP4, as the release's are",
            found=f"{other.codec} for {other.name}",
            expected="mxfp4 for every expert matrix",
            remedy="leave --base out to round the fine-tune itself, or ask for --experts mxfp4 or --type mxfp4",
        )
    if recipe.intermediate is not None and recipe.intermediate < config.intermediate:
        raise UsageError(
            "--base keeps the release's blocks, and cutting neurons tears them apart",
            found=f"experts of {recipe.intermediate} neurons",
            expected=f"{config.intermediate} or more",
            remedy="leave --base out, or do not cut",
        )


@dataclass
class BlockCounts:
    """Blocks of the experts' matrices by what became of them; see the module's docstring."""

    blocks: int = 0
    unchanged: int = 0
    value_equal_to_the_release: int = 0
    kept: int = 0
    exact: int = 0
    changed_and_exact: int = 0
    changed_and_released: int = 0

    def add(self, flags: _Flags) -> None:
        """Count some more."""
        self.blocks += flags.unchanged.size
        self.unchanged += int(flags.unchanged.sum())
        self.value_equal_to_the_release += int(flags.released.sum())
        self.kept += int(flags.kept.sum())
        self.exact += int(flags.exact.sum())
        self.changed_and_exact += int((flags.exact & ~flags.unchanged).sum())
        self.changed_and_released += int((flags.released & ~flags.unchanged).sum())

    def as_dict(self) -> dict[str, int]:
        """For the certificate. rounded: all of them are changed ones."""
        changed = self.blocks - self.unchanged
        return {
            "blocks": self.blocks,
            "unchanged": self.unchanged,
            "changed": changed,
            "value_equal_to_the_release": self.value_equal_to_the_release,
            "kept": self.kept,
            "exact": self.exact,
            "rounded": self.blocks - self.exact,
            "changed_and_exact": self.changed_and_exact,
            "changed_and_rounded_to_the_release": self.changed_and_released,
            "changed_and_rounded_elsewhere": changed - self.changed_and_exact - self.changed_and_released,
        }


@dataclass(frozen=True)
class Base:
    """The release that --base named: its files' SHA-256 by name, and the count of blocks where a proof was made."""

    release: Source
    digests: dict[str, str]
    blocks: BlockCounts | None


def count_blocks(source: Source, artifact: Source, release: Source, threads: int) -> BlockCounts:
    """Compare artifact, source and release block by block, from the files as they are.

    ProofFailed where a block that the tuning did not change lost the release's bytes.
    """
    counts, lock = BlockCounts(), threading.Lock()

    def count(job: tuple[str, int]) -> None:
        name, expert = job
        views = (source.views[name], artifact.views[name], release.views[name])
        tuned, made, old = (view.read(expert, 0, view.stack[1]) for view in views)
        for part in _slices(tuned.shape[0]):
            flags = _compare(tuned.select(part), _packed(made.select(part)), _packed(old.select(part)))
            _require_kept(flags, f"{name}, expert {expert}", part.start)
            with lock:
                counts.add(flags)

    workers = Workers()
    names = [name for name in source.views if is_expert_matrix(name)]
    workers.each([(name, e) for name in names for e in range(source.config.experts)], count, threads)
    workers.join()
    return counts


@dataclass(frozen=True)
class _Flags:
    unchanged: Flags
    released: Flags
    kept: Flags
    exact: Flags


def _compare(tuned: Chunk, made: Mxfp4, old: Mxfp4) -> _Flags:
    before, after, release = tuned.values(), made.values(), old.values()
    return _Flags(
        unchanged=_equal_blocks(before, release),
        released=_equal_blocks(after, release),
        kept=(made.blocks == old.blocks).all(axis=2) & (made.scales == old.scales),
        exact=_equal_blocks(after, before),
    )


def _require_kept(flags: _Flags, where: str, first_row: int) -> None:
    lost: NDArray[Any] = np.argwhere(flags.unchanged & ~flags.kept)
    if len(lost):
        row, group = (int(i) for i in lost[0])
        raise ProofFailed(
            "a block that the fine-tune did not change lost the release's bytes",
            tensor=where,
            found=f"other bytes at row {first_row + row}, column {mxfp4.BLOCK * group}",
            expected="the release's codes and scale",
            remedy="this is a fault of the conversion; nothing was written. Please report it",
        )

"""Fine-tunes of a release, back in MXFP4 with `--base`: what the tuning did not change keeps the release's very bytes.

A block of 32 weights whose values are those of the release's block takes its codes and scale as they are; every other block is
encoded anew (`mxfp4.encode`: the better of the scales by squared error). Re-encoding alone would keep the values of unchanged
blocks, not their bytes: a block whose largest code is small has a smaller scale that holds the same values.

The report counts blocks:

    kept        bytes of the release                     (their values did not change)
    exact       changed, and still values that MXFP4 holds
    rounded     changed, and rounded
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.run import Workers
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.errors import Refused
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Mxfp4
from gptoss_convert.kernels.floats import F32
from gptoss_convert.quant.encode import encode_packed


@dataclass(frozen=True)
class Rebased:
    """A floating-point view in MXFP4, with the blocks of `release` wherever these hold the same values."""

    base: View
    release: View

    encoding = "mxfp4"

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack

    def read(self, expert: int, start: int, stop: int) -> Mxfp4:
        """See View."""
        tuned = self.base.read(expert, start, stop)
        kept = self.release.read(expert, start, stop)
        assert isinstance(kept, Mxfp4)
        same = _same_blocks(tuned.values(), kept)
        if same.all():
            return kept
        anew = encode_packed(tuned)
        return Mxfp4(np.where(same[..., None], kept.blocks, anew.blocks), np.where(same, kept.scales, anew.scales))


def _same_blocks(values: F32, packed: Mxfp4) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[R, G]: whether all 32 values of a block are the packed ones."""
    rows, groups = packed.scales.shape
    equal = (values == packed.values()).reshape(rows, groups, mxfp4.BLOCK)
    return np.asarray(equal.all(axis=2), np.bool_)


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
        views[name] = Rebased(source.views[name], there)
    files = [*source.files, *release.files]
    return replace(source, views=views, files=files, names=dict(source.names))


@dataclass
class BlockCounts:
    """Blocks of experts by what became of them; see the module's docstring."""

    kept: int = 0
    exact: int = 0
    rounded: int = 0

    def as_dict(self) -> dict[str, int]:
        """For the certificate."""
        return {"blocks": self.kept + self.exact + self.rounded, **vars(self)}


def count_blocks(source: Source, artifact: Source, release: Source, threads: int) -> BlockCounts:
    """Compare artifact, source and release block by block, from the files as they are."""
    counts, lock = BlockCounts(), threading.Lock()

    def count(job: tuple[str, int]) -> None:
        name, expert = job
        rows = source.views[name].stack[1]
        tuned = source.views[name].read(expert, 0, rows).values()
        made, old = (s.views[name].read(expert, 0, rows) for s in (artifact, release))
        assert isinstance(made, Mxfp4)
        assert isinstance(old, Mxfp4)
        kept = (made.blocks == old.blocks).all(axis=2) & (made.scales == old.scales)
        same = _same_blocks(tuned, made)
        with lock:
            counts.kept += int(kept.sum())
            counts.exact += int((same & ~kept).sum())
            counts.rounded += int((~same & ~kept).sum())

    workers = Workers()
    names = [name for name in source.views if is_expert_matrix(name)]
    workers.each([(name, e) for name in names for e in range(source.config.experts)], count, threads)
    workers.join()
    return counts

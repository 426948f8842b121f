"""The dry run: what `convert` would do with the same arguments, from headers alone, and the text that was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss_convert.convert.calibration import calibration
from gptoss_convert.convert.conversion import (
    Options,
    calibrated_plan,
    is_calibrated,
    make_plan,
    open_base,
    open_for,
    thread_count,
)
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.own_encodings import own_encoding, require_rounding, stored_part
from gptoss_convert.convert.plan import Plan, Slot, peak_memory
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.rebase import rebase
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import View, read_encoding
from gptoss_convert.convert.widen import Wide
from gptoss_convert.quant.encode import fate

REBASED_FATE = "unchanged blocks keep the base's bytes, changed ones rounded to mxfp4 where they are not already"


def foresee(path: Path, target: Path, options: Options) -> dict[str, Any]:
    """What `convert` would do with the same arguments, from headers alone: the dry run."""
    with open_for(path, options) as source, open_base(options) as release:
        whole = source if release is None else rebase(source, release)
        found = None
        if is_calibrated(options):
            require_rounding(make_plan(whole, target, options, dry=True), options.rounding.method)
            found = calibration(source, options.rounding, 1, silent, dry=True)
        plan = calibrated_plan(whole, target, options, found, dry=True)
        return forecast(source, plan, options)


def forecast(source: Source, plan: Plan, options: Options) -> dict[str, Any]:
    """The dry run's answer: sizes, memory, and every tensor's fate."""
    threads = thread_count(plan, options.threads)
    return {
        "target": plan.target,
        "options": plan.options,
        "source": {"layout": str(source.layout), "losses": source.losses, "notes": source.notes},
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": max(peak_memory(plan, threads), options.rounding.memory(source.config)),
        "threads": threads,
        "files": [{"name": f.name, "size": f.size} for f in plan.files]
        + [{"name": name, "size": len(data)} for name, data in sorted(plan.small.items())],
        "tensors": [
            {
                "source": name,
                "from": own_encoding(source.views[name], slot.part),
                "tensor": slot.name,
                "codec": slot.codec,
                "shape": list(slot.shape),
                "bytes": plan.places[slot.name].nbytes,
                "fate": REBASED_FATE
                if options.base is not None and is_expert_matrix(name)
                else _fate(plan.source.views[name], slot),
            }
            for name, slots in plan.slots.items()
            for slot in slots
        ],
        "notes": plan.notes,
        "losses": plan.losses,
    }


def _fate(view: View, slot: Slot) -> str:
    """view: of the plan's source, in the output's widths."""
    encoding = read_encoding(view) if stored_part(view, slot.part, slot.codec) is None else slot.codec
    if slot.codec in ("blocks", "scales"):
        return "bits kept" if encoding == "mxfp4" else "rounded to mxfp4 where it is not already"
    if isinstance(view, Wide) and view.factor != 1.0:
        return "scaled by the widening"
    moved = encoding == slot.codec == "mxfp4"
    return "bits moved" if moved else fate(encoding, slot.codec)

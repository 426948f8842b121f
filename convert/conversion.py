"""`convert`: source → plan → run → proof → publication, with the certificate beside the artifact.

Nothing appears under the target's name before every byte is written, hashed and, unless told otherwise, proved.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_convert.convert.certificate import FOLDER_NAME, certificate, file_name
from gptoss_convert.convert.companions import ReadOnce
from gptoss_convert.convert.forecast import require_sense
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.plan import Plan, Step, make_steps, peak_memory
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.proof import Proof, prove, work_size
from gptoss_convert.convert.rebase import count_blocks, rebase
from gptoss_convert.convert.run import Digests, SourceHashing, execute
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.target_gguf import plan_gguf
from gptoss_convert.convert.target_safetensors import plan_bf16, plan_hf, plan_original
from gptoss_convert.errors import BadInput, ProofFailed, Refused, UsageError
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.output import Output
from gptoss_convert.quant.encode import DENSE_CODECS, EXPERT_CODECS, fate
from gptoss_convert.quant.recipe import Recipe, named, plain, read_recipe

TARGETS = ("gguf", "hf", "original", "bf16")
MAX_RECIPE_BYTES = 1 << 20
STEP_MEMORY = 640 << 20  # what all threads together may hold of steps


@dataclass(frozen=True)
class Options:
    """What a conversion is asked for. `experts` and `dense` may be "auto": the source's own encoding, losing nothing."""

    to: str
    experts: str = "auto"
    dense: str = "auto"
    type: str | None = None
    recipe: Path | None = None
    widen: str = "auto"  # or "cut", "none", or widths as "3072x2880"
    allow_larger: bool = False
    base: Path | None = None
    split_bytes: int | None = None
    threads: int = 0
    proof: bool = True
    name: str | None = None
    tokenizer: Path | None = None
    gate_proj: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a conversion did. `proof` is None where it was not asked for; `document` is the certificate."""

    target: Path
    plan: Plan
    digests: Digests
    proof: Proof | None
    document: dict[str, Any]


def open_for(path: Path, options: Options) -> Source:
    """The source, sound enough to be converted."""
    source = open_source(path, gate_proj=options.gate_proj, tokenizer=options.tokenizer)
    try:
        source.require_sound()
    except BaseException:
        source.close()
        raise
    return source


def make_plan(source: Source, target: Path, options: Options) -> Plan:
    """The plan for these options, from headers alone."""
    if options.to == "gguf":
        _check_gguf_name(target, options)
        recipe, widening = with_widths(choose_recipe(source, options), options.widen)
        if (options.type or options.recipe) and not options.allow_larger:
            require_sense(source, recipe)
        plan = plan_gguf(
            source,
            recipe,
            name=options.name,
            split_bytes=options.split_bytes,
            stem=target.name if options.split_bytes else "",
            widening=widening,
            threads=options.threads or cores(),
        )
    else:
        _refuse_codecs(options)
        planners = {"hf": plan_hf, "original": plan_original, "bf16": plan_bf16}
        plan = planners[options.to](source, options.split_bytes)
    if options.to == "gguf" and not options.split_bytes:
        plan.files[0] = type(plan.files[0])(target.name, plan.files[0].head, plan.files[0].size)
    plan.steps = make_steps(plan)
    return plan


def with_widths(recipe: Recipe, widen: str) -> tuple[Recipe, str]:
    """--widen's widths, "3072x2880", put into the recipe; the other words are left to the plan."""
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", widen)
    if match is None:
        return recipe, widen
    hidden, intermediate = int(match[1]), int(match[2])
    if not hidden or not intermediate or hidden % 32 or intermediate % 32:
        raise UsageError("--widen's widths are not multiples of 32", found=widen, expected="such as 3072x2880")
    return replace(recipe, hidden=hidden, intermediate=intermediate), "auto"


def choose_recipe(source: Source, options: Options) -> Recipe:
    """The recipe that --type, --recipe or --experts and --dense ask for."""
    if options.type is not None and options.recipe is not None:
        raise UsageError("--type and --recipe exclude each other")
    if options.type is None and options.recipe is None:
        return plain(*_codecs(source, options))
    if (options.experts, options.dense) != ("auto", "auto"):
        raise UsageError("--experts and --dense are for conversions without --type or --recipe")
    if options.type is not None:
        return named(options.type)
    assert options.recipe is not None
    with SourceFile(options.recipe) as file:
        text = bytes(file.read(0, min(file.size, MAX_RECIPE_BYTES))).decode("utf-8", "replace")
    return read_recipe(text, options.recipe)


def _codecs(source: Source, options: Options) -> tuple[str, str]:
    experts = {view.encoding for name, view in source.views.items() if is_expert_matrix(name)}
    dense = {
        view.encoding
        for name, view in source.views.items()
        if not is_expert_matrix(name) and name.endswith("weight") and view.stack[1] > 1 and "router" not in name
    }
    chosen = []
    for asked, found, known, what in (
        (options.experts, experts, EXPERT_CODECS, "--experts"),
        (options.dense, dense, DENSE_CODECS, "--dense"),
    ):
        codec = (next(iter(found)) if len(found) == 1 else "f32") if asked == "auto" else asked
        if codec not in known:
            raise UsageError(f"{what} cannot be {codec}", expected=", ".join(known))
        chosen.append(codec)
    return chosen[0], chosen[1]


def _check_gguf_name(target: Path, options: Options) -> None:
    if options.split_bytes and target.suffix == ".gguf":
        raise UsageError(
            "a split GGUF is a folder of parts", found=target.name, expected="a folder's name, without .gguf"
        )
    if not options.split_bytes and target.suffix != ".gguf":
        raise UsageError("a GGUF's name ends in .gguf", found=target.name, remedy=f"name it {target.name}.gguf")


def _refuse_codecs(options: Options) -> None:
    for what, asked in (
        ("--experts", options.experts),
        ("--dense", options.dense),
        ("--type", options.type),
        ("--recipe", options.recipe),
        ("--widen", options.widen),
        ("--name", options.name),
    ):
        if asked not in ("auto", None):
            raise UsageError(f"{what} is for --to gguf", found=f"--to {options.to}", remedy=f"leave {what} out")


def thread_count(plan: Plan, wanted: int) -> int:
    """Threads to run with: as many as asked for, or cores, but no more than the memory bound allows."""
    one = peak_memory(plan, 1) - peak_memory(plan, 0)
    return max(1, min(wanted or cores(), STEP_MEMORY // max(one, 1)))


def cores() -> int:
    """Cores that this process may use; where the system does not tell, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forecast(source: Source, plan: Plan, options: Options) -> dict[str, Any]:
    """The dry run's answer: sizes, memory, and every tensor's fate."""
    threads = thread_count(plan, options.threads)
    return {
        "target": plan.target,
        "options": plan.options,
        "source": {"layout": str(source.layout), "losses": source.losses, "notes": source.notes},
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": peak_memory(plan, threads),
        "threads": threads,
        "files": [{"name": f.name, "size": f.size} for f in plan.files]
        + [{"name": name, "size": len(data)} for name, data in sorted(plan.small.items())],
        "tensors": [
            {
                "source": name,
                "from": source.views[name].encoding,
                "tensor": slot.name,
                "codec": slot.codec,
                "shape": list(slot.shape),
                "bytes": plan.places[slot.name].nbytes,
                "fate": _fate(source.views[name].encoding, slot.codec),
            }
            for name, slots in plan.slots.items()
            for slot in slots
        ],
        "notes": plan.notes,
    }


def _fate(encoding: str, codec: str) -> str:
    if codec in ("blocks", "scales"):
        return "bits kept" if encoding == "mxfp4" else "rounded to mxfp4 where it is not already"
    moved = encoding == codec == "mxfp4"
    return "bits moved" if moved else fate(encoding, codec)


def convert(path: Path, target: Path, options: Options, show: ShowProgress) -> Outcome:
    """Convert; the artifact, proved, stands under its name when this returns."""
    target = target.absolute()
    folder = options.to != "gguf" or options.split_bytes is not None
    with (
        Output(target, folder=folder, overwrite=options.overwrite) as output,
        open_for(path, options) as source,
        _noticing_changes(source),
        _base(options) as release,
    ):
        _protect_inputs(target, path, options, *(s for s in (source, release) if s is not None))
        with SourceHashing(source) as hashing:
            plan = make_plan(source if release is None else rebase(source, release), target, options)
            threads = thread_count(plan, options.threads)
            with show("convert", _step_bytes(plan.steps)) as advance:
                digests = execute(plan, output, hashing=hashing, threads=threads, advance=advance)
        proof = counts = None
        if options.proof:
            made = output.partial if folder else output.path(target.name)
            with show("prove", work_size(source)) as advance, open_source(made) as artifact:
                proof = prove(source, artifact, threads=threads, advance=advance)
                counts = None if release is None else count_blocks(source, artifact, release, threads)
            plan.source.check_unchanged()
        document = certificate(source, plan, digests, proof, counts)
        data = (json.dumps(document, indent=1) + "\n").encode()
        if folder:
            output.write_small(FOLDER_NAME, data)
            output.publish()
        else:
            output.publish({file_name(target.name): data})
    return Outcome(target, plan, digests, proof, document)


@contextmanager
def _noticing_changes(source: Source) -> Iterator[None]:
    """Where a source changed under the run, that is what is told, and not what came of it."""
    try:
        yield
    except (BadInput, Refused, ProofFailed):
        source.check_unchanged()
        raise


def _protect_inputs(target: Path, path: Path, options: Options, *sources: Source) -> None:
    """Refuse a target that is, or holds, anything the conversion reads."""
    read = [path, *(p for p in (options.tokenizer, options.base, options.recipe) if p is not None)]
    for source in sources:
        read.extend(file.path for file in source.files)
        read.extend(c.path for c in source.companions.values() if isinstance(c, ReadOnce))
    place = target.resolve()
    taken = next((p for p in read if p.resolve().is_relative_to(place)), None)
    if taken is not None:
        raise UsageError(
            "the output would take the place of what it is made from",
            found=taken,
            expected=f"something outside {target}",
        )


@contextmanager
def _base(options: Options) -> Iterator[Source | None]:
    """The release that --base names, opened, or None."""
    if options.base is None:
        yield None
        return
    if options.to not in ("gguf", "hf", "original"):
        raise UsageError("--base is for targets with MXFP4 experts", found=f"--to {options.to}")
    with open_source(options.base) as release:
        release.require_sound()
        yield release


def _step_bytes(steps: list[Step]) -> int:
    return sum(step.nbytes for step in steps)

"""`convert`: source → plan → run → proof → publication, with the certificate beside the artifact.

Nothing appears under the target's name before every byte is written, hashed and, unless told otherwise, proved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptoss_convert.convert.calibration import Calibration, Wish, calibration
from gptoss_convert.convert.certificate import FOLDER_NAME, certificate, file_name
from gptoss_convert.convert.cut import choose, first_ones
from gptoss_convert.convert.forecast import require_sense
from gptoss_convert.convert.own_encodings import (
    AUTO,
    auto_recipe,
    require_bits_kept,
    require_rounding,
)
from gptoss_convert.convert.plan import Plan, Step, make_steps, peak_memory, threads_within
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.proof import Proof, prove, work_size
from gptoss_convert.convert.protect import files_read, protect_inputs
from gptoss_convert.convert.rebase import Base, count_blocks, rebase, require_mxfp4_experts
from gptoss_convert.convert.run import Digests, SourceHashing, execute
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.target_compressed import plan_int4, plan_int8, plan_int8_g32
from gptoss_convert.convert.target_gguf import gguf_tensors, plan_gguf
from gptoss_convert.convert.target_onnx import Wanted, plan_onnx
from gptoss_convert.convert.target_safetensors import plan_bf16, plan_hf, plan_original
from gptoss_convert.convert.workers import cores
from gptoss_convert.errors import BadInput, ProofFailed, Refused, UsageError
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import Value
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels.floats import F32
from gptoss_convert.quant.encode import DENSE_CODECS, EXPERT_CODECS
from gptoss_convert.quant.recipe import Recipe, named, read_recipe

TARGETS = ("gguf", "hf", "original", "bf16", "int4", "int8", "int8-g32", "onnx")
MAX_RECIPE_BYTES = 1 << 20


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
    rounding: Wish = field(default_factory=Wish)
    embedding: str = "auto"
    router: str = "auto"
    head: str = "auto"
    onnx_runtime: str | None = None


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


def make_plan(
    source: Source,
    target: Path,
    options: Options,
    keys: Sequence[tuple[str, Value]] = (),
    *,
    dry: bool = False,
    activations: Mapping[str, F32] | None = None,
) -> Plan:
    """The plan for these options, from headers alone, unless neurons are to be cut: which ones, the weights tell.

    keys: more metadata for a GGUF; dry: the plan is only looked at, so that any neurons will do; activations: calibrated mean
    squares, by which neurons are chosen instead (`cut.choose`).
    """
    require_fitting(options, target)
    if options.to == "gguf":
        recipe, widening = with_widths(choose_recipe(source, options), options.widen)
        if options.base is not None:
            require_mxfp4_experts(source.config, recipe)
        asked = options.type is None and options.recipe is None
        auto = asked and (options.experts, options.dense) == (AUTO, AUTO)
        notes = [] if auto else _sense(source, recipe, widening, options, asked)
        threads = options.threads or cores()
        plan = plan_gguf(
            source,
            recipe,
            name=options.name,
            split_bytes=options.split_bytes,
            stem=target.name if options.split_bytes else "",
            widening=widening,
            neurons=first_ones if dry else lambda whole, width: choose(whole, width, threads, activations),
            more=keys,
        )
        plan.notes[:0] = notes
        if asked:
            require_bits_kept(source, plan, options.experts, options.dense)
    elif options.to == "onnx":
        plan = plan_onnx(source, wanted(options))
        if options.base is not None and plan.options["experts"] != "mxfp4":
            raise UsageError(
                "--base is for experts that become MXFP4, as the release's are", found=f"{plan.options['experts']} experts",
                remedy="leave --base out to round the fine-tune itself, or ask for --experts mxfp4",
            )  # fmt: skip
    else:
        planners = {
            "hf": plan_hf,
            "original": plan_original,
            "bf16": plan_bf16,
            "int4": plan_int4,
            "int8": plan_int8,
            "int8-g32": plan_int8_g32,
        }
        plan = planners[options.to](source, options.split_bytes)
    if options.to == "gguf" and not options.split_bytes:
        plan.files[0] = type(plan.files[0])(target.name, plan.files[0].head, plan.files[0].size)
    plan.steps = make_steps(plan)
    return plan


def require_fitting(options: Options, target: Path) -> None:
    """UsageError for what does not fit together, as far as that can be told without a source."""
    if options.to != "onnx":
        _refuse(options, _OF_ONNX)
    if options.to == "gguf":
        _check_gguf_name(target, options)
        _require_one_choice(options)
        _widths(options.widen)
        if options.type is not None:
            named(options.type)
    elif options.to == "onnx":
        _refuse(options, _OF_GGUF)
        wanted(options)
    else:
        _refuse(options, {**_OF_GGUF, **_OF_BOTH})
    is_calibrated(options)


def _sense(source: Source, recipe: Recipe, widening: str, options: Options, asked: bool) -> list[str]:
    return require_sense(source, recipe, widening, allow_larger=options.allow_larger, asked=asked)


def with_widths(recipe: Recipe, widen: str) -> tuple[Recipe, str]:
    """--widen's widths, "3072x2880", put into the recipe; the other words are left to the plan."""
    widths = _widths(widen)
    return (recipe, widen) if widths is None else (replace(recipe, hidden=widths[0], intermediate=widths[1]), "auto")


def _widths(widen: str) -> tuple[int, int] | None:
    """--widen's widths, None where it is a word."""
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", widen)
    if match is None:
        return None
    hidden, intermediate = int(match[1]), int(match[2])
    if not hidden or not intermediate or hidden % 32 or intermediate % 32:
        raise UsageError("--widen's widths are not multiples of 32", found=widen, expected="such as 3072x2880")
    return hidden, intermediate


def choose_recipe(source: Source, options: Options) -> Recipe:
    """The recipe that --type, --recipe or --experts and --dense ask for."""
    _require_one_choice(options)
    if options.type is None and options.recipe is None:
        return auto_recipe(source, options.experts, options.dense)
    if options.type is not None:
        return named(options.type)
    assert options.recipe is not None
    with SourceFile(options.recipe) as file:
        if file.size > MAX_RECIPE_BYTES:
            raise BadInput(
                "the recipe is too large to be one", file=options.recipe, found=f"{file.size} bytes",
                expected=f"at most {MAX_RECIPE_BYTES}",
            )  # fmt: skip
        recipe = read_recipe(bytes(file.read(0, file.size)), options.recipe)
    recipe.require_effect(gguf_tensors(source.config), source.config.layers)
    return recipe


def _require_one_choice(options: Options) -> None:
    """A type, a recipe, or codecs that there are."""
    if options.type is not None and options.recipe is not None:
        raise UsageError("--type and --recipe exclude each other")
    if options.type is None and options.recipe is None:
        _check_codecs(options)
    elif (options.experts, options.dense) != ("auto", "auto"):
        raise UsageError("--experts and --dense are for conversions without --type or --recipe")


def _check_codecs(options: Options) -> None:
    for asked, known, what in (
        (options.experts, EXPERT_CODECS, "--experts"),
        (options.dense, DENSE_CODECS, "--dense"),
    ):
        if asked not in (AUTO, *known):
            raise UsageError(f"{what} cannot be {asked}", expected=", ".join((AUTO, *known)))


def _check_gguf_name(target: Path, options: Options) -> None:
    if options.split_bytes and target.suffix == ".gguf":
        raise UsageError(
            "a split GGUF is a folder of parts", found=target.name, expected="a folder's name, without .gguf"
        )
    if not options.split_bytes and target.suffix != ".gguf":
        raise UsageError("a GGUF's name ends in .gguf", found=target.name, remedy=f"name it {target.name}.gguf")


_OF_GGUF = {"type": "gguf", "recipe": "gguf", "widen": "gguf", "allow_larger": "gguf"}
_OF_BOTH = {"experts": "gguf or onnx", "dense": "gguf or onnx", "name": "gguf or onnx"}
_OF_ONNX = {"embedding": "onnx", "router": "onnx", "head": "onnx", "onnx_runtime": "onnx"}


def _refuse(options: Options, foreign: Mapping[str, str]) -> None:
    """UsageError for an option that is for other targets. foreign: option → these targets."""
    for name, targets in foreign.items():
        if getattr(options, name) not in ("auto", None, False):
            what = "--" + name.replace("_", "-")
            raise UsageError(f"{what} is for --to {targets}", found=f"--to {options.to}", remedy=f"leave {what} out")


def wanted(options: Options) -> Wanted:
    """What is asked of an ONNX folder."""
    if options.rounding.method != "round":
        raise UsageError("ONNX's integers are rounded by fixed rules", found=f"--method {options.rounding.method}")
    if options.split_bytes is not None:
        raise UsageError("ONNX has one data file", found="--split-size", remedy="leave --split-size out")
    return Wanted(
        options.experts, options.dense, options.embedding, options.router, options.head, options.onnx_runtime, options.name
    )  # fmt: skip


def thread_count(plan: Plan, wanted: int) -> int:
    """Threads to run with: as many as asked for, or cores, but no more than the memory bound allows."""
    one = peak_memory(plan, 1) - peak_memory(plan, 0)
    return threads_within(one, wanted or cores())


def convert(path: Path, target: Path, options: Options, show: ShowProgress) -> Outcome:
    """Convert; the artifact, proved, stands under its name when this returns."""
    target = target.absolute()
    folder = options.to != "gguf" or options.split_bytes is not None
    with (
        Output(target, folder=folder, overwrite=options.overwrite) as output,
        open_for(path, options) as source,
        _noticing_changes(source),
        open_base(options) as release,
    ):
        text = options.rounding.path
        given = [p for p in (path, options.tokenizer, options.base, options.recipe, text) if p is not None]
        protect_inputs(target, [*given, *files_read(source, release)])
        with SourceHashing(source) as hashing, _hashing(release) as base_hashing:
            whole = source if release is None else rebase(source, release)
            found = None
            if is_calibrated(options):
                require_rounding(make_plan(whole, target, options, dry=True), options.rounding.method)
                found = calibration(source, options.rounding, options.threads or cores(), show)
            plan = calibrated_plan(whole, target, options, found)
            threads = thread_count(plan, options.threads)
            prepare = _gptq(plan, options, found, show)
            with show("convert", _step_bytes(plan.steps)) as advance:
                digests = execute(plan, output, hashing=hashing, threads=threads, advance=advance, prepare=prepare)
            base_digests = base_hashing.join() if base_hashing else {}
        proof = counts = None
        if options.proof:
            made = output.partial if folder else output.path(target.name)
            with show("prove", work_size(source)) as advance, open_source(made) as artifact:
                proof = prove(source, artifact, threads=threads, advance=advance)
                counts = None if release is None else count_blocks(source, artifact, release, threads)
        plan.source.check_unchanged()
        base = None if release is None else Base(release, base_digests, counts)
        document = certificate(source, plan, digests, proof, base)
        data = (json.dumps(document, indent=1) + "\n").encode()
        if folder:
            output.write_small(FOLDER_NAME, data)
            output.publish()
        else:
            output.publish({file_name(target.name): data})
    return Outcome(target, plan, digests, proof, document)


def calibrated_plan(
    source: Source, target: Path, options: Options, found: Calibration | None, *, dry: bool = False
) -> Plan:
    """The plan, with what calibration gives. dry: see make_plan."""
    if found is None:
        return make_plan(source, target, options, dry=dry)
    means = {name: inputs.mean for name, inputs in found.statistics.inputs.items()} if found.statistics else None
    plan = make_plan(source, target, options, found.keys(), dry=dry, activations=means)
    found.put_into(plan)
    return plan


def is_calibrated(options: Options) -> bool:
    """Whether rounding looks at data; UsageError for what does not fit together."""
    options.rounding.check()
    if options.rounding.method != "round" and options.base is not None:
        raise UsageError("--base keeps and rounds blocks by itself", remedy="leave --method out")
    return options.rounding.method != "round"


def _gptq(
    plan: Plan, options: Options, found: Calibration | None, show: ShowProgress
) -> Callable[[Output, set[int]], set[int]] | None:
    """The stage that does the plan's matrices by GPTQ, where it is asked for."""
    if found is None or options.rounding.method != "gptq":
        return None
    from gptoss_convert.convert.hessians import Reader
    from gptoss_convert.convert.rounding import FromHessians, Stage

    def stage(output: Output, done: set[int]) -> set[int]:
        """What `execute` calls before its own steps."""
        threads = options.threads or cores()
        with show("gptq", plan.source.config.layers) as advance:
            work: Stage | FromHessians
            if found.hessians is not None:
                work = FromHessians(plan, Reader(found.hessians, found.config), threads=threads, advance=advance)
            else:
                assert found.texts is not None
                work = Stage(plan, found.texts, device=options.rounding.device, threads=threads, advance=advance)
            made = work(output, done)
        found.finish(plan, work)
        return made

    return stage


def _hashing(release: Source | None) -> AbstractContextManager[SourceHashing | None]:
    return nullcontext() if release is None else SourceHashing(release)


@contextmanager
def _noticing_changes(source: Source) -> Iterator[None]:
    """Where a source changed under the run, that is what is told, and not what came of it."""
    try:
        yield
    except (BadInput, Refused, ProofFailed):
        source.check_unchanged()
        raise


@contextmanager
def open_base(options: Options) -> Iterator[Source | None]:
    """The release that --base names, opened, or None."""
    if options.base is None:
        yield None
        return
    if options.to not in ("gguf", "hf", "original", "onnx"):
        raise UsageError("--base is for targets with MXFP4 experts", found=f"--to {options.to}")
    with open_source(options.base) as release:
        release.require_sound()
        yield release


def _step_bytes(steps: list[Step]) -> int:
    return sum(step.nbytes for step in steps)

"""`gptoss-convert inspect`: what a checkpoint is, and everything odd about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from gptoss_convert.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from gptoss_convert.convert.inspect import Inspection
    from gptoss_convert.convert.source import StoredTensor

STYLES = {"error": "bold red", "warning": "red"}
LISTED_FILES = 40  # of those that are not read; --json has them all
LISTED_ODDITIES = 200


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--tensors", is_flag=True, help="Every tensor on a line of its own.")
@click.option("--quick", is_flag=True, help="Headers only: says nothing about the values.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that read values.")
@click.option(
    "--gate-proj",
    type=click.Choice(["deinterleaved", "halves"]),
    help='What "gate_proj" means in a per-expert checkpoint, where the weights do not tell.',
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(*, source: str, tensors: bool, quick: bool, threads: int, gate_proj: str | None, as_json: bool) -> None:
    """Say what SRC is: layout, model, types, shapes, tokenizer, template, and whatever is odd about it.

    SRC is a folder, a file, a snapshot in the hub's cache, or OWNER/NAME@COMMIT, which is fetched first. Every value is
    read, unless --quick is given. Pickles are never opened, templates never rendered. "Official" is said of a digest only;
    for the weights ask verify.

    Exit codes: 0 nothing that would stop a conversion, 3 something is missing, unexpected, misshapen or not finite.
    """
    from gptoss_convert.cli.output import emit, progress
    from gptoss_convert.convert.inspect import inspect_open
    from gptoss_convert.convert.inspect_values import value_bytes
    from gptoss_convert.convert.resolve import resolve_source
    from gptoss_convert.convert.source import open_source

    with open_source(resolve_source(source, progress), gate_proj=gate_proj) as opened:
        total = 0 if quick else value_bytes(opened)
        with progress("reading values", total, enabled=not quick) as advance:
            found = inspect_open(opened, values=not quick, threads=threads, progress=advance)
    emit(found.as_dict(), as_json, lambda console: render(found, console, every_tensor=tensors))
    raise SystemExit(int(found.exit_code()))


def render(found: Inspection, console: Console, *, every_tensor: bool) -> None:
    """The inspection for people; every text out of a file goes through `printable` and none is markup."""
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    for label, value in _facts(found):
        line(f"{label:<11} {printable(value)}")
    for title, lines in (
        ("files", _files(found)),
        ("tensors", _each(found.tensors) if every_tensor else _groups(found.tensors)),
    ):
        line(f"\n{title}", "bold")
        for text in lines:
            line(f"  {text}")
    line("")
    for label, texts in (("note", found.notes), ("lost", found.losses)):
        for text in texts:
            line(f"{label}: {printable(text)}", "dim")
    for oddity in found.oddities[:LISTED_ODDITIES]:
        line(f"{oddity.severity}: {printable(oddity.thing)}: {printable(oddity.where)}", STYLES[oddity.severity])
        for label, side in (("found", oddity.found), ("expected", oddity.expected)):
            if side is not None:
                line(f"  {label}: {printable(side)}", STYLES[oddity.severity])
    if len(found.oddities) > LISTED_ODDITIES:
        line(f"and {len(found.oddities) - LISTED_ODDITIES} more; --json lists them all", STYLES["error"])
    line(*_conclusion(found))


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    from gptoss_convert.cli.output import human_bytes

    c = found.config
    yield "layout", f"{found.layout.value}: {found.description}"
    yield "model", found.model
    if found.revision:
        yield "revision", found.revision
    yield "parameters", f"{_count(c.parameters)}, {_count(found.active_parameters)} active for a token"
    yield "size", f"{human_bytes(found.weight_bytes)} ({found.weight_bytes} bytes) of weights"
    yield (
        "widths",
        (
            f"{c.layers} layers, {c.experts} experts, {c.experts_per_token} a token, hidden {c.hidden}, "
            f"intermediate {c.intermediate}, vocabulary {c.vocab}"
        ),
    )
    yield (
        "attention",
        (
            f"{c.heads} heads, {c.kv_heads} for keys and values, of {c.head_dim}; window {c.sliding_window} in "
            f"{sum(c.sliding)} of {c.layers} layers"
        ),
    )
    yield (
        "positions",
        (
            f"{c.max_positions} = YaRN {c.rope_factor:g} × {c.original_positions}, theta {c.rope_theta:g}, beta "
            f"{c.beta_fast:g} and {c.beta_slow:g}, {'' if c.truncate else 'not '}truncated"
        ),
    )
    for row in found.dtypes:
        yield "type", f"{row['dtype']}: {row['tensors']} tensors, {human_bytes(row['bytes'])}"
    for document in found.documents:
        word = f"official: {document.official}" if document.official else "not official"
        yield document.kind.split()[-1], f"{document.where}: {word} (sha256 {document.sha256})"
    for key, value in found.metadata.items():
        if key.startswith("tokenizer.") and isinstance(value, dict):
            yield "array", f"{key}: {value['count']} of type {value['array_of']}"
    if found.values is not None and (scales := found.values.as_dict()["mxfp4"]):
        yield (
            "scales",
            (
                f"{scales['blocks']} MXFP4 blocks, scale bytes {scales['lowest_scale']} to {scales['highest_scale']}, "
                f"{scales['blocks_with_scale_0']} of them 0"
            ),
        )


def _count(number: int) -> str:
    """A number of parameters for people: 20.91 billion."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.2f} {name}"
    return str(number)


def _files(found: Inspection) -> Iterator[str]:
    from gptoss_convert.cli.output import human_bytes

    shown = found.files
    other = [file for file in found.files if file.role == "other"]
    if len(other) > LISTED_FILES:
        shown = [file for file in found.files if file.role != "other"]
    for file in shown:
        role = {"other": "not read", "pickle": "a pickle, never opened"}.get(file.role, file.role)
        yield f"{human_bytes(file.nbytes):>9}  {printable(file.name)}  ({role})"
    if shown is not found.files:
        yield f"and {len(other)} files that are not read"


def _each(tensors: Iterable[StoredTensor]) -> Iterator[str]:
    for tensor in tensors:
        yield f"{printable(tensor.name)} {tensor.dtype} {list(tensor.shape)} in {printable(tensor.file)}"


def _groups(tensors: Iterable[StoredTensor]) -> Iterator[str]:
    """Tensors of one type and shape whose names differ in numbers only, on one line."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[list[int]]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<=\.)\d{1,6}(?=\.)", "\0", tensor.name)
        numbers = [int(number) for number in re.findall(r"(?<=\.)\d{1,6}(?=\.)", tensor.name)]
        groups.setdefault((pattern, tensor.dtype, tensor.shape), []).append(numbers)
    for (pattern, dtype, shape), members in groups.items():
        name = pattern
        for column in zip(*members, strict=True):
            name = name.replace("\0", _ranges(sorted(set(column))), 1)
        yield f"{printable(name)} {dtype} {list(shape)} ×{len(members)}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → {0..2,5}; a single number stands alone."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def _conclusion(found: Inspection) -> tuple[str, str]:
    """The last line and its style; what was not looked at is not called clean."""
    errors = sum(oddity.severity == "error" for oddity in found.oddities)
    warnings = len(found.oddities) - errors
    if found.values is None:
        looked = "values were not looked at (--quick)"
    elif found.values.bad:
        looked = f"of {found.values.tensors} tensors read, {len(found.values.bad)} are not all finite"
    else:
        looked = f"every value of {found.values.tensors} tensors is finite"
    if found.values is not None and found.values.unread:
        looked += f", {found.values.unread} could not be read"
    return f"{errors} errors, {warnings} warnings; {looked}", "bold red" if errors else "bold"

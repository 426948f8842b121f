"""`gptoss-convert compare`: the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli.output import emit, human_bytes, progress
from gptoss_convert.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

WORST = 8
LARGE = 1e7  # figures from here on are shown by a few digits
NAMED = 5  # tensors that are named for holding what is not finite


@click.command()
@click.argument("artifact")
@click.argument("src")
@click.option(
    "--text", metavar="TEXT", help='TEXT.txt, CONVERSATIONS.jsonl or "default"; without it only weights are compared.'
)
@click.option("--context", type=click.IntRange(4, 1 << 17), default=512, help="Tokens of a sequence.")
@click.option("--tokens", type=click.IntRange(4), default=16384, help="Tokens at most.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads; 0: one a core.")
@click.option(
    "--fail-above", "gates", multiple=True, metavar="METRIC=LIMIT", help="Exit 11 where a figure is larger: kld=0.02."
)
@click.option("--report", type=click.Path(path_type=Path), help="Write a page with everything: OUT.html.")
@click.option("--overwrite", is_flag=True, help="Replace the report if it exists.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder with tokenizer and template, if SRC has none."
)
@click.option("--gate-proj", type=click.Choice(["deinterleaved", "halves"]), help="What gate_proj means in SRC.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    artifact: str,
    src: str,
    text: str | None,
    context: int,
    tokens: int,
    device: str,
    threads: int,
    gates: tuple[str, ...],
    report: Path | None,
    overwrite: bool,
    tokenizer: Path | None,
    gate_proj: str | None,
    as_json: bool,
) -> None:
    """Tell how far ARTIFACT is from SRC, the checkpoint that it was made of.

    Every tensor is compared; with --text both models read it, and what they say next is compared too: KL divergence, the
    agreement of their likeliest tokens, both perplexities. Metrics for --fail-above: kld, kld_median, kld_p99, kld_max,
    top1_disagreement, perplexity_ratio, tensor_rms, expert_error. A figure that is not finite keeps no limit.
    """
    from gptoss_convert.convert.calibration import require_torch
    from gptoss_convert.convert.compare_gates import judge, parse_gate, require_measured
    from gptoss_convert.convert.protect import files_given, files_read, protect_inputs, require_place
    from gptoss_convert.convert.resolve import resolve_source
    from gptoss_convert.convert.source import open_source
    from gptoss_convert.convert.texts import DEFAULT, read_texts

    limits = [parse_gate(gate) for gate in gates]
    require_measured(limits, text=text is not None)
    if report is not None:
        given = [Path(path) for path in (artifact, src, text) if path and path != DEFAULT]
        protect_inputs(report, files_given(*given, tokenizer))
        require_place(report, overwrite=overwrite)
    require_torch()
    from gptoss_convert.convert.compare import compare
    from gptoss_convert.convert.workers import cores

    with (
        open_source(resolve_source(src, progress), gate_proj=gate_proj, tokenizer=tokenizer) as source,
        open_source(resolve_source(artifact, progress)) as made,
    ):
        if report is not None:
            protect_inputs(report, files_read(source, made))
        for side in (source, made):
            side.require_sound()
        texts = read_texts(text, source, context, tokens) if text is not None else None
        document = compare(
            source, made, texts, device=device, threads=threads or cores(), context=context, show=progress
        )
        for side in (source, made):
            side.check_unchanged()
    kept = judge(document, limits)
    emit(document, as_json, lambda console: _show(console, document))
    if report is not None:
        _write(report, document, overwrite)
    if not kept:
        raise _missed(document, artifact, src)


def _missed(document: dict[str, Any], artifact: str, src: str) -> Exception:
    from gptoss_convert.convert.compare_gates import remedy
    from gptoss_convert.errors import ProofFailed

    failed = next(gate for gate in document["gates"] if not gate["passed"])
    return ProofFailed(
        "the artifact misses a quality gate", file=artifact, found=f"{failed['metric']} {_figure(failed['found'])}",
        expected=f"at most {failed['limit']:g}", remedy=remedy(document, failed, artifact, src),
    )  # fmt: skip


def _write(report: Path, document: dict[str, Any], overwrite: bool) -> None:
    from gptoss_convert.convert.compare_report import render
    from gptoss_convert.convert.protect import require_place
    from gptoss_convert.formats.output import write_atomically

    require_place(report, overwrite=overwrite)  # again: the work has taken its time
    write_atomically(report.absolute(), render(document).encode())


def _figure(value: float | None, form: str = ".6g", factor: float = 1, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    value *= factor
    return format(value, form if abs(value) < LARGE else ".4g") + unit


def _with_error(value: float | None, se: float | None, form: str, factor: float = 1, unit: str = "") -> str:
    """`value ± standard error`; of a single token there is no error, of what is not finite none that means anything."""
    shown = _figure(value, form, factor, unit)
    if value is None or not math.isfinite(value):
        return shown
    return f"{shown} ± {'unknown' if se is None else _figure(se, form, factor)}"


def _show(console: Console, document: dict[str, Any]) -> None:
    source, artifact = document["source"], document["artifact"]
    console.print(
        f"source    {printable(source['name'])}, {source['layout']}, {human_bytes(source['bytes'])}", markup=False
    )
    console.print(
        f"artifact  {printable(artifact['name'])}, {artifact['layout']}, {human_bytes(artifact['bytes'])}", markup=False
    )
    for note in artifact["notes"]:
        console.print(f"note      {printable(note)}", markup=False)
    for side in ("source", "artifact"):
        _show_not_finite(console, document, side)
    if document["text"]:
        _show_text(console, document["text"])
    _show_tensors(console, document["tensors"])
    for gate in document["gates"]:
        verdict = "kept" if gate["passed"] else "MISSED"
        console.print(f"gate      {gate['metric']} ≤ {gate['limit']:g}: {_figure(gate['found'])}, {verdict}")


def _show_not_finite(console: Console, document: dict[str, Any], side: str) -> None:
    odd = [t for t in document["tensors"] if t["not_finite"] and t["not_finite"][side]]
    if not odd:
        return
    console.print(
        f"not finite: the {side} holds values that are NaN or infinite; no figure is worth anything, no gate is kept:",
        style="bold red",
    )
    for tensor in odd[:NAMED]:
        found = tensor["not_finite"]
        where = f"expert {found['expert']}, row {found['row']}, column {found['column']}"
        console.print(f"          {tensor['name']}: {found[side]:,} of them, the first at {where}", markup=False)
    if len(odd) > NAMED:
        console.print(f"          and {len(odd) - NAMED} tensors more; --json lists them all")


def _show_text(console: Console, found: dict[str, Any]) -> None:
    kld, top, perplexity = found["kld"], found["top1"], found["perplexity"]
    console.print(
        f"text      {printable(found['name'])}, {found['scored']:,} of {found['tokens']:,} tokens scored", markup=False
    )
    console.print(
        f"KL        mean {_with_error(kld['mean'], kld['se'], '.6f')}, median {_figure(kld['median'], '.6f')}, "
        f"99 % {_figure(kld['p99'], '.5f')}, largest {_figure(kld['max'], '.4f')}"
    )
    console.print(f"top-1     {_with_error(top['agreement'], top['se'], '.2f', 100, ' %')} the same token first")
    mine, theirs, ratio = (
        _with_error(perplexity[key]["value"], perplexity[key]["se"], form)
        for key, form in (("source", ".4f"), ("artifact", ".4f"), ("ratio", ".5f"))
    )
    console.print(f"perplexity {mine} → {theirs}, ratio {ratio}")


def _show_tensors(console: Console, tensors: list[dict[str, Any]]) -> None:
    from rich.table import Table

    equal = sum(tensor["equal"] for tensor in tensors)
    console.print(f"tensors   {equal} of {len(tensors)} hold the same values; the farthest:")
    table = Table("tensor", "from", "to", "relative RMS", "worst block", box=None, header_style="bold")

    def far(tensor: dict[str, Any]) -> tuple[bool, float]:
        finite = math.isfinite(tensor["relative_rms"])
        return finite, -tensor["relative_rms"] if finite else 0.0

    for tensor in sorted(tensors, key=far)[:WORST]:
        worst = tensor["not_finite"] or tensor["worst"]
        table.add_row(
            tensor["name"],
            tensor["source_encoding"],
            tensor["artifact_encoding"],
            _figure(tensor["relative_rms"], ".5f"),
            f"expert {worst['expert']}, row {worst['row']}, column {worst['column']}" if worst else "",
        )
    console.print(table)

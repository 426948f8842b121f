"""`gptoss-convert compare`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli.output import emit, human_bytes, progress

if TYPE_CHECKING:
    from rich.console import Console

WORST = 8


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
    tokenizer: Path | None,
    gate_proj: str | None,
    as_json: bool,
) -> None:
    """Tell how far ARTIFACT is from SRC, the checkpoint that it was made of.

    Every tensor is compared; with --text both models read it, and what they say next is compared too: KL divergence, the
    agreement of their likeliest tokens, both perplexities. Metrics for --fail-above: kld, kld_median, kld_p99, kld_max,
    top1_disagreement, perplexity_ratio, tensor_rms, expert_error.
    """
    from gptoss_convert.convert.calibration import require_torch

    require_torch()
    from gptoss_convert.convert import compare as comparing
    from gptoss_convert.convert.compare_report import render
    from gptoss_convert.convert.resolve import resolve_source
    from gptoss_convert.convert.source import open_source
    from gptoss_convert.convert.texts import read_texts
    from gptoss_convert.convert.workers import cores
    from gptoss_convert.errors import ProofFailed
    from gptoss_convert.formats.output import write_atomically

    limits = [comparing.parse_gate(gate) for gate in gates]
    with (
        open_source(resolve_source(src, progress), gate_proj=gate_proj, tokenizer=tokenizer) as source,
        open_source(resolve_source(artifact, progress)) as made,
    ):
        for side in (source, made):
            side.require_sound()
        texts = read_texts(text, source, context, tokens) if text is not None else None
        document = comparing.compare(
            source, made, texts, device=device, threads=threads or cores(), context=context, show=progress
        )
        for side in (source, made):
            side.check_unchanged()
    kept = comparing.judge(document, limits)
    if report is not None:
        write_atomically(report.absolute(), render(document).encode())
    emit(document, as_json, lambda console: _show(console, document))
    if not kept:
        failed = next(gate for gate in document["gates"] if not gate["passed"])
        raise ProofFailed(
            "the artifact misses a quality gate", file=artifact, found=f"{failed['metric']} {failed['found']:.6g}",
            expected=f"at most {failed['limit']:g}", remedy="choose a larger type, or --method gptq",
        )  # fmt: skip


def _show(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    source, artifact = document["source"], document["artifact"]
    console.print(f"source    {source['name']}, {source['layout']}, {human_bytes(source['bytes'])}", markup=False)
    console.print(f"artifact  {artifact['name']}, {artifact['layout']}, {human_bytes(artifact['bytes'])}", markup=False)
    if found := document["text"]:
        kld, top, perplexity = found["kld"], found["top1"], found["perplexity"]
        console.print(
            f"text      {found['name']}, {found['scored']:,} of {found['tokens']:,} tokens scored", markup=False
        )
        console.print(
            f"KL        mean {kld['mean']:.6f} ± {kld['se']:.6f}, median {kld['median']:.6f}, 99 % {kld['p99']:.5f}, "
            f"largest {kld['max']:.4f}"
        )
        console.print(f"top-1     {100 * top['agreement']:.2f} % ± {100 * top['se']:.2f} the same token first")
        sides = (f"{perplexity[side]['value']:.4f} ± {perplexity[side]['se']:.4f}" for side in ("source", "artifact"))
        console.print(
            f"perplexity {' → '.join(sides)}, ratio {perplexity['ratio']['value']:.5f} ± {perplexity['ratio']['se']:.5f}"
        )
    equal = sum(tensor["equal"] for tensor in document["tensors"])
    console.print(f"tensors   {equal} of {len(document['tensors'])} hold the same values; the farthest:")
    table = Table("tensor", "from", "to", "relative RMS", "worst block", box=None, header_style="bold")
    for tensor in sorted(document["tensors"], key=lambda t: -t["relative_rms"])[:WORST]:
        worst = tensor["worst"]
        where = "" if worst is None else f"expert {worst['expert']}, row {worst['row']}, column {worst['column']}"
        table.add_row(
            tensor["name"],
            tensor["source_encoding"],
            tensor["artifact_encoding"],
            f"{tensor['relative_rms']:.5f}",
            where,
        )
    console.print(table)
    for gate in document["gates"]:
        verdict = "kept" if gate["passed"] else "MISSED"
        console.print(f"gate      {gate['metric']} ≤ {gate['limit']:g}: {gate['found']:.6g}, {verdict}")

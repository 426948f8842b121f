"""`gptoss-convert calibrate`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli.output import emit, progress

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--text",
    default="default",
    metavar="TEXT",
    help='TEXT.txt, CONVERSATIONS.jsonl, or "default", the set that comes along.',
)
@click.option("--context", type=click.IntRange(2, 1 << 17), default=2048, help="Tokens of a sequence.")
@click.option("--tokens", type=click.IntRange(2), default=131072, help="Tokens at most.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads; 0: one a core.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder with tokenizer and template, if SRC has none."
)
@click.option("--gate-proj", type=click.Choice(["deinterleaved", "halves"]), help="What gate_proj means in SRC.")
@click.option(
    "--hessians",
    type=click.Path(path_type=Path),
    help="Also write every matrix's full Hessian into this folder, a file a layer (20b: 27 GB).",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    src: str,
    out: Path,
    text: str,
    context: int,
    tokens: int,
    device: str,
    threads: int,
    tokenizer: Path | None,
    gate_proj: str | None,
    hessians: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run text through SRC and write OUT.gguf: how large every input of every expert's matrices is on average.

    OUT is what convert --method importance --calibration takes, and an imatrix that llama-quantize takes. Experts that the text
    rarely reaches lean on the layer's other tokens, as far as they are short of their own. A run that was killed is taken up by
    running the same command again.
    """
    from gptoss_convert.convert.calibration import require_torch
    from gptoss_convert.convert.resolve import resolve_source
    from gptoss_convert.errors import UsageError

    if out.suffix != ".gguf":
        raise UsageError("a statistics file's name ends in .gguf", found=out.name, remedy=f"name it {out.name}.gguf")
    require_torch()
    from gptoss_convert.convert.calibrate import calibrate
    from gptoss_convert.convert.texts import DEFAULT, read_texts

    statistics, config = calibrate(
        resolve_source(src, progress),
        out,
        lambda source: read_texts(text, source, context, tokens),
        context=context,
        device=device,
        threads=threads,
        hessians=hessians,
        overwrite=overwrite,
        gate_proj=gate_proj,
        tokenizer=tokenizer,
        reads=[] if text == DEFAULT else [Path(text)],
        show=progress,
    )
    document = {
        "target": str(out),
        "hessians": hessians and str(hessians),
        "facts": statistics.facts,
        "coverage": statistics.coverage(config),
    }
    emit(document, as_json, lambda console: _show(console, document))


def _show(console: Console, document: dict[str, Any]) -> None:
    facts, found = document["facts"], document["coverage"]
    console.print(f"written   {document['target']}", markup=False)
    if document["hessians"]:
        console.print(f"hessians  {document['hessians']}", markup=False)
    console.print(
        f"text      {facts['text']}, {found['tokens']:,} tokens, digest {facts['text_digest'][:16]}", markup=False
    )
    console.print(
        f"experts   {found['experts']}, each wants {found['needed']:,} tokens of its own: {found['short']} are short, "
        f"{found['unseen']} saw none; least {found['least']:,}, median {found['median']:,.0f}"
    )
    if found["short"]:
        more = found["more_tokens_for_nine_in_ten"]
        amount = "unknown" if more is None else f"about {more:,}"
        console.print(f"          more text of this kind until nine in ten have enough: {amount} tokens")

"""`gptoss-convert convert`: the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli.output import emit, human_bytes, progress

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss_convert.convert.conversion import Outcome


_DENSE = click.Choice(["auto", "f32", "int8", "int4"])


class Size(click.ParamType[int]):
    """A number of bytes with a decimal (4GB) or binary (4GiB) unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text → bytes."""
        from gptoss_convert.convert.sizes import parse_size

        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Widen(click.ParamType[str]):
    """How wide the model becomes."""

    name = "auto|none|cut|WIDTHxWIDTH"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        if not re.fullmatch(r"auto|none|cut|\d{1,7}x\d{1,7}", str(value)):
            self.fail(f"{str(value)[:40]!r} is none of auto, none, cut, or widths such as 3072x2880", param, ctx)
        return str(value)


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["gguf", "hf", "original", "bf16", "int4", "int8", "int8-g32", "onnx"]),
    help="What to write. int4, int8 and int8-g32: integers for vLLM, see the README.md that lies in the output. onnx: a folder "
    "for ONNX Runtime and onnxruntime-genai.",
)
@click.option(
    "--experts",
    default="auto",
    type=click.Choice(["auto", "mxfp4", "q8_0", "q5_0", "bf16", "f16", "f32", "int8", "int4"]),
    help="Codec of the experts. GGUF: auto keeps the source's. ONNX: mxfp4, int8 (exact from MXFP4), int4.",
)
@click.option(
    "--dense",
    default="auto",
    type=click.Choice(["auto", "bf16", "f16", "f32", "q8_0", "int8", "int4"]),
    help="Codec of embedding, head and attention. GGUF: auto keeps the source's. ONNX: f32, int8, int4, not of the embedding.",
)
@click.option("--embedding", default="auto", type=_DENSE, help="ONNX: the embedding apart; auto is f32.")
@click.option("--router", default="auto", type=_DENSE, help="ONNX: the routers apart; auto is as --dense.")
@click.option("--head", default="auto", type=_DENSE, help="ONNX: the head apart; auto is as --dense.")
@click.option("--onnx-runtime", metavar="VERSION", help="ONNX: the oldest runtime that must load it, 1.24 to 1.32.")
@click.option("--type", metavar="NAME", help="GGUF: a type by its known name: mxfp4, q3_k_m, q2_k, iq2_xs …")
@click.option("--recipe", type=click.Path(path_type=Path), help="GGUF: your own choice of codecs, a TOML file.")
@click.option(
    "--widen",
    default="auto",
    type=Widen(),
    help="GGUF: auto widens the model by zeros where the type's blocks of 256 do not divide its rows; none refuses; cut drops "
    "neurons instead (lossy); 3072x2880 asks for these widths of the model and of its experts.",
)
@click.option(
    "--allow-larger", is_flag=True, help="GGUF: write a type that is larger than the source without being better."
)
@click.option(
    "--base", metavar="RELEASE", help="The release that SRC is a fine-tune of: unchanged blocks keep its bytes."
)
@click.option("--split-size", type=Size(), help="Divide the output into files of at most this much tensor data: 4GB.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads; 0: one a core.")
@click.option("--name", help="GGUF: general.name, such as my-org/my-finetune-20B. ONNX: the name in Foundry Local.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder with tokenizer and template, if SRC has none."
)
@click.option("--gate-proj", type=click.Choice(["deinterleaved", "halves"]), help="What gate_proj means in SRC.")
@click.option("--dry-run", is_flag=True, help="Print the plan: sizes, memory, every tensor's fate. Writes nothing.")
@click.option("--no-proof", is_flag=True, help="Do not read the output back and compare it with the source.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--method",
    default="round",
    type=click.Choice(["round", "importance", "gptq"]),
    help="How values are rounded: each alone, by how much its column matters, or column after column (GPTQ).",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help='For the last two: TEXT.txt, CONVERSATIONS.jsonl, "default", or what calibrate made: STATS.gguf, HESSIANS.',
)
@click.option("--device", default="cpu", help="Where calibration computes: cpu, cuda.")
@click.option("--context", type=click.IntRange(2, 1 << 17), default=2048, help="Tokens of a calibration sequence.")
@click.option("--tokens", type=click.IntRange(2), default=131072, help="Calibration tokens at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    src: str,
    out: Path,
    base: str | None,
    split_size: int | None,
    dry_run: bool,
    no_proof: bool,
    method: str,
    calibration: str | None,
    device: str,
    context: int,
    tokens: int,
    as_json: bool,
    **others: Any,
) -> None:
    """Convert SRC into OUT, and prove that OUT computes what SRC computes.

    SRC is a folder, a file, a hub snapshot, or OWNER/NAME@COMMIT, which is fetched and verified first.

    A certificate is written beside OUT. OUT appears when it is complete and proved, never before; a run that was killed is
    taken up by running the same command again.
    """
    from gptoss_convert.convert import conversion
    from gptoss_convert.convert.calibration import Wish
    from gptoss_convert.convert.resolve import resolve_source

    path = resolve_source(src, progress)
    options = conversion.Options(
        base=resolve_source(base, progress) if base else None,
        split_bytes=split_size,
        proof=not no_proof,
        rounding=Wish(method, calibration, device, context, tokens),
        **others,  # options that are called the same there
    )
    if dry_run:
        from gptoss_convert.convert.dry_run import foresee

        forecast = foresee(path, out, options)
        emit(forecast, as_json, lambda console: _show_plan(console, forecast))
        return

    outcome = conversion.convert(path, out, options, progress)
    emit(_result(outcome), as_json, lambda console: _show_outcome(console, outcome))


def _result(outcome: Outcome) -> dict[str, Any]:
    return {"target": str(outcome.target), "bytes": outcome.plan.output_bytes, "certificate": outcome.document}


def _show_plan(console: Console, forecast: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("source tensor", "from", "output tensor", "codec", "bytes", "fate", box=None, header_style="bold")
    for row in forecast["tensors"]:
        table.add_row(row["source"], row["from"], row["tensor"], row["codec"], f"{row['bytes']:,}", row["fate"])
    console.print(table, markup=False)
    for file in forecast["files"]:
        console.print(f"{file['size']:>16,}  {file['name']}", markup=False)
    console.print(f"{forecast['output_bytes']:>16,}  bytes in all ({human_bytes(forecast['output_bytes'])})")
    console.print(f"peak memory at most {human_bytes(forecast['peak_memory_bytes'])}, {forecast['threads']} threads")
    for note in [*forecast["source"]["notes"], *forecast["source"]["losses"], *forecast["notes"]]:
        console.print(f"note: {note}", markup=False)
    for loss in forecast["losses"]:
        console.print(f"lost: {loss}", markup=False)


def _base_lines(blocks: dict[str, int]) -> list[str]:
    """What --base did, block by block."""
    return [
        f"base     of {blocks['blocks']:,} blocks the fine-tune left {blocks['unchanged']:,} unchanged: "
        "all of them keep the release's bytes",
        f"         {blocks['changed']:,} it changed: {blocks['changed_and_exact']:,} are held exactly, "
        f"{blocks['changed_and_rounded_to_the_release']:,} round to the release's values and take its bytes, "
        f"{blocks['changed_and_rounded_elsewhere']:,} round to others",
    ]


def _rounding_lines(rounding: dict[str, Any], calibration: dict[str, Any]) -> list[str]:
    """What calibrated rounding did, and how far its text went."""
    coverage = rounding["coverage"]
    lines = [
        f"rounded  by {calibration['method']}, {calibration.get('tokens', '?')} tokens of {calibration.get('text', '?')}",
        f"         {coverage['experts']} experts want {coverage['tokens_wanted']:,} tokens of their own: {coverage['short']} are "
        f"short, {coverage['unseen']} saw none; least {coverage['least']:,}",
    ]
    if lost := rounding.get("output_energy_lost"):
        matrices = ", ".join(f"{count} {name}" for name, count in rounding["matrices"].items())
        worst = max(lost, key=lost.get)
        lines.append(
            f"         {matrices}; of outputs' energy lost {100 * sum(lost.values()) / len(lost):.3g} %, most in {worst}"
        )
    if damping := rounding.get("damping"):
        raised = damping["raised_after_a_failure"]
        lines.append(
            f"         damping {damping['least']:.3g} to {damping['most']:.3g} of the mean diagonal"
            + (f", raised for {raised} matrices that could not be factorised with less" if raised else "")
        )
    return lines


def _show_outcome(console: Console, outcome: Outcome) -> None:
    document, proof = outcome.document, outcome.proof
    console.print(f"written  {outcome.target} ({human_bytes(outcome.plan.output_bytes)})", markup=False)
    source = document["source"]
    what = "weights, configuration, tokenizer and template are the official ones"
    if not source["official"]:
        weights = "official weights" if source["official_weights"] else "weights without an official digest"
        small = [n for n in ("config", "tokenizer", "template") if source[n] and not source[n]["official"]]
        what = weights + (f"; not official: {', '.join(small)}" if small else "")
    console.print(f"source   {source['layout']}, {source['model'] or 'own widths'}: {what}", markup=False)
    for note in [*source["notes"], *document["artifact"]["notes"]]:
        console.print(f"note     {note}", markup=False)
    if proof is None:
        console.print("proof    not made (--no-proof)")
        return
    experts = sum(len(layer.expert_errors) for layer in proof.layers)
    console.print(
        f"proof    {len(proof.tensors)} tensors: {proof.count('byte-equal')} byte-equal, "
        f"{proof.count('value-equal')} value-equal, {proof.count('different')} rounded"
    )
    console.print(f"         {experts} experts compute the same on probes: largest difference {proof.worst_output:.2g}")
    if proof.unchecked:
        console.print(f"         no second decoder was at hand for: {', '.join(proof.unchecked)}")
    if base := document.get("base"):
        for line in _base_lines(base["blocks"]):
            console.print(line)
    if rounding := document.get("rounding"):
        for line in _rounding_lines(rounding, document["options"]["calibration"]):
            console.print(line, markup=False)
    for line in document["lost"]:
        console.print(f"lost     {line}", markup=False)
    if not document["lost"]:
        console.print("lost     nothing", style="green")

"""`gptoss-convert plan`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_convert.cli.output import emit, human_bytes, progress

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss_convert.convert.forecast import Forecast


@click.command()
@click.argument("src")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder with tokenizer and template, if SRC has none."
)
@click.option("--fits", metavar="SIZE", help="Only types whose file is at most this large: 12GB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(src: str, tokenizer: Path | None, fits: str | None, as_json: bool) -> None:
    """Forecast the size of SRC as each type of GGUF, to the byte, from headers alone.

    "widened" types have blocks of 256, which gpt-oss's rows do not divide into: the model is widened by zeros, computes the same
    function, and needs no special runtime. Types that make no sense for SRC, or cannot be made of it, are listed with the reason.
    """
    from gptoss_convert.cli.convert import Size
    from gptoss_convert.convert.forecast import Forecaster
    from gptoss_convert.convert.resolve import resolve_source
    from gptoss_convert.convert.source import open_source

    limit = Size().convert(fits, None, None) if fits else None
    with open_source(resolve_source(src, progress), tokenizer=tokenizer) as source:
        source.require_sound()
        forecaster = Forecaster(source)
        rows = [f for f in forecaster.every_type() if limit is None or (f.bytes is not None and f.bytes <= limit)]
        lossless = forecaster.lossless_bytes
        parameters = source.config.parameters
    document = {"lossless_bytes": lossless, "parameters": parameters, "types": [row.as_dict() for row in rows]}
    emit(document, as_json, lambda console: _show(console, rows, lossless))


def _show(console: Console, rows: list[Forecast], lossless: int | None) -> None:
    from rich.table import Table

    table = Table("type", "bytes", "", "bits a weight", "experts", "", box=None, header_style="bold")
    for row in rows:
        if row.bytes is None:
            table.add_row(row.type, "", "", "", "", f"impossible: {row.impossible}", style="dim")
            continue
        wide = f"widened to {row.widened.hidden}/{row.widened.intermediate}" if row.widened else ""
        remark = f"no: {row.senseless}" if row.senseless else wide
        table.add_row(
            row.type, f"{row.bytes:,}", human_bytes(row.bytes), f"{row.bits:.3f}", f"{row.expert_bits:.3f}", remark,
            style="dim" if row.senseless else None,
        )  # fmt: skip
    console.print(table)
    if lossless is not None:
        console.print(f"lossless (experts MXFP4 as they are, the rest bf16): {lossless:,} bytes")

"""`gptoss-convert verify`: every file's digest against the official ones, a list or a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptoss_convert.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss_convert.convert.verify_report import FileResult, Report

EVERY_BYTE = "every byte agrees"  # what goes without saying beside "verified"
STYLES = {"verified": "green", "mismatched": "bold red", "missing": "bold red", "unknown": "yellow"}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--repo", metavar="ID", help='Take SOURCE for this repository; "none" if it only resembles a pinned one.')
@click.option("--manifest", type=_FILE, help="A manifest or certificate of gptoss-convert that you trust.")
@click.option("--sums", type=_FILE, help="A SHA256SUMS file that you trust.")
@click.option("--official", is_flag=True, help="Only official digests verify; other lists leave a file unknown.")
@click.option("--quick", is_flag=True, help="Sizes and headers only: finds wrong files at once, verifies none.")
@click.option("--allow-unknown", metavar="PATTERN", multiple=True, help="Unknown files that may be there; repeatable.")
@click.option("--write-manifest", type=click.Path(dir_okay=False, path_type=Path), help="Note all digests there.")
@click.option("--threads", type=click.IntRange(1, 256), help="Files hashed at once (default: processors, at most 8).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    *,
    source: Path,
    repo: str | None,
    manifest: Path | None,
    sums: Path | None,
    official: bool,
    quick: bool,
    allow_unknown: tuple[str, ...],
    write_manifest: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say of every file of SOURCE whether it is verified, mismatched, missing or unknown, and on whose word.

    SOURCE is a folder, a file, or a snapshot in the hub's cache. No network is used.

    Exit codes: 0 all verified, 4 something mismatched or missing, 5 something unknown, or nothing verified.
    """
    from gptoss_convert.cli.output import emit, progress
    from gptoss_convert.convert import verify as engine
    from gptoss_convert.formats.tree import source_root, walk

    total = sum(file.size for file in walk(source_root(source)))
    with progress("verifying", total) as advance:
        report = engine.verify(
            source,
            repo=repo,
            manifest=manifest,
            sums=sums,
            require_official=official,
            quick=quick,
            threads=threads or engine.DEFAULT_THREADS,
            progress=advance,
        )
    code = report.exit_code(allow_unknown)
    if as_json and write_manifest is not None:  # before the report: if this fails, its error is the one document
        engine.write_manifest(report, write_manifest)
    emit(report.as_dict(allow_unknown), as_json, lambda console: render(report, console))
    if not as_json and write_manifest is not None:
        engine.write_manifest(report, write_manifest)
    raise SystemExit(int(code))


def render(report: Report, console: Console) -> None:
    """The report for people: a line per file, what is odd about it below, then the answer."""
    from rich.text import Text

    width = max((len(printable(result.name)) for result in report.results), default=0)
    for result in report.results:
        status = result.status.value
        console.print(Text(f"{status:<10}", STYLES[status]), _line(result, width), soft_wrap=True)
        if status != "verified" or result.reason != EVERY_BYTE:
            console.print(Text(f"{'':<10} {printable(result.reason)}", "dim"), soft_wrap=True)
        if status == "mismatched" and result.expected:
            compared = f"{'':<10} expected {printable(result.expected)}, found {printable(result.found or '-')}"
            console.print(Text(compared, "dim"), soft_wrap=True)
    console.print()
    for line in _summary(report):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"official? {report.answer}", "bold"), soft_wrap=True)


def _line(result: FileResult, width: int) -> str:
    """Size, name and authority of one file."""
    from gptoss_convert.cli.output import human_bytes

    size = "-" if result.size is None else human_bytes(result.size)
    word = printable(result.authority or "")
    if result.grade:
        word += f" (evidence {result.grade})"
    if result.algorithm not in (None, "sha256"):
        word += f" ({result.algorithm})"
    return f"{size:>9}  {printable(result.name):<{width}}  {word}".rstrip()


def _summary(report: Report) -> list[str]:
    """Layouts, lists, notes and counts, a line each."""
    lines = [
        f"{layout.title}: {layout.state}{': ' + ', '.join(layout.absent) + ' absent' if layout.absent else ''}"
        for layout in report.layouts
    ]
    lines += [f"{record['title']} {printable(str(record['path']))}: {record['trust']}" for record in report.records]
    lines += [printable(note) for note in report.notes]
    return [*lines, ", ".join(f"{count} {status}" for status, count in report.counts.items() if count)]

"""`gptoss-convert fetch`: download a pinned revision; no file appears before its digest was checked."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--revision", metavar="COMMIT", help="40 hex digits; default: the pinned commit of an official model.")
@click.option(
    "--layout",
    type=click.Choice(["hf", "original", "metal", "all"]),
    default="hf",
    show_default=True,
    help="Which files: hf is the repository's root.",
)
@click.option("--include", metavar="PATTERN", multiple=True, help="Further files by name pattern; repeatable.")
@click.option("--allow-moving", is_flag=True, help="Accept a branch or tag: resolved once, its commit is reported.")
@click.option("--repair", is_flag=True, help="Replace files of TARGET that have other contents.")
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Downloads at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    *,
    repo: str,
    target: Path,
    revision: str | None,
    layout: str,
    include: tuple[str, ...],
    allow_moving: bool,
    repair: bool,
    workers: int,
    as_json: bool,
) -> None:
    """Download a commit of OWNER/NAME into TARGET and verify it.

    Every file is hashed before it gets its name; a corrupt one is deleted and named. Running the same command again
    keeps what is complete and right. HF_ENDPOINT and the login of the hub's own client are used.

    Exit codes: 0 all verified, 4 mismatch, 5 something unknown, 6 network, 7 cannot write, 8 TARGET holds other files.
    """
    from gptoss_convert.cli.output import emit, progress
    from gptoss_convert.cli.verify import render
    from gptoss_convert.convert import fetch as engine

    ready = engine.plan(repo, target, revision=revision, layout=layout, include=include, allow_moving=allow_moving)
    with progress("fetching", ready.total_bytes) as advance:
        report = engine.run(ready, repair=repair, workers=workers, progress=advance)
    emit(report.as_dict(), as_json, lambda console: render(report, console))
    raise SystemExit(int(report.exit_code()))

"""The command line: verbs loaded when they are called, one handler for every error, distinct exit codes.

Each verb is a module of this package with a click command named `command`. Nothing heavy is imported before a verb runs,
so `gptoss-convert --help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback

import click

from gptoss_convert import __version__
from gptoss_convert.cli.output import expect_document, print_error
from gptoss_convert.errors import CannotWrite, ExitCode, GptOssError

VERBS = {
    "inspect": "what a folder or file is: layout, model, types, shapes, anything odd",
    "verify": "every file's SHA-256 against the official digests, a list or a manifest; offline",
    "fetch": "download a pinned revision, then verify every byte",
    "plan": "forecast: the size of every type of GGUF, to the byte, from headers alone",
    "calibrate": "one streamed pass of text → the statistics of every expert's inputs (an imatrix)",
    "convert": "source → GGUF, HF, original or bf16, proved equal to the source",
    "export": "artifact → a folder that one platform deploys as it stands",
    "run": "all of it from one recipe: fetch, verify, calibrate, convert, compare, export",
    "compare": "how far an artifact is from its source: per tensor, per expert, in KL divergence",
}


class Verbs(click.Group):
    """A click group whose commands are imported only when called; their one-line helps are known beforehand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"gptoss_convert.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs in `--help`, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gptoss-convert")
def cli() -> None:
    """Take OpenAI's gpt-oss weights from "downloaded" to "running where you need it": verified, converted, proved.

    Results are tables for people; --json gives one JSON document on stdout, everything else goes to stderr.
    Exit codes: 0 done, 2 usage, 3 bad input, 4 digest mismatch or missing file, 5 no digest known, 6 network,
    7 cannot write, 8 target exists, 9 input changed, 10 refused, 11 proof failed, 70 internal, 130 interrupted.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a verb and turn every outcome into a message and an exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = "--json" in arguments
    expect_document(lines=arguments[:1] == ["run"])
    _write_anything()
    try:
        cli.main(args=arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        _leave(stop.exit_code)
    except click.Abort:
        _interrupted(as_json)
    except KeyboardInterrupt:
        _interrupted(as_json)
    except click.ClickException as error:
        if as_json:
            print_error({"error": "UsageError", "exit_code": int(ExitCode.USAGE), "what": error.format_message()})
        error.show(file=sys.stderr)
        _leave(ExitCode.USAGE)
    except GptOssError as error:
        _report(error, as_json)
    except BrokenPipeError:
        # The reader of our output left (`| head`); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(ExitCode.CANNOT_WRITE)
    except OSError as error:
        _report(CannotWrite("the operating system refused", file=error.filename, found=error.strerror), as_json)
    except Exception as error:
        traceback.print_exc()
        print("this is a mistake in gptoss-convert, not in your files; please report it", file=sys.stderr)
        if as_json:
            print_error({"error": "Internal", "exit_code": int(ExitCode.INTERNAL), "what": repr(error)})
        _leave(ExitCode.INTERNAL)


def _write_anything() -> None:
    """Let no character of a file's name end a command because the terminal cannot show it: it is shown escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: GptOssError, as_json: bool) -> None:
    if as_json:
        print_error(error.as_dict())
    print(f"error: {error}", file=sys.stderr)
    _leave(error.code)


def _interrupted(as_json: bool) -> None:
    what = "interrupted; run the same command again to go on"
    if as_json:
        print_error({"error": "Interrupted", "exit_code": int(ExitCode.INTERRUPTED), "what": what})
    print(what, file=sys.stderr)
    _leave(ExitCode.INTERRUPTED)


def _leave(code: int) -> None:
    sys.stdout.flush()
    raise SystemExit(int(code))

"""The errors of gptoss-convert and the exit code of each.

One small hierarchy, raised anywhere, handled once (in the command line). A message says, in this order, what happened,
where (file and tensor), what was found and what was expected, and what to do about it: a line each, control characters
escaped, because much of it comes from files.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command; part of its interface, never renumbered."""

    OK = 0
    USAGE = 2
    BAD_INPUT = 3
    MISMATCH = 4
    UNKNOWN = 5
    NETWORK = 6
    CANNOT_WRITE = 7
    TARGET_EXISTS = 8
    INPUT_CHANGED = 9
    REFUSED = 10
    PROOF_FAILED = 11
    INTERNAL = 70
    INTERRUPTED = 130


class GptOssError(Exception):
    """Base of every error that a user can cause or mend.

    what: one sentence; file, tensor: where; found, expected: the two sides of the comparison; remedy: what to do.
    """

    code: ExitCode = ExitCode.INTERNAL

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [printable(self.what)]
        for label in ("file", "tensor", "found", "expected", "remedy"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<10}{printable(value)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | int | None]:
        """The error as it appears in `--json` output."""
        return {
            "error": type(self).__name__,
            "exit_code": int(self.code),
            "what": self.what,
            "file": self.file,
            "tensor": self.tensor,
            "found": self.found,
            "expected": self.expected,
            "remedy": self.remedy,
        }


def printable(text: str, limit: int = 500) -> str:
    """Text from a file, made safe for a terminal: control and direction-override characters escaped, length bounded."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe if len(text) <= limit else safe + "…"


class UsageError(GptOssError):
    """The command line or the recipe asks for something that does not exist or does not fit together."""

    code = ExitCode.USAGE


class BadInput(GptOssError):
    """The source is malformed, hostile, corrupt or of a layout that is not read."""

    code = ExitCode.BAD_INPUT


class DigestMismatch(GptOssError):
    """A file is not the one that its digest promises, or a promised file is missing."""

    code = ExitCode.MISMATCH


class UnknownDigest(GptOssError):
    """A file for which no trusted digest exists: neither verified nor refuted."""

    code = ExitCode.UNKNOWN


class NetworkError(GptOssError):
    """A download failed, or the network is needed and not there."""

    code = ExitCode.NETWORK


class CannotWrite(GptOssError):
    """Disk full, read-only target, quota, or another failure to write."""

    code = ExitCode.CANNOT_WRITE


class TargetExists(GptOssError):
    """The output's name is taken, or another run is writing it."""

    code = ExitCode.TARGET_EXISTS


class InputChanged(GptOssError):
    """A source file changed between the first look at it and the last byte read."""

    code = ExitCode.INPUT_CHANGED


class Refused(GptOssError):
    """What is asked cannot be done without losing or inventing something; said instead of done silently."""

    code = ExitCode.REFUSED


class ProofFailed(GptOssError):
    """The written artifact does not compute what the source computes, or misses a quality gate."""

    code = ExitCode.PROOF_FAILED

"""The errors: distinct exit codes as documented, one form of message, nothing of a file reaches a terminal unescaped."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert import errors
from gptoss_convert.cli import cli, main
from gptoss_convert.errors import BadInput, ExitCode, GptOssError, UsageError, printable

# Part of the interface, and hence written out here a second time: scripts depend on these numbers.
CODES = {
    "OK": 0,
    "USAGE": 2,
    "BAD_INPUT": 3,
    "MISMATCH": 4,
    "UNKNOWN": 5,
    "NETWORK": 6,
    "CANNOT_WRITE": 7,
    "TARGET_EXISTS": 8,
    "INPUT_CHANGED": 9,
    "REFUSED": 10,
    "PROOF_FAILED": 11,
    "INTERNAL": 70,
    "INTERRUPTED": 130,
}
DOCUMENTED = {
    0: "done",
    2: "usage",
    3: "bad input",
    4: "digest mismatch or missing file",
    5: "no digest known",
    6: "network",
    7: "cannot write",
    8: "target exists",
    9: "input changed",
    10: "refused",
    11: "proof failed",
    70: "internal",
    130: "interrupted",
}
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GptOssError) and kind is not GptOssError
]
NASTY = "a\x1b[31m\nb\r\x00\u202e\u2028\x9b\ud800c"
ESCAPED = r"a\x1b[31m\nb\r\x00\u202e\u2028\x9b\ud800c"


def test_the_exit_codes_never_change() -> None:
    assert {code.name: int(code) for code in ExitCode} == CODES


def test_every_exit_code_is_documented_in_the_help() -> None:
    assert cli.help is not None
    listed = re.sub(r"\s+", " ", cli.help.partition("Exit codes:")[2]).strip().rstrip(".")
    found = {int(number): words for number, words in re.findall(r"(\d+) ([^,]+)", listed)}
    assert found == DOCUMENTED
    assert set(found) == set(ExitCode)


def test_every_kind_of_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes) == 10
    assert set(ExitCode) - set(codes) == {ExitCode.OK, ExitCode.INTERNAL, ExitCode.INTERRUPTED}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_command_leaves_with_the_code_of_the_error(
    kind: type[GptOssError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise kind("it went wrong", file="m.gguf", remedy="mend it")

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "m.gguf", "--json"])
    assert stop.value.code == int(kind.code)
    printed = capsys.readouterr()
    assert printed.err == "error: it went wrong\n  file:     m.gguf\n  remedy:   mend it\n"
    document = json.loads(printed.out)
    assert (document["error"], document["exit_code"], document["file"]) == (kind.__name__, int(kind.code), "m.gguf")


def test_a_message_says_what_where_found_expected_and_remedy_in_this_order() -> None:
    error = BadInput("it is odd", file="m.gguf", tensor="t.0", found=3, expected=(4, 5), remedy="mend it")
    assert str(error) == (
        "it is odd\n  file:     m.gguf\n  tensor:   t.0\n  found:    3\n  expected: (4, 5)\n  remedy:   mend it"
    )
    assert error.args == (str(error),)


def test_what_is_not_known_takes_no_line() -> None:
    assert str(UsageError("no such verb")) == "no such verb"
    assert str(UsageError("no such verb", found=0)) == "no such verb\n  found:    0"


def test_every_part_of_a_message_is_escaped_and_stays_on_its_line() -> None:
    error = BadInput(NASTY, file=NASTY, tensor=NASTY, found=NASTY, expected=NASTY, remedy=NASTY)
    labels = ["file:     ", "tensor:   ", "found:    ", "expected: ", "remedy:   "]
    assert str(error).split("\n") == [ESCAPED, *(f"  {label}{ESCAPED}" for label in labels)]
    assert str(error).encode()


def test_the_document_of_an_error_keeps_the_parts_as_they_are() -> None:
    document = BadInput("it is\nodd", file="a\tb", found=3).as_dict()
    assert document == {
        "error": "BadInput",
        "exit_code": 3,
        "what": "it is\nodd",
        "file": "a\tb",
        "tensor": None,
        "found": "3",
        "expected": None,
        "remedy": None,
    }
    assert json.dumps(BadInput(NASTY).as_dict(), ensure_ascii=True).isascii()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", ""), ("é 漢 \U0001f600 'x' \\n", "é 漢 \U0001f600 'x' \\n"), (NASTY, ESCAPED), ("\x7f\u200e", r"\x7f\u200e")],
)
def test_printable_escapes_what_a_terminal_would_obey_and_nothing_else(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_printable_shortens_long_text_and_says_so() -> None:
    assert printable("x" * 500) == "x" * 500
    assert printable("x" * 501) == "x" * 500 + "…"
    assert printable("abc", limit=2) == "ab…"


@given(st.text(alphabet=st.characters(), max_size=50))
def test_printable_is_printable_and_can_be_encoded(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text).encode().decode() == printable(text)

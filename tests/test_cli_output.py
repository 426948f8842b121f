"""What a command prints on stdout: JSON that every parser takes."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import pytest

from gptoss_convert.cli.output import emit, expect_document, strict


def refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_not_finite_is_null() -> None:
    found = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, 3: True}, "d": None, "e": "NaN"}
    assert strict(found) == {"a": [None, 1.5, [None, 2]], "b": {"c": None, 3: True}, "d": None, "e": "NaN"}


def test_a_document_is_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    expect_document()
    document: dict[str, Any] = {"nan": math.nan, "rows": [{"inf": math.inf}], "number": 0.25}
    emit(document, True, lambda _: None)
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {"nan": None, "rows": [{"inf": None}], "number": 0.25}
    assert math.isnan(document["nan"])

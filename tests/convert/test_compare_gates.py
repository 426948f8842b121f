"""Gates of `compare`: they hold by the document's figures, and what is no number holds none."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
from support.compare_document import document

from gptoss_convert.convert.compare_gates import (
    METRICS,
    OF_WEIGHTS,
    judge,
    largest,
    parse_gate,
    remedy,
    require_measured,
)
from gptoss_convert.errors import UsageError

Document = dict[str, Any]
SPOIL: dict[str, Callable[[Document, Any], None]] = {
    "kld": lambda d, v: d["text"]["kld"].update(mean=v),
    "kld_median": lambda d, v: d["text"]["kld"].update(median=v),
    "kld_p99": lambda d, v: d["text"]["kld"].update(p99=v),
    "kld_max": lambda d, v: d["text"]["kld"].update(max=v),
    "top1_disagreement": lambda d, v: d["text"]["top1"].update(agreement=v),
    "perplexity_ratio": lambda d, v: d["text"]["perplexity"]["ratio"].update(value=v),
    "expert_error": lambda d, v: d["experts"]["output_error"][1].__setitem__(3, v),
    "tensor_rms": lambda d, v: d["tensors"][7].update(relative_rms=v),
}


@pytest.fixture
def found() -> Document:
    return document() | {"gates": []}


@pytest.mark.parametrize(
    "text",
    ["kld", "kld=", "kld=x", "kld=-1", "speed=3", "=1", "kld=nan", "kld=inf", "kld=1e999", "tensor_rms=Infinity"],
)
def test_a_gate_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a gate"):
        parse_gate(text)


@pytest.mark.parametrize("metric", METRICS)
def test_a_gate_that_needs_a_text_is_refused_without_one(metric: str) -> None:
    require_measured([(metric, 1.0)], text=True)
    if metric in OF_WEIGHTS:
        require_measured([(metric, 1.0)], text=False)
    else:
        with pytest.raises(UsageError, match=f"the gate {metric} needs a text"):
            require_measured([("tensor_rms", 1.0), (metric, 1.0)], text=False)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, None, math.inf], ids=str)
def test_a_figure_that_is_not_finite_keeps_no_limit(metric: str, value: float | None, found: Document) -> None:
    assert judge(copy.deepcopy(found), [(metric, 1e300)])
    SPOIL[metric](found, -math.inf if metric == "top1_disagreement" and value == math.inf else value)
    assert not judge(found, [(metric, 1e300)])
    assert [gate["passed"] for gate in found["gates"]] == [False]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["source", "artifact"])
def test_a_weight_that_is_not_finite_keeps_no_limit_though_the_text_passed_it_by(
    metric: str, side: str, found: Document
) -> None:
    found["tensors"][3]["not_finite"] = {"source": 0, "artifact": 0, "expert": 0, "row": 0, "column": 0} | {side: 1}
    assert not judge(found, [(metric, 1e300)])
    assert math.isnan(found["gates"][0]["found"])


def test_an_expert_that_no_token_reached_is_not_judged(found: Document) -> None:
    assert found["experts"]["output_error"][0][1] is None
    assert judge(found, [("expert_error", 1.0)])


def test_the_largest_is_no_number_where_one_is_none_wherever_it_stands() -> None:
    assert [largest([]), largest([1.0, 3.0, 2.0])] == [0.0, 3.0]
    for values in ([math.nan, 1.0], [1.0, math.nan], [1.0, None, 2.0], [math.inf, math.nan]):
        assert math.isnan(largest(values))


def test_the_remedy_fits_the_miss(found: Document) -> None:
    gate = {"metric": "kld", "found": 0.3}
    assert remedy(found, gate, "ours", "theirs") == "choose a larger type, or --method gptq"
    found["artifact"]["method"] = "gptq"
    assert remedy(found, gate, "ours", "theirs") == "choose a larger type, or more or other calibration text"
    for number in (None, math.nan):
        assert "look at both with gptoss-convert inspect" in remedy(found, gate | {"found": number}, "ours", "theirs")
    found["tensors"][3]["not_finite"] = {"source": 0, "artifact": 2, "expert": 0, "row": 0, "column": 0}
    assert "gptoss-convert inspect ours" in remedy(found, gate | {"found": math.nan}, "ours", "theirs")
    found["tensors"][4]["not_finite"] = {"source": 1, "artifact": 0, "expert": 0, "row": 0, "column": 0}
    assert "gptoss-convert inspect theirs" in remedy(found, gate | {"found": math.nan}, "ours", "theirs")

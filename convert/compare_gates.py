"""The gates of `compare`: a figure of its document and the limit that it must keep.

What is no finite number keeps none; nor does anything where a weight is not finite, because the text may have passed it by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_convert.errors import UsageError

OF_WEIGHTS = ("tensor_rms",)  # the metrics that need no text
METRICS = (
    "kld", "kld_median", "kld_p99", "kld_max", "top1_disagreement", "perplexity_ratio", "expert_error", *OF_WEIGHTS,
)  # fmt: skip

Gate = tuple[str, float]


def parse_gate(text: str) -> Gate:
    """ "kld=0.02" → (metric, limit)."""
    metric, _, limit = text.partition("=")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if metric not in METRICS or not 0 <= value < math.inf:
        raise UsageError(
            "not a gate",
            found=text,
            expected=f"METRIC=LIMIT, LIMIT a finite number, METRIC one of {', '.join(METRICS)}",
        )
    return metric, value


def require_measured(gates: Iterable[Gate], *, text: bool) -> None:
    """UsageError for a gate on what will not be measured. text: whether there is one to read."""
    for metric, _ in gates:
        if not text and metric not in OF_WEIGHTS:
            raise UsageError(f"the gate {metric} needs a text", found="no --text", remedy="give --text")


def judge(document: dict[str, Any], gates: Sequence[Gate]) -> bool:
    """Measure the document by its gates, write the result into it; whether all are kept."""
    require_measured(gates, text=document["text"] is not None)
    spoilt = any(tensor["not_finite"] for tensor in document["tensors"])
    for metric, limit in gates:
        found = math.nan if spoilt else _metric(document, metric)
        document["gates"].append({"metric": metric, "limit": limit, "found": found, "passed": found <= limit})
    return all(gate["passed"] for gate in document["gates"])


def remedy(document: Mapping[str, Any], gate: Mapping[str, Any], artifact: str, source: str) -> str:
    """What to do about a missed gate. artifact, source: as the user calls them."""
    found = gate["found"]
    if found is None or not math.isfinite(found):
        odd = [
            path
            for side, path in (("source", source), ("artifact", artifact))
            if any((tensor["not_finite"] or {}).get(side) for tensor in document["tensors"])
        ]
        if odd:
            return f"gptoss-convert inspect {odd[0]} says what is not finite; mend or fetch it again"
        return (
            "every weight is finite, the figure is not: some value overflows; look at both with gptoss-convert inspect"
        )
    if document["artifact"]["method"] == "gptq":
        return "choose a larger type, or more or other calibration text"
    return "choose a larger type, or --method gptq"


def largest(values: Iterable[float | None]) -> float:
    """The largest, 0 of none; NaN if any is no number."""
    known = [math.nan if value is None else float(value) for value in values]
    return math.nan if any(map(math.isnan, known)) else max(known, default=0.0)


def _metric(document: Mapping[str, Any], metric: str) -> float:
    if metric == "tensor_rms":
        return largest(tensor["relative_rms"] for tensor in document["tensors"])
    if metric == "expert_error":
        experts = document["experts"]
        rows = zip(experts["output_error"], experts["tokens"], strict=True)
        return largest(error for errors, counts in rows for error, n in zip(errors, counts, strict=True) if n)
    text = document["text"]
    if metric == "top1_disagreement":
        return 1.0 - largest([text["top1"]["agreement"]])
    if metric == "perplexity_ratio":
        return largest([text["perplexity"]["ratio"]["value"]])
    return largest([text["kld"]["mean" if metric == "kld" else metric.removeprefix("kld_")]])

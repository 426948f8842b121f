"""The report's account of the tensors: what holds values that are not finite, what moved furthest, and all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_convert.convert.report_page import (
    NOT_FINITE,
    PARTS,
    finite,
    name,
    percent,
    section,
    size,
    sortable,
    table,
    text,
)

WORST = 20
NAMED = 10  # tensors that are named for what is not finite in them
Document = Mapping[str, Any]


def spoilt_sides(document: Document) -> list[str]:
    """Which of the two hold values that are not finite: "the source", "the artifact"."""
    odd = [tensor["not_finite"] for tensor in document["tensors"] if tensor["not_finite"]]
    return [f"the {side}" for side in ("source", "artifact") if any(found[side] for found in odd)]


def not_finite_list(document: Document) -> str:
    """The tensors with values that are not finite; nothing where there is none."""
    odd = [tensor for tensor in document["tensors"] if tensor["not_finite"]]
    if not odd:
        return ""
    rows = [
        f"<li>{name(t['name'])}: {t['not_finite']['source']:,} in the source, {t['not_finite']['artifact']:,} in the artifact, "
        f"the first at {_where(t)}</li>"
        for t in odd[:NAMED]
    ]
    more = f"<li>and {len(odd) - NAMED:,} tensors more</li>" if len(odd) > NAMED else ""
    said = '<p class="failed">Values that are NaN or infinite, with which no figure is worth anything and no limit is kept:</p>'
    return f'{said}<ul class="spoilt">{"".join(rows)}{more}</ul>'


def tensor_section(document: Document) -> str:
    """The tensors that moved furthest, what is not finite before all, and the list of all."""
    tensors = document["tensors"]
    changed = sorted(
        (t for t in tensors if not t["equal"] or t["not_finite"]), key=lambda t: (-weight(t["relative_rms"]), t["name"])
    )
    equal = sum(t["equal"] for t in tensors)
    heads = ("tensor", "encoding", "#error", "#in its worst block", "where that is")
    rows = [
        (
            f'<th scope="row" class="tensor">{name(t["name"])}</th>', _encodings(t), distance(t["relative_rms"]),
            percent(t["worst"]["relative_rms"] if t["worst"] else None), _where(t),
        )
        for t in changed[:WORST]
    ]  # fmt: skip
    worst = (
        f"<p>{equal:,} of {len(tensors):,} tensors hold the source’s values exactly. The {len(rows)} that moved furthest, by the "
        f"root of the mean square of the difference relative to the values:</p>{table(heads, rows, 'worst', 'Worst tensors')}"
        if rows
        else f"<p>All {len(tensors):,} tensors hold the source’s values exactly.</p>"
    )
    return section("tensors", "Tensors that moved furthest" if rows else "Tensors", worst + _all_tensors(tensors))


def weight(error: float | None) -> float:
    """An error to sort by: what is no number is the worst."""
    return error if finite(error) else math.inf


def distance(error: float | None) -> str:
    """A relative error for a cell of a table."""
    return percent(error) if finite(error) else f'<span class="failed">{NOT_FINITE}</span>'


def _error(tensor: Document) -> str:
    return "equal" if tensor["equal"] and not tensor["not_finite"] else distance(tensor["relative_rms"])


def _encodings(tensor: Document) -> str:
    before, after = text(tensor["source_encoding"]), text(tensor["artifact_encoding"])
    return before if before == after else f"{before} → {after}"


def _where(tensor: Document) -> str:
    worst, odd = tensor["worst"], tensor["not_finite"]
    if worst is None and not odd:
        return "–"
    expert = f"expert {(odd or worst)['expert']}, " if len(tensor["shape"]) > 2 else ""
    if odd:
        return f"{expert}row {odd['row']:,}, column {odd['column']:,}"
    return f"{expert}row {worst['row']:,}, columns {worst['column']:,}–{worst['column'] + worst['columns'] - 1:,}"


def _all_tensors(tensors: Sequence[Document]) -> str:
    heads = ("tensor", "part", "shape", "encoding", "#size", "#error")
    rows = [
        (
            f'<th scope="row" class="tensor">{name(t["name"])}</th>', text(PARTS.get(t["part"], t["part"])),
            " × ".join(text(n) for n in t["shape"]), _encodings(t), sortable(t["bytes"], size(t["bytes"])),
            sortable(t["relative_rms"], _error(t)),
        )
        for t in tensors
    ]  # fmt: skip
    return f"<details><summary>All {len(tensors):,} tensors</summary>{table(heads, rows, 'sortable', 'All tensors')}</details>"

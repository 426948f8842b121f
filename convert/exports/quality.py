"""Measured quality for a model card: what `compare --json` has printed, if it is of this very artifact."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.words import paragraph, table
from gptoss_convert.errors import BadInput, Refused, printable
from gptoss_convert.formats.files import SourceFile, read_json

SCHEMA = "gptoss-convert/compare/1"
_BLOCK = 16 << 20
_PARTS = {
    "gate_up": "experts, gate and up", "down": "experts, down", "attention": "attention", "embedding": "embedding",
    "head": "output head", "router": "router",
}  # fmt: skip


def quality_section(artifact: Artifact, path: Path) -> str:
    """Markdown for the card."""
    document = read_json(path)
    if document.get("schema") != SCHEMA:
        raise BadInput(
            "not a document of compare --json", file=path, found=document.get("schema"), expected=SCHEMA,
            remedy="gptoss-convert compare ARTIFACT SOURCE --text TEXT --json > quality.json",
        )  # fmt: skip
    try:
        _require_same(artifact, document["artifact"], path)
        return _section(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput("a document of compare --json lacks something", file=path, found=repr(error)[:120]) from error


def _require_same(artifact: Artifact, side: Mapping[str, Any], path: Path) -> None:
    """The document's artifact must be this one: by SHA-256 of its weights, or by name and size where it has no digests."""
    measured = side.get("files")
    if measured:
        theirs = {str(file["sha256"]) for file in measured}
        mine = {_digest(artifact, name) for name in artifact.weights}
    else:
        theirs = {f"{side['name']}, {side['bytes']} bytes"}
        mine = {f"{artifact.path.resolve().name}, {artifact.weight_bytes} bytes"}
    if theirs != mine:
        raise Refused(
            "the quality was measured of another artifact", file=path, found=", ".join(sorted(theirs))[:200],
            expected=", ".join(sorted(mine))[:200], remedy="gptoss-convert compare this artifact with its source",
        )  # fmt: skip


def _digest(artifact: Artifact, name: str) -> str:
    """SHA-256 as the certificate has it (the copy is checked against it), or of the file."""
    if (known := artifact.digest(name)) is not None:
        return known
    hasher = hashlib.sha256()
    with SourceFile(artifact.files[name]) as file:
        for at in range(0, file.size, _BLOCK):
            hasher.update(file.read(at, min(_BLOCK, file.size - at)))
    return hasher.hexdigest()


def _section(document: Mapping[str, Any]) -> str:
    source, text = document["source"], document["text"]
    intro = f"Measured by gptoss-convert against its source, {printable(str(source['name']))} ({source['layout']})"
    blocks = []
    if text is not None:
        intro += f", on {text['scored']} tokens of {printable(str(text['name']))}"
        blocks.append(table(("next token", "value", "standard error"), _text_rows(text), "lrr"))
    blocks.append(table(("weights", "relative RMS error, the worst tensor", "tensors"), _tensor_rows(document), "lrr"))
    bad = [row["name"] for row in document["tensors"] if row["not_finite"]]
    if bad:
        blocks.append(paragraph(f"**{len(bad)} tensors hold values that are not finite**, {bad[0]} first."))
    notes = [paragraph(printable(str(note))) for note in document["artifact"].get("notes") or []]
    failed = [gate["metric"] for gate in document["gates"] if not gate["passed"]]
    if failed:
        notes.append(paragraph(f"Gates that were asked for and missed: {', '.join(failed)}."))
    return "\n".join([paragraph(intro + "."), *blocks, *notes])


def _text_rows(text: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    kld, top, ppl = text["kld"], text["top1"], text["perplexity"]
    rows = [
        ("KL divergence, mean", kld["mean"], kld["se"]),
        ("KL divergence, median", kld["median"], None),
        ("KL divergence, 99th percentile", kld["p99"], None),
        ("same likeliest token", top["agreement"], top["se"]),
        ("perplexity of the source", ppl["source"]["value"], ppl["source"]["se"]),
        ("perplexity of this artifact", ppl["artifact"]["value"], ppl["artifact"]["se"]),
        ("ratio of the two", ppl["ratio"]["value"], ppl["ratio"]["se"]),
    ]
    return [(name, _number(value), "" if se is None else _number(se)) for name, value, se in rows]


def _tensor_rows(document: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    rows = []
    for part, name in _PARTS.items():
        errors = [row["relative_rms"] for row in document["tensors"] if row["part"] == part]
        if errors:
            finite = [e for e in errors if e is not None and math.isfinite(e)]
            worst = max(finite) if len(finite) == len(errors) else None
            rows.append((name, "exact" if worst == 0 else _number(worst), len(errors)))
    return rows


def _number(value: float | None) -> str:
    """compare's JSON has null where a figure is not finite."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"

"""The report of `compare` as one HTML page: no other file, no network, nothing that needs a script.

The document comes from files of strangers: every name in it is escaped, and a content security policy stands behind that. The
same document gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from gptoss_convert.convert.report_charts import ERROR, TOKENS, HeatMap, Scale, layer_chart, size_table
from gptoss_convert.convert.report_footer import footer
from gptoss_convert.convert.report_page import (
    NOT_FINITE,
    finite,
    name,
    number,
    page,
    percent,
    section,
    size,
    table,
    text,
    uncertain,
)
from gptoss_convert.convert.report_tensors import distance, not_finite_list, spoilt_sides, tensor_section, weight

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The page for a document of schema gptoss-convert/compare/1."""
    sections = [
        _verdict(document),
        _text(document),
        _sizes(document),
        _experts(document),
        _coverage(document),
        _layers(document),
        tensor_section(document),
    ]
    title = f"{text(document['artifact']['name'])} compared with {text(document['source']['name'])}"
    main = "\n".join(part for part in sections if part)
    return page(title, f"<main>\n{main}\n</main>\n{footer(document)}", _shades())


def _shades() -> str:
    light, dark = ("".join(ramp.rules(dark=dark) for ramp in (ERROR, TOKENS)) for dark in (False, True))
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}\n"


def _ratio(document: Document) -> float:
    source: int = document["source"]["bytes"]
    return document["artifact"]["bytes"] / source if source else math.nan


def _headline(document: Document) -> str:
    words, ratio = document["text"], percent(_ratio(document))
    equal = sum(tensor["equal"] for tensor in document["tensors"])
    count = len(document["tensors"])
    if odd := spoilt_sides(document):
        return f"{' and '.join(odd).capitalize()} hold{'s' if len(odd) == 1 else ''} values that are not finite."
    if words and not finite(words["top1"]["agreement"]):
        return "On this text the likelihoods are not finite numbers."
    if count and equal == count:
        return f"Nothing lost: every tensor holds the source’s values, at {ratio} of its size."
    if words:
        return f"The same first choice at {percent(words['top1']['agreement'])} of places, at {ratio} of the size."
    return f"{count - equal:,} of {count:,} tensors changed, at {ratio} of the size."


def _verdict(document: Document) -> str:
    source, artifact, words = document["source"], document["artifact"], document["text"]
    against = f"<b>{name(artifact['name'])}</b> compared with <b>{name(source['name'])}</b>"
    if words:
        against += f" on {words['scored']:,} places of {name(words['name'])}"
    losses = "".join(f"<li>{name(loss)}</li>" for loss in artifact["losses"])
    stated = (
        f'<p>Given up on purpose, as the artifact itself says:</p><ul class="losses">{losses}</ul>' if losses else ""
    )
    stated += "".join(f'<p class="note">Note: {name(note)}.</p>' for note in artifact["notes"])
    return (
        f'<header><p class="eyebrow">{against}</p><h1>{_headline(document)}</h1>{_badge(document["gates"])}'
        f'<p class="lead">{_meaning(document)}</p>{not_finite_list(document)}{_tiles(document)}{stated}</header>'
        f"{_gates(document['gates'])}"
    )


def _meaning(document: Document) -> str:
    """What the headline means for the owner of a laptop; no more than was measured."""
    words = document["text"]
    need = (
        f"The artifact takes {size(document['artifact']['bytes'])}: to run it wholly in memory a machine needs that much free, "
        "and some more for the conversation."
    )
    if not words:
        return (
            "No text was compared, so this report says how far the weights moved and not how far the answers did. "
            + need
        )
    top, kld = words["top1"], words["kld"]
    if not (finite(top["agreement"]) and finite(kld["mean"])):
        return "A figure in which a value that is not finite takes part is no number, and it keeps no limit. " + need
    if top["agreement"] >= 1 and kld["max"] == 0:
        return "At every place that was scored it gives exactly the source’s likelihoods. " + need
    same = uncertain(top["agreement"], top["se"], factor=100, unit=" %")
    apart = uncertain(kld["mean"], kld["se"])
    return (
        f"A model writes by choosing each next token from a list of likelihoods. At {same} of the places the artifact’s first "
        f"choice is the source’s; over the whole list the two differ by a mean KL divergence of {apart} nats, "
        f"where 0 would be the same list. {need}"
    )


def _badge(gates: Sequence[Document]) -> str:
    failed = sum(not gate["passed"] for gate in gates)
    if not gates:
        return '<p class="verdict none-set">No limits were set; how far is too far is yours to say</p>'
    look, mark, words = ("failed", "✗", "not kept") if failed else ("passed", "✓", "kept")
    limits = f"{failed or len(gates)} of {len(gates)} limits {words}"
    return f'<p class="verdict {look}"><span aria-hidden="true">{mark}</span> {limits}</p>'


def _tiles(document: Document) -> str:
    source, artifact, words = document["source"], document["artifact"], document["text"]
    tiles = []
    if words:
        top, kld, perplexity = words["top1"], words["kld"], words["perplexity"]
        tiles += [
            (
                "Mean KL divergence",
                _value_and_error(kld["mean"], kld["se"]),
                f"nats; half of the places below {number(kld['median'])}" if finite(kld["median"]) else "nats",
            ),
            (
                "Top-1 agreement",
                _value_and_error(top["agreement"], top["se"], factor=100, unit=" %"),
                "same most likely token",
            ),
            (
                "Perplexity ratio",
                _value_and_error(perplexity["ratio"]["value"], perplexity["ratio"]["se"]),
                f"from {number(perplexity['source']['value'], 4)} to {number(perplexity['artifact']['value'], 4)}",
            ),
        ]
    tiles.append(("Size", size(artifact["bytes"]), f"{percent(_ratio(document))} of {size(source['bytes'])}"))
    if not words and document["layers"]:
        last = document["layers"][-1]
        tiles.append(("Residual stream at the end", distance(last["hidden_error"]), "distance from the source’s"))
    made = "".join(
        f'<div><dt>{label}</dt><dd class="value">{value}</dd><dd class="under">{under}</dd></div>'
        for label, value, under in tiles
    )
    return f'<dl class="tiles">{made}</dl>'


def _value_and_error(value: float | None, error: float | None, *, factor: float = 1, unit: str = "") -> str:
    shown, _, margin = uncertain(value, error, factor=factor, unit=unit).partition(" ± ")
    return f"{shown} <small>± {margin}</small>" if margin else shown


def _gates(gates: Sequence[Document]) -> str:
    if not gates:
        return ""
    rows = [
        (
            f'<th scope="row">{name(gate["metric"])}</th>',
            f"{gate['found']:.6g}" if finite(gate["found"]) else NOT_FINITE,
            f"{gate['limit']:.6g}",
            '<span class="passed">✓ kept</span>' if gate["passed"] else '<span class="failed">✗ not kept</span>',
        )
        for gate in gates
    ]
    note = '<p class="note">These were set by whoever ran the comparison.</p>'
    return section("gates", "Limits", note + table(("measure", "#found", "#limit", "result"), rows, "gates", "Limits"))


def _text(document: Document) -> str:
    words = document["text"]
    if not words:
        return ""
    kld, perplexity = words["kld"], words["perplexity"]
    ratio = perplexity["ratio"]
    rows = [
        ("KL divergence, mean", uncertain(kld["mean"], kld["se"]), "nats; 0 is the same list of likelihoods"),
        ("KL divergence, median", number(kld["median"]), "half of the places are below"),
        ("KL divergence, 99th percentile", number(kld["p99"]), "one place in a hundred is above"),
        ("KL divergence, greatest", number(kld["max"]), "the one place where the two differ most"),
        (
            "top-1 agreement",
            uncertain(words["top1"]["agreement"], words["top1"]["se"], factor=100, unit=" %"),
            "places with the same most likely token",
        ),
        ("perplexity of the source", uncertain(*_pair(perplexity["source"])), "how surprised it is by the text"),
        ("perplexity of the artifact", uncertain(*_pair(perplexity["artifact"])), ""),
        (
            "their ratio",
            uncertain(*_pair(ratio)),
            _telling(*_pair(ratio)),
        ),
    ]
    heads = ("measure", "#found", "meaning")
    cells = [(f'<th scope="row">{label}</th>', value, meaning) for label, value, meaning in rows]
    note = (
        f'<p class="note">{words["scored"]:,} of {words["tokens"]:,} tokens scored, contexts of {words["context"]:,}; ± is one '
        "standard error. The numbers hold for this text; another text gives others.</p>"
    )
    return section("text", "On the text", note + table(heads, cells, "", "On the text"))


def _pair(found: Document) -> tuple[float | None, float | None]:
    return found["value"], found["se"]


def _telling(ratio: float | None, error: float | None) -> str:
    if not (finite(ratio) and finite(error)):
        return "how far from 1 cannot be told"
    return f"{'more than' if abs(ratio - 1) > 2 * error else 'no difference shown: within'} two standard errors from 1"


def _sizes(document: Document) -> str:
    parts = document["sizes"]["parts"]
    return section("sizes", "Where the bytes are", size_table(parts)) if parts else ""


def _experts(document: Document) -> str:
    experts = document["experts"]
    if not experts:
        return ""
    errors, tokens = _errors(experts), experts["tokens"]
    scale = Scale.of(value for row in errors for value in row)

    def title(layer: int, expert: int) -> str:
        found = errors[layer][expert]
        return f"Layer {layer}, expert {expert}: " + (
            "no token came" if found is None else f"{percent(found)}, {tokens[layer][expert]:,} tokens"
        )

    found = [(value, i, e) for i, row in enumerate(errors) for e, value in enumerate(row) if value is not None]
    known = [value for value, _, _ in found if finite(value)]
    heat = HeatMap(
        "error-map", "Output error of each expert, layers down, experts across", ERROR, scale, errors, title,
        lambda value: percent(value, 2), "no token came", lambda layer, expert: errors[layer][expert] is None,
        NOT_FINITE if len(known) < len(found) else "",
        lambda layer, expert: not finite(errors[layer][expert]) and errors[layer][expert] is not None,
    )  # fmt: skip
    worst = max(found, key=lambda cell: (weight(cell[0]), -cell[1], -cell[2]), default=None)
    first = f"Greatest: {title(worst[1], worst[2])}".replace("Layer", "layer") if worst else "No expert got a token."
    middle = f" The median is {percent(median(known))}." if known else ""
    note = (
        "<p>How far each expert’s output lies from the source’s, on the activations that reached it: root of the mean square of "
        f"the difference, relative to the output.{middle}</p>"
    )
    return section("experts", "Experts: error of the output", note + heat.figure(first))


def _errors(experts: Document) -> list[list[float | None]]:
    """Of each expert: None where no token came, NaN where JSON had null for what is no number."""
    rows = zip(experts["output_error"], experts["tokens"], strict=True)
    return [
        [math.nan if error is None and n else error for error, n in zip(errors, counts, strict=True)]
        for errors, counts in rows
    ]


def _coverage(document: Document) -> str:
    experts, coverage = document["experts"], document["coverage"]
    if not experts:
        return ""
    tokens = experts["tokens"]
    needed = coverage["needed"] if coverage else 0
    load = coverage["router_load"] if coverage else None

    def title(layer: int, expert: int) -> str:
        short = ", short" if tokens[layer][expert] < needed else ""
        share = f"; router load {number(load[layer][expert])}" if load else ""
        return f"Layer {layer}, expert {expert}: {tokens[layer][expert]:,} tokens{short}{share}"

    heat = HeatMap(
        "token-map", "Tokens that reached each expert, layers down, experts across", TOKENS,
        Scale.of((value for row in tokens for value in row if value), log=True), tokens, title, lambda value: f"{value:,.0f}",
        "no token came", lambda layer, expert: tokens[layer][expert] == 0,
        f"fewer than {needed:,}" if needed else "", lambda layer, expert: tokens[layer][expert] < needed,
    )  # fmt: skip
    cells = [(count, i, e) for i, row in enumerate(tokens) for e, count in enumerate(row)]
    least = min(cells, default=None)
    first = f"Fewest: {title(least[1], least[2])}".replace("Layer", "layer") if least else ""
    note = f"<p>An error is known the better the more tokens an expert saw. {_short(coverage, len(cells))}</p>"
    return section("coverage", "Experts: tokens seen", note + heat.figure(first))


def _short(coverage: Document | None, count: int) -> str:
    if not coverage:
        return "The shades go by ratio: each quarter of the scale multiplies the count."
    if not coverage["short"]:
        return f"Each of the {count:,} experts saw the {coverage['needed']:,} tokens that were asked for."
    return f"{coverage['short']:,} of {count:,} experts saw fewer than the {coverage['needed']:,} asked for; they are outlined."


def _layers(document: Document) -> str:
    layers = document["layers"]
    if not layers:
        return ""
    note = (
        "<p>What each layer’s experts get wrong when given the source’s own activations, and the distance that has gathered in "
        "the residual stream after the layer.</p>"
    )
    if not all(finite(row[key]) for row in layers for key in ("output_error", "hidden_error")):
        note += '<p class="failed">Where a line has no point, what it would show is not finite.</p>'
    return section(
        "layers", "Error through the layers", note + f"<figure>{layer_chart(layers)}</figure>{_layer_table(document)}"
    )


def _layer_table(document: Document) -> str:
    errors = _errors(document["experts"]) if document["experts"] else []
    rows = []
    for i, row in enumerate(document["layers"]):
        known = [
            (weight(value), -e) for e, value in enumerate(errors[i] if i < len(errors) else []) if value is not None
        ]
        values = [value for value, _ in known if finite(value)]
        worst = max(known, default=None)
        rows.append(
            (
                f'<th scope="row">{text(row["layer"])}</th>', distance(row["output_error"]), distance(row["hidden_error"]),
                percent(median(values) if values else None), distance(worst[0]) if worst else "–",
                str(-worst[1]) if worst else "–", str(len(errors[i]) - len(known)) if i < len(errors) else "–",
            )
        )  # fmt: skip
    heads = (
        "layer",
        "#experts together",
        "#residual stream",
        "#median expert",
        "#worst expert",
        "#which",
        "#without tokens",
    )
    return f"<details><summary>Table of layers</summary>{table(heads, rows, '', 'Table of layers')}</details>"

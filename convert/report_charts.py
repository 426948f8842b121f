"""The pictures of the comparison report as inline SVG.

Every cell and point carries its value as text, so that a picture can be read without its colours and without scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.report_page import PARTS, finite, number, percent, size, text

STEPS = 24
"""Shades of a colour scale."""


@dataclass(frozen=True)
class Ramp:
    """A sequential scale, even in lightness (OKLCH), from pale to deep on paper and from deep to bright in the dark."""

    css: str
    hues: tuple[float, float]

    def rules(self, *, dark: bool) -> str:
        """A CSS rule for each shade."""
        return "".join(f".{self.css}{i}{{fill:{self.shade(i, dark=dark)}}}" for i in range(STEPS))

    def shade(self, step: int, *, dark: bool) -> str:
        """The colour of a step as #rrggbb."""
        t = step / (STEPS - 1)
        along = 1 - t if dark else t
        lightness = 0.27 + 0.66 * t if dark else 0.955 - 0.645 * t
        hue = self.hues[0] + (self.hues[1] - self.hues[0]) * along
        chroma = 0.035 + 0.135 * math.sin(math.pi * min(1.0, 0.08 + along * 0.72))
        while (rgb := _srgb(lightness, chroma, hue)) is None:  # outside what screens show: paler
            chroma *= 0.96
        return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def _srgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float] | None:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    if min(linear) < -1e-4 or max(linear) > 1 + 1e-4:
        return None
    red, green, blue = (_gamma(min(1.0, max(0.0, channel))) for channel in linear)
    return red, green, blue


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055


ERROR, TOKENS = Ramp("e", (85, -45)), Ramp("t", (150, 275))


@dataclass(frozen=True)
class Scale:
    """From values to shades: evenly, or by ratio (`log`), between the least and the greatest value there is."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float | None], *, log: bool = False) -> Scale:
        """The scale that spans the finite values."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        return cls(min(known, default=0.0), max(known, default=0.0), log)

    def _place(self, value: float) -> float:
        return math.log1p(max(0.0, value)) if self.log else value

    def step(self, value: float) -> int:
        """The shade of a value."""
        low, high = self._place(self.low), self._place(self.high)
        if not math.isfinite(value):
            return STEPS - 1
        share = (self._place(value) - low) / (high - low) if high > low else 0.0
        return min(STEPS - 1, max(0, int(share * STEPS)))

    def at(self, share: float) -> float:
        """The value at a share of the way from the low to the high end."""
        place = self._place(self.low) + share * (self._place(self.high) - self._place(self.low))
        return math.expm1(place) if self.log else place


@dataclass(frozen=True)
class HeatMap:
    """Layers down, experts across. `none(l, e)`: nothing is known of the cell; `marked(l, e)`: it is outlined."""

    key: str
    label: str
    ramp: Ramp
    scale: Scale
    values: Sequence[Sequence[float | None]]
    title: Callable[[int, int], str]
    tick: Callable[[float], str]
    none: str
    none_at: Callable[[int, int], bool]
    marked: str = ""
    marked_at: Callable[[int, int], bool] = lambda _, __: False

    def figure(self, first: str) -> str:
        """The map with its legend and a line of text, where a script may show the cell under the pointer."""
        return f'<figure class="map">{self.svg()}<figcaption>{self.legend()}<output>{text(first)}</output></figcaption></figure>'

    def svg(self) -> str:
        """The map. A mark lies inside its cell, so that neighbours stay apart."""
        layers, experts = len(self.values), max(map(len, self.values), default=0)
        wide = min(28, max(7, 896 // max(1, experts)))
        high = min(16, max(10, wide))
        left, top = 48, 36
        width, height = left + experts * wide + 8, top + layers * high + 4
        rows = "".join(
            f'<g transform="translate({left} {top + layer * high})">{self._row(layer, wide, high)}</g>'
            for layer in range(layers)
        )
        across, down = _every(experts, 16), _every(layers, 12)
        labels = [
            f'<text x="{left + (e + 0.5) * wide:g}" y="{top - 7}" text-anchor="middle">{e}</text>'
            for e in range(0, experts, across)
        ] + [
            f'<text x="{left - 6}" y="{top + (y + 0.5) * high + 3.5:g}" text-anchor="end">{y}</text>'
            for y in range(0, layers, down)
        ]
        middle = top + layers * high / 2
        labels += [
            f'<text x="{left + experts * wide / 2:g}" y="12" text-anchor="middle">expert</text>',
            f'<text transform="translate(12 {middle:g}) rotate(-90)" text-anchor="middle">layer</text>',
        ]
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{text(self.label)}">'
            f'<svg id="{self.key}" class="map" viewBox="0 0 {width} {height}" role="img" '
            f'style="min-width:{min(width, 576)}px;max-width:{1.2 * width:g}px" aria-labelledby="{self.key}-t">'
            f'<title id="{self.key}-t">{text(self.label)}</title>{_hatch(self.key)}'
            f'<g class="axis" aria-hidden="true">{"".join(labels)}</g>{rows}</svg></div>'
        )

    def _row(self, layer: int, wide: int, high: int) -> str:
        cells = []
        for expert, value in enumerate(self.values[layer]):
            unknown = value is None or self.none_at(layer, expert)
            look = (
                f'fill="url(#{self.key}-h)" class="none'
                if unknown
                else f'class="{self.ramp.css}{self.scale.step(value or 0)}'
            )
            look += ' mark"' if self.marked_at(layer, expert) else '"'
            cells.append(
                f'<rect x="{expert * wide}" width="{wide - 1}" height="{high - 1}" {look}>'
                f"<title>{text(self.title(layer, expert))}</title></rect>"
            )
        return "".join(cells)

    def legend(self) -> str:
        """The scale with numbers, and what hatching and outlines mean."""
        wide = 240 / STEPS
        shades = "".join(
            f'<rect x="{10 + i * wide:g}" y="0" width="{wide:g}" height="12" class="{self.ramp.css}{i}"/>'
            for i in range(STEPS)
        )
        shares = (0, 0.25, 0.5, 0.75, 1) if self.scale.high > self.scale.low else (0,)
        ticks = "".join(
            f'<text x="{10 + 240 * share:g}" y="27" text-anchor="middle">{text(self.tick(self.scale.at(share)))}</text>'
            for share in shares
        )
        key = f"{self.key}-k"
        marks = [
            f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{_hatch(key)}'
            f'<rect x="1" y="1" width="14" height="14" fill="url(#{key}-h)" class="none"/></svg> {text(self.none)}'
        ]
        if self.marked:
            outlined = f'<rect x="1" y="1" width="14" height="14" class="{self.ramp.css}2 mark"/>'
            marks.append(
                f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{outlined}</svg> {text(self.marked)}'
            )
        return (
            f'<div class="legend"><svg class="scale" viewBox="-12 0 284 30" role="img" '
            f'aria-label="Scale from {text(self.tick(self.scale.low))} to {text(self.tick(self.scale.high))}">{shades}'
            f'<g class="axis">{ticks}</g></svg>{"".join(f"<span>{mark}</span>" for mark in marks)}</div>'
        )


def _hatch(key: str) -> str:
    return (
        f'<defs><pattern id="{key}-h" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="4" height="4" class="hatch-ground"/><rect width="1.4" height="4" class="hatch-line"/></pattern></defs>'
    )


def _every(count: int, labels: int) -> int:
    """The step between axis labels: the least of 1, 2, 4, 8 … that needs no more than about `labels` of them."""
    step = 1
    while count / step > labels:
        step *= 2
    return step


def ticks(high: float) -> list[float]:
    """Three to six round numbers from nought to `high` or just above."""
    if not (math.isfinite(high) and high > 0):
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(high))
    step = next(power * factor for factor in (0.2, 0.5, 1, 2, 5) if high / (power * factor) <= 5)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Line:
    """One line of a chart: key in a layer's row, words for it, and the mark that tells it from others without colour."""

    key: str
    label: str
    mark: str


LINES = (
    Line("hidden_error", "residual stream after the layer", '<circle cx="{x:g}" cy="{y:g}" r="3.4">{t}</circle>'),
    Line(
        "output_error",
        "the layer's experts alone",
        '<path d="M{x:g} {y:g}m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z">{t}</path>',
    ),
)


def layer_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Error by layer: what each adds, and what has gathered in the residual stream. What is not finite has no point."""
    left, top, wide, high = 52, 12, 680, 220
    found = [row[line.key] for row in layers for line in LINES]
    marks = ticks(max(filter(finite, found), default=0.0))
    last = max(1, len(layers) - 1)

    def place(index: int, value: float) -> tuple[float, float]:
        share = min(1.0, value / marks[-1])
        return round(left + 8 + index / last * (wide - 16), 1), round(top + high * (1 - share), 1)

    parts = []
    for mark in marks:
        y = top + high * (1 - mark / marks[-1])
        parts.append(f'<path class="rule" d="M{left} {y:.1f}h{wide}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent(mark, 2) if mark else "0"}</text>'
        )
    for i in range(0, len(layers), _every(len(layers), 18)):
        parts.append(
            f'<text x="{place(i, 0)[0]:g}" y="{top + high + 18}" text-anchor="middle">{text(layers[i]["layer"])}</text>'
        )
    parts.append(f'<text x="{left + wide / 2:g}" y="{top + high + 36}" text-anchor="middle">layer</text>')
    axis = f'<g class="axis" aria-hidden="true">{"".join(parts)}</g>'
    drawn = "".join(_line(line, layers, place) for line in LINES)
    label = "Relative error by layer; the same numbers are in the table of layers."
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Error by layer"><svg id="layer-chart" class="chart" '
        f'viewBox="0 0 {left + wide + 12} {top + high + 42}" role="img" aria-labelledby="layer-chart-t">'
        f'<title id="layer-chart-t">{label}</title>{axis}{drawn}</svg></div>{_line_legend()}'
    )


def _line(line: Line, layers: Sequence[Mapping[str, Any]], place: Callable[[int, float], tuple[float, float]]) -> str:
    points = [
        (place(i, row[line.key]), row["layer"], row[line.key]) for i, row in enumerate(layers) if finite(row[line.key])
    ]
    path = " ".join(f"{x:g},{y:g}" for (x, y), _, _ in points)
    marks = "".join(
        line.mark.format(x=x, y=y, t=f"<title>Layer {text(layer)}, {text(line.label)}: {percent(value)}</title>")
        for (x, y), layer, value in points
    )
    return f'<g class="{line.key}"><polyline points="{path}"/>{marks}</g>'


def _line_legend() -> str:
    swatches = "".join(
        f'<span><svg class="swatch {line.key}" viewBox="0 0 16 16" aria-hidden="true">'
        f"{line.mark.format(x=8, y=8, t='')}</svg> {text(line.label)}</span>"
        for line in LINES
    )
    return f'<div class="legend">{swatches}</div>'


def size_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each part: two bars on one scale, and the numbers."""
    widest = max((max(row["source"], row["artifact"]) for row in parts.values()), default=0) or 1
    rows = []
    for part, row in sorted(parts.items(), key=lambda item: (-item[1]["source"], item[0])):
        bars = "".join(
            f'<i class="{side}" style="width:{max(0.3, 100 * row[side] / widest):.2f}%"></i>'
            for side in ("source", "artifact")
        )
        rows.append(
            f'<tr><th scope="row">{text(PARTS.get(part, part))}</th><td class="bars" aria-hidden="true">{bars}</td>'
            f'<td class="n">{size(row["source"])}</td><td class="n">{size(row["artifact"])}</td>'
            f'<td class="n">{number(row["bits_per_weight"])}</td></tr>'
        )
    total = {side: sum(row[side] for row in parts.values()) for side in ("source", "artifact")}
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Size by part"><table class="sizes"><thead><tr>'
        '<th scope="col">part</th><th class="bars" scope="col"><span class="key source">source</span> '
        '<span class="key artifact">artifact</span></th><th class="n" scope="col">source</th>'
        f'<th class="n" scope="col">artifact</th><th class="n" scope="col">bits per weight</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot><tr>"
        f'<th scope="row">all</th><td class="bars"></td><td class="n">{size(total["source"])}</td>'
        f'<td class="n">{size(total["artifact"])}</td><td></td></tr></tfoot></table></div>'
    )

"""What the comparison report is made of: the page around it, its tables, and how it writes numbers and names."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TypeGuard

from gptoss_convert.errors import printable

PARTS = {
    "gate_up": "experts, gate and up", "down": "experts, down", "attention": "attention", "embedding": "embedding",
    "head": "output head", "router": "router", "norm": "norms", "bias": "biases", "sinks": "attention sinks",
}  # fmt: skip
NOT_FINITE = "not finite"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def text(value: object) -> str:
    """Anything from the document, made safe for a page: markup escaped, control and direction characters spelled out."""
    return html.escape(printable(str(value), 2000))


def name(value: object) -> str:
    """A name, whose direction of writing stays its own."""
    return f"<bdi>{text(value)}</bdi>"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent where people read without one."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "−infinite"
    if value == 0 or not 1e-6 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", "−") if value else "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float | None, digits: int = 3) -> str:
    """A ratio in per cent."""
    if value is None or not math.isfinite(value):
        return number(value)
    while value < 1 and digits < 9 and float(number(100 * value, digits).replace("−", "-").replace(",", "")) >= 100:
        digits += 1  # what is less than all is not shown as all
    return f"{number(100 * value, digits)} %"


def finite(value: float | None) -> TypeGuard[float]:
    """Whether it is a number; in a document that was JSON, null is none."""
    return value is not None and math.isfinite(value)


def uncertain(value: float | None, error: float | None, *, factor: float = 1, unit: str = "") -> str:
    """`value ± error`, to the second digit of the error; of a value that is no number, that alone."""
    if not finite(value):
        return NOT_FINITE if value is None else number(value)
    value = factor * value
    if error is None:
        return f"{number(value, 4)} ± unknown{unit}"
    error = factor * error
    if not math.isfinite(error) or error <= 0:
        return f"{number(value, 4)} ± {number(error, 2)}{unit}"
    decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}{unit}".replace("-", "−")


def size(count: float) -> str:
    """Bytes in the units that shops and file managers use."""
    for unit, word in _UNITS:
        if count >= unit:
            return f"{number(count / unit)} {word}"
    return f"{count:,.0f} bytes"


SCRIPT = """
for (const map of document.querySelectorAll("figure.map")) {
  const out = map.querySelector("output");
  map.addEventListener("pointerover", (event) => {
    const title = event.target.closest("svg.map rect")?.querySelector("title");
    if (title) out.textContent = title.textContent;
  });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const compare = new Intl.Collator("en", { numeric: true }).compare;
      const rows = [...body.rows].map((row) => [value(row, i), row]);
      const numeric = rows.every(([key]) => key !== "" && !isNaN(key));
      const before = head.getAttribute("aria-sort") ?? (numeric ? "ascending" : "descending");
      const sign = before === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      rows.sort(([a], [b]) => sign * (numeric ? a - b : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
"""


def page(title: str, body: str, shades: str) -> str:
    """The page. shades: CSS beside the sheet's own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    sheet = (resources.files("gptoss_convert") / "data" / "report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{sheet}{shades}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(key: str, title: str, body: str) -> str:
    """A section with its heading; `key` is its id."""
    return f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>{body}</section>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], look: str = "", label: str = "table") -> str:
    """A table whose cells are made already: a cell that starts with `<t` is whole, any other gets its `<td>`.

    A head that starts with `#` stands above numbers.
    """
    right = [head.startswith("#") for head in heads]
    top = "".join(
        f'<th scope="col" class="{"n" if n else "w"}">{head.removeprefix("#")}</th>'
        for head, n in zip(heads, right, strict=True)
    )
    body = []
    for row in rows:
        cells = zip(row, right, strict=True)
        body.append("<tr>" + "".join(c if c.startswith("<t") else _td(c, n) for c, n in cells) + "</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{look}">'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _td(cell: str, right: bool) -> str:
    return f'<td class="n">{cell}</td>' if right else f"<td>{cell}</td>"


def sortable(value: float | None, shown: str) -> str:
    """A cell of a sortable table that is sorted by `value`; what is no number is the largest."""
    return f'<td class="n" data-v="{value if finite(value) else 1e308:.9g}">{shown}</td>'

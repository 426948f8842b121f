"""The comparison report in a real browser: what a person sees, in every dress, and what the browser says of it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chromium import Browser, NoChromium, Page, browser, chromium
from support.compare_document import broken, document, large

from gptoss_convert.cli.output import strict
from gptoss_convert.convert.compare_report import render
from gptoss_convert.convert.report_page import percent

ROOT = Path(__file__).parents[2]
CELLS = "[...document.querySelectorAll('#%s rect:has(title)')].map((r) => [r.querySelector('title').textContent, "
CELLS += "r.getBoundingClientRect().width, getComputedStyle(r).fill])"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    try:
        folder = chromium(ROOT / ".cache" / "chromium")
    except NoChromium as reason:
        pytest.skip(str(reason))
    with browser(folder) as running:
        yield running


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return large()


@pytest.fixture(scope="module")
def file(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(made), encoding="utf-8")
    return path


@pytest.fixture
def page(window: Browser, file: Path) -> Page:
    opened = window.open(file)
    opened.view(1280, 900)
    return opened


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and the rows, as RGB, of a PNG as Chromium writes it."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    channels = {2: 3, 6: 4}[kind]
    assert depth == 8
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride, rows = zlib.decompress(data), width * channels, []
    above = bytearray(stride)
    for y in range(height):
        line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        unfilter(raw[y * (stride + 1)], line, above, channels)
        rows.append(bytes(b for i, b in enumerate(line) if i % channels < 3))
        above = line
    return width, height, rows


def unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> None:
    """Undo a PNG row's filter in place."""
    for i in range(len(line)):
        left = line[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        if kind == 1:
            line[i] = line[i] + left & 255
        elif kind == 2:
            line[i] = line[i] + above[i] & 255
        elif kind == 3:
            line[i] = line[i] + (left + above[i]) // 2 & 255
        elif kind == 4:
            guess = left + above[i] - corner
            best = min(
                (abs(guess - left), 0, left), (abs(guess - above[i]), 1, above[i]), (abs(guess - corner), 2, corner)
            )
            line[i] = line[i] + best[2] & 255


def test_it_loads_quietly_and_asks_for_nothing(page: Page, file: Path) -> None:
    assert page.messages == []
    assert page.requests == [file.as_uri()]
    assert page.evaluate("document.compatMode") == "CSS1Compat"


def test_the_verdict_is_on_the_first_screen(page: Page) -> None:
    heading = page.evaluate("document.querySelector('h1').innerText")
    assert heading.startswith("The same first choice at 91.4 % of places, at ")
    assert page.evaluate("document.querySelector('.tiles').getBoundingClientRect().bottom") < 900
    assert "0.0821 ± 0.0014" in page.evaluate("document.querySelector('.tiles').innerText.replace(/\\s+/g, ' ')")


@pytest.mark.parametrize("key", ["error-map", "token-map"])
def test_the_heat_map_has_a_coloured_cell_for_each_expert(key: str, page: Page, made: dict[str, Any]) -> None:
    cells = page.evaluate(CELLS % key)
    assert len(cells) == 36 * 128
    assert all(width > 3 for _, width, _ in cells)
    title, _, fill = cells[35 * 128 + 127]
    assert title.startswith("Layer 35, expert 127: ")
    if key == "error-map":
        assert percent(made["experts"]["output_error"][35][127]) in title
    assert f"{made['experts']['tokens'][35][127]:,} tokens" in title
    assert fill.startswith("rgb(")
    assert len({fill for _, _, fill in cells if fill.startswith("rgb(")}) > 15
    assert "url(" in cells[1][2], "the expert without a token is hatched"


def test_the_heat_map_is_light_by_day_and_dark_by_night(page: Page) -> None:
    first = "getComputedStyle(document.querySelector('#error-map .e0')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    day = page.evaluate(f"[{first}, {ground}]")
    page.view(1280, 900, dark=True)
    night = page.evaluate(f"[{first}, {ground}]")
    brightness = [[sum(map(int, colour[4:-1].split(","))) for colour in pair] for pair in (day, night)]
    assert min(brightness[0]) > 600
    assert max(brightness[1]) < 300
    page.view(1280, 900, dark=True, media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_picture_is_not_blank(dark: bool, page: Page) -> None:
    page.view(640, 480, dark=dark)
    width, height, rows = pixels(page.screenshot())
    assert (width, height) == (640, 480)
    seen = {row[i : i + 3] for row in rows for i in range(0, len(row), 3)}
    assert len(seen) > 20
    corner = rows[0][:3]
    assert (sum(corner) < 200) == dark
    empty = sum(row == corner * width for row in rows)
    assert 0 < empty < height / 2


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_only_wide_things_scroll_sideways(width: int, page: Page) -> None:
    page.view(width, 800)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_click_on_a_heading_sorts_the_tensors(page: Page) -> None:
    column = "[...document.querySelectorAll('.sortable tbody tr')].map((r) => Number(r.cells[5].dataset.v))"
    button = "document.querySelectorAll('.sortable thead button')[5]"
    unsorted = page.evaluate(column)
    page.evaluate(f"{button}.click()")
    assert page.evaluate(column) == sorted(unsorted, reverse=True)
    page.evaluate(f"{button}.click()")
    assert page.evaluate(column) == sorted(unsorted)
    assert page.evaluate(f"{button}.closest('th').getAttribute('aria-sort')") == "ascending"
    page.evaluate("document.querySelector('.sortable thead button').click()")
    names = page.evaluate("[...document.querySelectorAll('.sortable tbody th')].map((h) => h.textContent)")
    assert names.index("model.layers.9.input_layernorm.weight") < names.index("model.layers.10.input_layernorm.weight")


def test_the_cell_under_the_pointer_is_read_out(page: Page) -> None:
    page.evaluate("document.querySelector('#error-map').scrollIntoView()")
    place = (
        "(() => { const r = document.querySelectorAll('#error-map g[transform] rect')[300].getBoundingClientRect(); "
    )
    x, y = page.evaluate(place + "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert page.evaluate("document.querySelector('#experts output').textContent").startswith("Layer 2, expert 44: ")


def test_it_reads_the_same_without_scripts(window: Browser, page: Page, file: Path) -> None:
    bare = window.open(file, scripts=False)
    bare.view(1280, 900)
    words = "document.querySelector('main').innerText"
    assert bare.evaluate(words) == page.evaluate(words)
    assert bare.evaluate("document.querySelectorAll('button').length") == 0


def test_it_prints(page: Page) -> None:
    assert page.pdf().startswith(b"%PDF-")


def test_hostile_names_run_nothing(window: Browser, tmp_path: Path) -> None:
    bad = "</title></style><script>console.log('ran')</script><img src=x onerror=console.log('ran')><svg onload=console.log(1)>"
    made = document()
    made["artifact"] |= {"name": bad, "losses": [bad]}
    made["tensors"][3] |= {"name": bad, "source_encoding": bad, "part": bad}
    made["device"] = bad
    path = tmp_path / "hostile.html"
    path.write_text(render(made), encoding="utf-8")
    opened = window.open(path)
    assert opened.messages == []
    assert opened.requests == [path.as_uri()]
    assert opened.evaluate("[document.scripts.length, document.images.length, document.title]") == [
        1, 0, f"{bad} compared with {made['source']['name']}",
    ]  # fmt: skip
    assert opened.evaluate("document.querySelector('.losses').innerText") == bad


@pytest.mark.parametrize("null", [False, True], ids=["as made", "as json"])
def test_a_page_of_figures_that_are_not_finite_opens_and_sorts(window: Browser, tmp_path: Path, null: bool) -> None:
    made = broken()
    path = tmp_path / "broken.html"
    path.write_text(render(json.loads(json.dumps(strict(made))) if null else made), encoding="utf-8")
    opened = window.open(path)
    opened.view(1280, 900)
    assert opened.messages == []
    assert opened.evaluate("document.querySelector('h1').innerText").endswith("hold values that are not finite.")
    cells = opened.evaluate(CELLS % "error-map")
    assert len(cells) == 3 * 8
    assert "url(" in cells[1][2], "the expert without a token is hatched"
    assert cells[5][2].startswith("rgb("), "the one that is no number is not"
    assert opened.evaluate(
        "[...document.querySelectorAll('#error-map rect.mark')].every((r) => getComputedStyle(r).stroke.startsWith('rgb('))"
    )
    opened.evaluate("document.querySelectorAll('.sortable thead button')[5].click()")
    first = opened.evaluate(
        "[...document.querySelectorAll('.sortable tbody tr')].slice(0, 2).map((r) => r.cells[5].textContent)"
    )
    assert first == ["not finite", "not finite"]
    for width in (320, 1280):
        opened.view(width, 800)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_browser_would_have_told(window: Browser, tmp_path: Path) -> None:
    """That a quiet page says something: a page that is not quiet is heard."""
    path = tmp_path / "loud.html"
    path.write_text(
        "<script>console.error('heard'); undefined_name()</script><img src='missing.png'>", encoding="utf-8"
    )
    opened = window.open(path)
    assert len(opened.messages) >= 2
    assert opened.requests == [path.as_uri(), (tmp_path / "missing.png").as_uri()]

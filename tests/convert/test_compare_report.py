"""The comparison report: well formed, escaped, the same every time, complete, and small enough for the 120b."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from support.compare_document import broken, document, large

from gptoss_convert.cli.output import strict
from gptoss_convert.convert.compare_report import render
from gptoss_convert.convert.report_charts import ERROR, STEPS, TOKENS, Ramp, Scale, ticks
from gptoss_convert.convert.report_page import number, percent, size, uncertain

VOID = {"meta", "br"}
HOSTILE = "<script>alert(1)</script>\"'&</style>\u202egguf.exe\u2066\x00\x1b[31m]]>-->"


class Reader(HTMLParser):
    """A page's elements, attributes and text; complains of an element that is not closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> means nothing in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return document()


@pytest.fixture(scope="module")
def reader(whole: dict[str, Any]) -> Reader:
    return Reader(render(whole))


def spoiled(value: Any) -> Any:
    """A document with every text in it replaced by a hostile one."""
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_ids_are_unique_and_every_reference_leads_to_one(reader: Reader) -> None:
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {attributes["aria-labelledby"] for _, attributes in reader.elements if "aria-labelledby" in attributes}
    used |= {found for _, a in reader.elements for found in re.findall(r"url\(#(.+?)\)", a.get("fill") or "")}
    assert used
    assert used <= set(ids)


def test_the_page_needs_no_other_file(whole: dict[str, Any], reader: Reader) -> None:
    for tag, attributes in reader.elements:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attributes), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
    assert "://" not in render(whole)
    assert "@import" not in render(whole)
    policy = next(a["content"] for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_the_same_document_gives_the_same_bytes_whatever_the_hash_seed(whole: dict[str, Any]) -> None:
    code = "import json, sys; from gptoss_convert.convert.compare_report import render; "
    code += "sys.stdout.buffer.write(render(json.load(sys.stdin)).encode())"
    made = {render(whole).encode()}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        made.add(
            subprocess.run(
                command, input=json.dumps(whole).encode(), capture_output=True, env=environment, check=True
            ).stdout
        )
    assert len(made) == 1


def test_rendering_changes_nothing_in_the_document(whole: dict[str, Any]) -> None:
    before = copy.deepcopy(whole)
    render(whole)
    assert whole == before


def test_hostile_names_stay_text(whole: dict[str, Any], reader: Reader) -> None:
    """The same elements in the same order, but for sorting by name, and no character that hides or reorders others."""
    hostile = spoiled(whole)
    for tensor, spoilt in zip(whole["tensors"], hostile["tensors"], strict=True):
        spoilt["part"] = tensor["part"]  # by which rows are chosen
    hostile["sizes"], hostile["versions"] = whole["sizes"], {HOSTILE: HOSTILE}
    page = render(hostile)
    found = Reader(page)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in reader.elements]
    assert len(found.all("script")) == 1
    assert not [a for _, a in found.elements if any("alert" in (v or "") for k, v in a.items() if k != "aria-label")]
    assert not [c for c in page if c != "\n" and not c.isprintable()]
    assert found.text.count("<script>alert(1)</script>\"'&</style>\\u202egguf.exe") > len(whole["tensors"])


def test_hostile_parts_stay_text(whole: dict[str, Any]) -> None:
    parts = {HOSTILE: {"source": 2, "artifact": 1, "bits_per_weight": 4.0}}
    found = Reader(
        render(whole | {"sizes": {"parts": parts}, "tensors": [t | {"part": HOSTILE} for t in whole["tensors"]]})
    )
    assert len(found.all("script")) == 1
    assert "<script>alert(1)</script>" in found.text


@pytest.mark.parametrize("missing", ["experts", "layers", "text", "coverage"])
def test_a_part_that_was_not_measured_is_left_out(missing: str, whole: dict[str, Any], reader: Reader) -> None:
    found = Reader(render(whole | {missing: None}))
    assert "None" not in found.text
    gone = {s["id"] for s in reader.all("section")} - {s["id"] for s in found.all("section")}
    assert (
        gone == {"experts": {"experts", "coverage"}, "layers": {"layers"}, "text": {"text"}, "coverage": set()}[missing]
    )


def test_the_least_document_is_a_page(whole: dict[str, Any]) -> None:
    least: dict[str, Any] = whole | {"experts": None, "layers": None, "text": None, "coverage": None, "gates": []}
    nothing = {"files": [], "notes": [], "widened": None, "method": None, "losses": []}
    least |= {"artifact": whole["artifact"] | nothing, "model": whole["model"] | {"release": None}, "tensors": []}
    least |= {"sizes": {"parts": {}}, "versions": {"gptoss_convert": "0", "torch": None}}
    found = Reader(render(least))
    assert "None" not in found.text
    assert "No text was compared" in found.text
    assert "No limits were set" in found.text


def test_the_verdict_says_the_numbers_with_their_errors(reader: Reader, whole: dict[str, Any]) -> None:
    ratio = percent(whole["artifact"]["bytes"] / whole["source"]["bytes"])
    assert f"The same first choice at 91.4 % of places, at {ratio} of the size." in reader.text
    assert "0.0821 ± 0.0014 nats" in reader.text
    assert "91.37 ± 0.26 %" in reader.text
    for number_shown in (
        "0.0127",
        "0.911",
        "6.27",
        "21.42 ± 0.31",
        "22.11 ± 0.33",
        "1.0323 ± 0.0042",
        "12,032",
        "16,384",
    ):
        assert number_shown in reader.text, number_shown


def test_no_difference_is_claimed_within_two_standard_errors(whole: dict[str, Any], reader: Reader) -> None:
    words = copy.deepcopy(whole["text"])
    words["perplexity"]["ratio"] = {"value": 1.003, "se": 0.004}
    assert "no difference shown" in Reader(render(whole | {"text": words})).text
    assert "no difference shown" not in reader.text


def test_a_lossless_artifact_is_called_one(whole: dict[str, Any]) -> None:
    same = [tensor | {"equal": True, "relative_rms": 0.0, "worst": None} for tensor in whole["tensors"]]
    found = Reader(render(whole | {"tensors": same}))
    assert "Nothing lost: every tensor holds the source’s values" in found.text
    assert f"All {len(same)} tensors hold the source’s values exactly." in found.text


def test_gates_are_told_in_words(whole: dict[str, Any], reader: Reader) -> None:
    assert "2 of 2 limits kept" in reader.text
    gates = [whole["gates"][0] | {"passed": False, "limit": 0.05}, whole["gates"][1]]
    page = render(whole | {"gates": gates})
    assert "1 of 2 limits not kept" in Reader(page).text
    rows = [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert "kld.mean 0.08213 0.05 ✗ not kept" in rows
    assert "top1.agreement 0.9137 0.9 ✓ kept" in rows


def cells(page: str, key: str) -> list[tuple[str, str]]:
    """Class and title of every cell of a heat map, in order."""
    svg = page[page.index(f'<svg id="{key}"') :]
    return re.findall(r'<rect x="\d+"[^>]*?class="([^"]*)"><title>([^<]*)</title>', svg[: svg.index("</svg>")])


def test_each_expert_is_a_cell_with_its_numbers(whole: dict[str, Any]) -> None:
    page, errors, tokens = render(whole), whole["experts"]["output_error"], whole["experts"]["tokens"]
    found = cells(page, "error-map")
    assert len(found) == 3 * 8
    assert found[1] == ("none", "Layer 0, expert 1: no token came")
    assert found[13][1] == f"Layer 1, expert 5: {percent(errors[1][5])}, {tokens[1][5]:,} tokens"
    worst = max(range(24), key=lambda i: errors[i // 8][i % 8] or 0)
    assert found[worst][0] == f"e{STEPS - 1}"


def test_experts_short_of_tokens_are_outlined(whole: dict[str, Any]) -> None:
    found = cells(render(whole), "token-map")
    assert len(found) == 3 * 8
    assert [i for i, (look, _) in enumerate(found) if "mark" in look] == [1, 2]
    assert found[1][0] == "none mark"
    assert found[2][1].startswith("Layer 0, expert 2: 17 tokens, short; router load ")
    assert "mark" not in "".join(look for look, _ in cells(render(whole | {"coverage": None}), "token-map"))


def test_the_worst_tensors_come_first_with_the_place(whole: dict[str, Any]) -> None:
    tensors = copy.deepcopy(whole["tensors"])
    tensors[5] |= {"equal": False, "relative_rms": 0.77, "name": "the.worst"}
    tensors[5] |= {"shape": [8, 2880, 2880]}
    tensors[5]["worst"] = {"relative_rms": 0.9, "expert": 6, "row": 1234, "column": 512, "columns": 256}
    page = render(whole | {"tensors": tensors})
    table = page[page.index('class="worst"') : page.index('class="sortable"')]
    assert table.index("the.worst") < table.index("experts.gate_up_proj")
    assert "expert 6, row 1,234, columns 512–767" in table
    dense = tensors[2]["worst"]
    assert f"<td>row {dense['row']:,}, columns " in table, "a matrix of no expert names none"
    assert table.count("<tr>") - 1 == min(20, sum(not tensor["equal"] for tensor in tensors))


def test_every_tensor_is_listed(whole: dict[str, Any], reader: Reader) -> None:
    listed = render(whole)
    listed = listed[listed.index('class="sortable"') :]
    for tensor in whole["tensors"]:
        assert f"<bdi>{tensor['name']}</bdi>" in listed
    assert f"All {len(whole['tensors'])} tensors" in reader.text


def test_provenance_is_complete(whole: dict[str, Any], reader: Reader) -> None:
    footer = reader.text[reader.text.index("What was compared") :]
    for side in ("source", "artifact", "text"):
        assert whole[side]["name"] in footer
    assert whole["text"]["digest"] in footer
    for file in [*whole["source"]["files"], *whole["artifact"]["files"]]:
        assert f"{file['name']}, {file['bytes']:,} bytes, SHA-256 {file['sha256'][:16]}…" in footer
    for said in (
        "gptoss_convert 0.1.0, torch 2.6.0, on cpu",
        "hidden 2,880 → 3,072",
        whole["artifact"]["method"],
        whole["schema"],
    ):
        assert said in footer


def test_what_is_no_number_is_said_so(whole: dict[str, Any]) -> None:
    spoilt = copy.deepcopy(whole)
    spoilt["experts"]["output_error"][1][1] = math.nan
    spoilt["experts"]["output_error"][1][2] = math.inf
    spoilt["layers"][2]["hidden_error"] = math.inf
    spoilt["tensors"][0] |= {"relative_rms": math.nan, "equal": False}
    found = Reader(render(spoilt))
    assert "Layer 1, expert 1: not a number" in found.text
    assert "Layer 1, expert 2: infinite" in found.text
    assert not re.search(r"\bnan\b|\binf\b", render(spoilt))


def as_json(document: dict[str, Any]) -> dict[str, Any]:
    """As `--json` prints it, read again."""
    read: dict[str, Any] = json.loads(json.dumps(strict(document), allow_nan=False))
    return read


@pytest.mark.parametrize("form", [lambda d: d, as_json], ids=["as made", "as json"])
def test_a_spoilt_artifact_is_called_one_whether_told_by_nan_or_by_null(form: Callable[[Any], dict[str, Any]]) -> None:
    page = render(form(broken()))
    found = Reader(page)
    assert "The source and the artifact hold values that are not finite." in found.text
    assert "0 in the source, 3 in the artifact, the first at expert 5, row 1,234, column 17" in found.text
    assert "The same first choice" not in found.text
    assert "1 of 1 limits not kept" in found.text
    assert "tensor_rms not finite 0.5 ✗ not kept" in " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "how far from 1 cannot be told" in found.text
    assert not re.search(
        r"\b(nan|inf|None|null)\b", re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.S)
    )
    table = page[page.index('class="worst"') : page.index('class="sortable"')]
    rows = re.findall(r"<bdi>([^<]*)</bdi>.*?</tr>", table)
    assert rows[:2] == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.k_proj.weight"]
    assert table.count('<span class="failed">not finite</span>') == 2


@pytest.mark.parametrize("form", [lambda d: d, as_json], ids=["as made", "as json"])
def test_an_expert_whose_error_is_no_number_is_marked_and_not_taken_for_one_without_tokens(
    form: Callable[[Any], dict[str, Any]],
) -> None:
    page = render(form(broken()))
    found = cells(page, "error-map")
    assert [i for i, (look, _) in enumerate(found) if "mark" in look] == [5, 19]
    assert [i for i, (look, _) in enumerate(found) if "none" in look] == [1]
    assert found[1][1].endswith("no token came")
    for i in (5, 19):
        assert "tokens" in found[i][1]
        assert "no token" not in found[i][1]
    assert "not finite" in page[page.index("error-map") : page.index('id="coverage"')]
    assert "mark" not in "".join(look for look, _ in cells(render(document()), "error-map"))


def test_a_layer_whose_error_is_not_finite_has_no_point(whole: dict[str, Any]) -> None:
    def points(page: str) -> int:
        return page[page.index('id="layer-chart"') : page.index("Table of layers")].count("<title>Layer ")

    spoilt = render(broken())
    assert points(render(whole)) == points(spoilt) + 2 == 6
    assert "Where a line has no point, what it would show is not finite." in spoilt
    assert "Where a line has no point" not in render(whole)


def test_what_a_reader_must_know_is_under_the_verdict(whole: dict[str, Any]) -> None:
    page = Reader(render(whole | {"artifact": whole["artifact"] | {"notes": ["activations <b>too</b>"]}}))
    assert "Note: activations <b>too</b>." in page.text


def test_an_unknown_standard_error_is_called_unknown(whole: dict[str, Any]) -> None:
    words = copy.deepcopy(whole["text"])
    for found in (words["kld"], words["top1"], *words["perplexity"].values()):
        found["se"] = None
    page = Reader(render(whole | {"text": words}))
    assert "0.08213 ± unknown" in page.text
    assert "91.37 ± unknown %" in page.text
    assert "how far from 1 cannot be told" in page.text


def test_of_very_many_files_the_first_are_listed(whole: dict[str, Any]) -> None:
    files = [{"name": f"{i}.safetensors", "bytes": i, "sha256": "ab" * 32} for i in range(1000)]
    page = render(whole | {"source": whole["source"] | {"files": files}})
    assert page.count("SHA-256 <code>abababababababab…</code>") == 40
    assert "and 960 files more" in page


def test_the_120b_fits_in_two_megabytes() -> None:
    page = render(large())
    assert len(cells(page, "error-map")) == len(cells(page, "token-map")) == 36 * 128
    assert len(page.encode()) < 2_000_000


def channels(colour: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def lightness(colour: str) -> float:
    """CIE L*."""
    y = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), channels(colour), strict=True))
    return 116 * y ** (1 / 3) - 16


@pytest.mark.parametrize("ramp", [ERROR, TOKENS], ids=["error", "tokens"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_shades_are_even_steps_of_lightness(ramp: Ramp, dark: bool) -> None:
    found = [lightness(ramp.shade(i, dark=dark)) for i in range(STEPS)]
    steps = [(b - a) * (1 if dark else -1) for a, b in pairwise(found)]
    assert min(steps) > 1.5
    assert max(steps) < 2 * min(steps)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_of_text_have_contrast(dark: bool, whole: dict[str, Any]) -> None:
    blocks = re.findall(r":root \{(.*?)\}", render(whole), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]+);", blocks[dark]))
    spread = {key: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 else v for key, v in colours.items()}

    def luminance(key: str) -> float:
        return 0.05 + sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels(spread[key]), strict=True))

    for ground in ("ground", "card"):
        for ink in ("ink", "soft", "good", "bad"):
            pair = sorted((luminance(ink), luminance(ground)))
            assert pair[1] / pair[0] >= 4.5, (ink, ground)
        for mark in ("accent", "second", "mark", "source"):
            pair = sorted((luminance(mark), luminance(ground)))
            assert pair[1] / pair[0] >= 3, (mark, ground)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0.0, "0"), (0.0123456, "0.0123"), (1234567.0, "1,234,567"), (3.2e-9, "3.20e−09"), (-0.5, "−0.500"),
        (math.nan, "not a number"), (-math.inf, "−infinite"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_almost_all_is_not_written_as_all() -> None:
    assert percent(0.99996) == "99.996 %"
    assert percent(1.0) == "100 %"
    assert percent(0.9141) == "91.4 %"


def test_errors_set_the_digits() -> None:
    assert uncertain(0.082134, 0.00141) == "0.0821 ± 0.0014"
    assert uncertain(21.4, 3.1) == "21.4 ± 3.1"
    assert uncertain(0.5, 0.0) == "0.5000 ± 0"


def test_sizes_have_units() -> None:
    assert [size(n) for n in (0, 999, 1500, 13_789_210_624)] == ["0 bytes", "999 bytes", "1.50 kB", "13.8 GB"]


def test_a_scale_without_width_still_answers() -> None:
    assert Scale.of([]).step(0.0) == 0
    assert Scale.of([0.2, 0.2]).step(0.2) == 0
    scale = Scale.of([1, 10, 10000], log=True)
    assert (scale.step(1), scale.step(10000)) == (0, STEPS - 1)
    assert scale.at(1) == pytest.approx(10000)


@pytest.mark.parametrize("high", [1e-7, 0.031, 0.2, 1, 7.3, 1e9])
def test_axes_have_few_round_marks_that_reach_the_top(high: float) -> None:
    found = ticks(high)
    assert found[0] == 0
    assert 3 <= len(found) <= 7
    assert found[-1] >= high * (1 - 1e-9)
    assert ticks(0.0) == [0.0, 1.0]

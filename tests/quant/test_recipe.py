"""Recipes: names that people know, rules, and files of one's own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import gptoss_convert.quant.recipe as recipe_module
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.quant.recipe import PARTS, TYPES, named, parse_layers, part_of, plain, read_recipe

OWN = """
name = "mine"
gate = "q8_0"
up = "mxfp4"
down = "q5_0"
attention = "bf16"
embedding = "f16"
head = "Q8_0"

[[rule]]
match = "blk.*.ffn_down_exps.weight"
layers = "0-1, 3-"
codec = "mxfp4"

[[rule]]
match = "blk.3.*_exps.weight"
codec = "f32"
"""


@pytest.mark.parametrize("name", TYPES)
def test_every_type_names_a_codec_for_every_part(name: str) -> None:
    assert set(TYPES[name].codecs) == set(PARTS)


def test_a_type_is_found_whatever_its_case() -> None:
    assert named("Q8_0") is TYPES["q8_0"]
    with pytest.raises(UsageError, match="no such type"):
        named("q9_k")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("q4_k", "did you mean q4_k_m or q4_k_s?"),
        ("Q3_K", "did you mean q3_k_l or q3_k_m or q3_k_s?"),
        ("iq2", "did you mean iq2_m or iq2_s or iq2_xs or iq2_xxs?"),
        ("mxfp4_moe", "did you mean mxfp4?"),
        ("iq1_s", "iq1_s is not written: there is no encoder for its 1.56 bits a weight here"),
        ("IQ1_M", "iq1_m is not written: there is no encoder for its 1.75 bits a weight here"),
        ("gguf", None),
    ],
)
def test_a_name_that_is_no_type_is_answered_with_the_types_there_are(name: str, remedy: str | None) -> None:
    with pytest.raises(UsageError, match="no such type") as error:
        named(name)
    assert error.value.expected == ", ".join(TYPES)
    assert (error.value.remedy or "").startswith(remedy or "")
    assert (error.value.remedy is None) == (remedy is None)


def test_the_mixtures_give_more_bits_where_llama_quantize_gives_more() -> None:
    down, up = "blk.{}.ffn_down_exps.weight", "blk.{}.ffn_up_exps.weight"
    chosen = {
        name: [TYPES[name].codec(tensor.format(n), n, 24) for tensor in (up, down) for n in (0, 12)]
        for name in ("q3_k_l", "iq3_m", "iq3_xs", "iq2_m")
    }
    assert chosen == {
        "q3_k_l": ["q3_k", "q3_k", "q5_k", "q5_k"],
        "iq3_m": ["iq3_s", "iq3_s", "q4_k", "iq3_s"],
        "iq3_xs": ["iq3_s", "iq3_xxs", "iq3_s", "iq3_s"],
        "iq2_m": ["iq2_s", "iq2_s", "iq3_s", "iq2_s"],
    }


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.1.attn_sinks.weight", "blk.2.ffn_gate_exps.bias"],
)
def test_norms_router_sinks_and_biases_stay_f32(name: str) -> None:
    assert part_of(name) is None
    assert TYPES["q2_k"].codec(name, 0, 4) == "f32"


def test_a_later_rule_overrides_an_earlier_one_and_the_part() -> None:
    recipe = read_recipe(OWN, "mine.toml")
    down = [recipe.codec(f"blk.{n}.ffn_down_exps.weight", n, 5) for n in range(5)]
    assert down == ["mxfp4", "mxfp4", "q5_0", "f32", "mxfp4"]
    assert recipe.codec("blk.3.ffn_up_exps.weight", 3, 5) == "f32"
    assert recipe.codec("output.weight", None, 5) == "q8_0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate = ", "not TOML"),
        ("gate = 'q8_0'", "every part"),
        (OWN + "\n[colour]\n", "unknown keys"),
        (OWN.replace('"q5_0"', '"q5"'), "unknown codec"),
        (OWN.replace("match =", "pattern ="), "unknown keys"),
        (OWN.replace('layers = "0-1, 3-"', "layers = 3"), "not text"),
        ("hidden = 3000\n" + OWN, "no width"),
        ("intermediate = true\n" + OWN, "no width"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_recipe(text, "mine.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"gate = '\xff'", "not TOML"),
        ("gate = " + "[" * 100_000 + "]" * 100_000, "not TOML"),
        ("gate = " + "1" * 5000, "not TOML"),
        (OWN.replace('"0-1, 3-"', '"2-0"'), "layers are no list"),
        (OWN.replace('"0-1, 3-"', '"first"'), "layers are no list"),
        (OWN.replace('"0-1, 3-"', f'"{"9" * 5000}-"'), "layers are no list"),
    ],
)
def test_what_is_no_recipe_is_bad_input_and_no_traceback(text: str | bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        read_recipe(text, "mine.toml")
    assert error.value.file == "mine.toml"


TENSORS: dict[str, int | None] = {
    "token_embd.weight": None, "output.weight": None, "output_norm.weight": None,
    **{
        f"blk.{n}.{part}.weight": n
        for n in range(3)
        for part in ("attn_norm", "attn_q", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps")
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "message", "told"),
    [
        ('match = "blk.*.ffn_dwon_exps.weight"', "matches no tensor", "blk.*.ffn_down_exps.weight"),
        ('match = "BLK.*.ffn_down_exps.weight"', "matches no tensor", "names are in lower case"),
        ('match = "model.layers.*"', "matches no tensor", "token_embd.weight"),
        ('match = "blk.*.ffn_down_exps.weight"\nlayers = "30-"', "layers are none of the model's", "layers 0 to 2"),
        ('match = "blk.1.*"\nlayers = "2"', "layers are none of the model's", "layers 0 to 2"),
        ('match = "output.weight"\nlayers = "0-2"', "layers of a tensor that is in none", "no layers for it"),
        ('match = "blk.*.ffn_gate_inp.weight"', "F32 in every recipe", "blk.*.ffn_gate_exps.weight"),
        ('match = "*norm.weight"', "F32 in every recipe", "output.weight"),
    ],
)
def test_a_rule_that_changes_nothing_is_an_error_that_names_it(rule: str, message: str, told: str) -> None:
    parts = "".join(f'{part} = "q8_0"\n' for part in PARTS)
    recipe = read_recipe(f'{parts}[[rule]]\n{rule}\ncodec = "q6_k"\n', "mine.toml")
    with pytest.raises(BadInput, match=message) as error:
        recipe.require_effect(TENSORS, 3)
    assert error.value.file == "mine.toml"
    assert rule.split('"')[1] in str(error.value.found)
    assert told in str(error.value)


def test_rules_that_change_something_pass() -> None:
    parts = "".join(f'{part} = "q8_0"\n' for part in PARTS)
    for rule in ('match = "blk.*"', 'match = "*.weight"\nlayers = "1-40"', 'match = "output.weight"'):
        read_recipe(f'{parts}[[rule]]\n{rule}\ncodec = "q6_k"\n', "mine.toml").require_effect(TENSORS, 3)


def test_the_recipe_in_the_documentation_can_be_followed() -> None:
    assert recipe_module.__doc__ is not None
    written = textwrap.dedent(recipe_module.__doc__[recipe_module.__doc__.index('    name = "mine"') :])
    recipe = read_recipe(written, "mine.toml")
    assert (recipe.hidden, recipe.intermediate) == (3072, 2816)
    assert [rule.layers for rule in recipe.rules] == ["0-2, 21-"]


def test_a_recipe_may_ask_for_widths() -> None:
    recipe = read_recipe("hidden = 3072\nintermediate = 2816\n" + OWN, "mine.toml")
    assert (recipe.hidden, recipe.intermediate) == (3072, 2816)
    assert recipe.as_dict()["intermediate"] == 2816


def test_layers_are_numbers_ranges_and_open_ranges() -> None:
    assert parse_layers("0-2, 5, 7-", 9) == {0, 1, 2, 5, 7, 8}
    assert parse_layers("7-40", 9) == {7, 8}
    with pytest.raises(UsageError, match="not a list of layers"):
        parse_layers("first", 9)


def test_experts_and_dense_make_a_recipe() -> None:
    recipe = plain("mxfp4", "bf16")
    assert recipe.codec("blk.0.ffn_up_exps.weight", 0, 1) == "mxfp4"
    assert recipe.codec("blk.0.attn_output.weight", 0, 1) == "bf16"


def test_the_document_has_one_row_for_every_type() -> None:
    text = (Path(__file__).parents[2] / "docs" / "types.md").read_text()
    table = text.partition("<!-- types_table.py: begin -->")[2].partition("<!-- types_table.py: end -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[:2] == ["type", "---"]
    assert sorted(rows[2:]) == sorted(TYPES)

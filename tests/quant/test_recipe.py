"""Recipes: names that people know, rules, and files of one's own."""

from __future__ import annotations

import pytest

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

"""Recipes: which codec each tensor of a GGUF gets.

A recipe names a codec for each *part* of the model and may override it by rules, later ones winning:

    part        tensors                                                          must be
    gate, up    blk.N.ffn_gate_exps.weight, blk.N.ffn_up_exps.weight             any codec
    down        blk.N.ffn_down_exps.weight                                       any codec
    attention   blk.N.attn_{q,k,v,output}.weight                                 any codec
    embedding   token_embd.weight                                                any codec
    head        output.weight                                                    any codec

Router, norms, biases and sinks are F32 in every recipe: they are small, and what they decide is large. A rule that changes
nothing of a model (nothing matches, or only such tensors, or no layer) is an error, and not passed over. TYPES holds the
recipes behind the names that people know; `read_recipe` reads anyone's own:

    name = "mine"
    gate = "q2_k"
    up = "q2_k"
    down = "q3_k"
    attention = "q6_k"
    embedding = "q4_k"
    head = "q6_k"

    hidden = 3072                             # optional: the widths to widen to; intermediate may be a cut
    intermediate = 2816

    [[rule]]
    match = "blk.*.ffn_down_exps.weight"      # shell pattern on the GGUF name
    layers = "0-2, 21-"                       # optional
    codec = "q4_k"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.kernels.codecs import BY_GGML_ID, CODECS

PARTS = ("gate", "up", "down", "attention", "embedding", "head")
EXPERT_PARTS = ("gate", "up", "down")
WIDTHS = ("hidden", "intermediate")
MAX_WIDTH = 1 << 20
_PATTERNS = {
    "gate": "blk.*.ffn_gate_exps.weight",
    "up": "blk.*.ffn_up_exps.weight",
    "down": "blk.*.ffn_down_exps.weight",
    "attention": "blk.*.attn_*.weight",
    "embedding": "token_embd.weight",
    "head": "output.weight",
}
_NEVER = ("blk.*.attn_norm.weight", "blk.*.attn_sinks.weight")


@dataclass(frozen=True)
class Rule:
    """An override: tensors whose GGUF name matches, in these layers (None: all), get this codec."""

    match: str
    codec: str
    layers: str | None = None

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", layers = {self.layers!r}"
        return f"match = {self.match!r}{layers}, codec = {self.codec!r}"

    def applies(self, name: str, layer: int | None, count: int) -> bool:
        """Whether the rule speaks of this tensor of a model of `count` layers."""
        if not fnmatchcase(name, self.match):
            return False
        return self.layers is None or (layer is not None and layer in parse_layers(self.layers, count))


@dataclass(frozen=True)
class Recipe:
    """A named choice of codecs: one for each part, then rules."""

    name: str
    codecs: Mapping[str, str]
    rules: tuple[Rule, ...] = ()
    hidden: int | None = None
    intermediate: int | None = None
    where: str | None = None  # the file it was read from

    def codec(self, name: str, layer: int | None, layers: int) -> str:
        """The codec of a GGUF tensor."""
        part = part_of(name)
        if part is None:
            return "f32"
        rule = self._rule_for(name, layer, layers)
        return self.codecs[part] if rule is None else rule.codec

    def origin(self, name: str, layer: int | None, layers: int) -> str:
        """What gives a GGUF tensor its codec, as it stands in the recipe."""
        rule = self._rule_for(name, layer, layers)
        part = part_of(name)
        return f"{part} = {self.codecs[part]!r}" if rule is None and part is not None else f"rule {rule}"

    def _rule_for(self, name: str, layer: int | None, layers: int) -> Rule | None:
        return next((rule for rule in reversed(self.rules) if rule.applies(name, layer, layers)), None)

    def require_effect(self, tensors: Mapping[str, int | None], layers: int) -> None:
        """BadInput for the first rule that changes nothing. tensors: GGUF names of a model, and the layer of each."""
        for rule in self.rules:
            matched = {name: layer for name, layer in tensors.items() if fnmatchcase(name, rule.match)}
            ruled = {name: layer for name, layer in matched.items() if part_of(name) is not None}
            if any(rule.applies(name, layer, layers) for name, layer in ruled.items()):
                continue
            found, expected = f"rule {rule}", "one of " + ", ".join(_PATTERNS.values())
            what, remedy = "a rule matches no tensor of the model", None
            if not matched and any(fnmatchcase(name, rule.match.lower()) for name in tensors):
                remedy = "names are in lower case"
            elif ruled and set(ruled.values()) == {None}:
                what, expected = "a rule asks for layers of a tensor that is in none", "no layers for it"
            elif ruled:
                what, expected = "a rule's layers are none of the model's", f"layers 0 to {layers - 1}"
            elif matched:
                what = "a rule asks for a codec of tensors that are F32 in every recipe"
            raise BadInput(what, file=self.where, found=found, expected=expected, remedy=remedy)

    def as_dict(self) -> dict[str, Any]:
        """As it enters a certificate."""
        rules = [{"match": r.match, "codec": r.codec, "layers": r.layers} for r in self.rules]
        widths = {"hidden": self.hidden, "intermediate": self.intermediate}
        return {"name": self.name, **self.codecs, "rules": rules} | {k: v for k, v in widths.items() if v is not None}


def part_of(name: str) -> str | None:
    """The part that a GGUF tensor belongs to, or None for what is always F32."""
    if any(fnmatchcase(name, pattern) for pattern in _NEVER):
        return None
    return next((part for part, pattern in _PATTERNS.items() if fnmatchcase(name, pattern)), None)


def parse_layers(text: str, count: int) -> frozenset[int]:
    """The layers that a text such as "0-2, 21-" names; of 24 layers → {0, 1, 2, 21, 22, 23}."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(-\s*([0-9]{0,6}))?\s*", part)
        if match is None or (match[3] and int(match[3]) < int(match[1])):
            raise UsageError("not a list of layers", found=text, expected='such as "0-2, 5, 21-"')
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else count - 1
        layers.update(range(first, min(last, count - 1) + 1))
    return frozenset(layers)


def _all(gate_up: str, down: str, attention: str, embedding: str, head: str, *rules: Rule) -> dict[str, Any]:
    codecs = {"gate": gate_up, "up": gate_up, "down": down}
    return {"codecs": {**codecs, "attention": attention, "embedding": embedding, "head": head}, "rules": rules}


_GATE_UP = "blk.*.ffn_[gu]*_exps.weight"
_DOWN = "blk.*.ffn_down_exps.weight"

#                     gate, up    down        attention  embedding  head
# The embedding has the head's codec: no calibration reaches it, its errors enter every layer, and it is 3 % of the weights
# (docs/measurements.md: at q4_k it alone cost more than all experts together).
_TABLE = {
    "f32":       _all("f32",      "f32",      "f32",     "f32",     "f32"),
    "bf16":      _all("bf16",     "bf16",     "bf16",    "bf16",    "bf16"),
    "f16":       _all("f16",      "f16",      "f16",     "f16",     "f16"),
    "mxfp4":     _all("mxfp4",    "mxfp4",    "q8_0",    "q8_0",    "q8_0"),
    "nvfp4":     _all("nvfp4",    "nvfp4",    "q8_0",    "q8_0",    "q8_0"),
    "q8_0":      _all("q8_0",     "q8_0",     "q8_0",    "q8_0",    "q8_0"),
    "q5_0":      _all("q5_0",     "q5_0",     "q8_0",    "q8_0",    "q8_0"),
    "q5_1":      _all("q5_1",     "q5_1",     "q8_0",    "q8_0",    "q8_0"),
    "q4_0":      _all("q4_0",     "q4_0",     "q8_0",    "q8_0",    "q8_0"),
    "q4_1":      _all("q4_1",     "q4_1",     "q8_0",    "q8_0",    "q8_0"),
    "iq4_nl":    _all("iq4_nl",   "iq4_nl",   "q8_0",    "q8_0",    "q8_0"),
    "q6_k":      _all("q6_k",     "q6_k",     "q6_k",    "q6_k",    "q6_k"),
    "q5_k_m":    _all("q5_k",     "q5_k",     "q6_k",    "q6_k",    "q6_k", Rule(_DOWN, "q6_k", "0-2")),
    "q5_k_s":    _all("q5_k",     "q5_k",     "q5_k",    "q6_k",    "q6_k"),
    "q4_k_m":    _all("q4_k",     "q4_k",     "q6_k",    "q6_k",    "q6_k", Rule(_DOWN, "q6_k", "0-2")),
    "q4_k_s":    _all("q4_k",     "q4_k",     "q5_k",    "q6_k",    "q6_k"),
    "iq4_xs":    _all("iq4_xs",   "iq4_xs",   "q6_k",    "q6_k",    "q6_k"),
    "q3_k_l":    _all("q3_k",     "q5_k",     "q6_k",    "q6_k",    "q6_k"),
    "q3_k_m":    _all("q3_k",     "q3_k",     "q6_k",    "q6_k",    "q6_k", Rule(_DOWN, "q4_k", "0-2")),
    "q3_k_s":    _all("q3_k",     "q3_k",     "q6_k",    "q6_k",    "q6_k"),
    "iq3_m":     _all("iq3_s",    "iq3_s",    "q6_k",    "q6_k",    "q6_k", Rule(_DOWN, "q4_k", "0-2")),
    "iq3_s":     _all("iq3_s",    "iq3_s",    "q6_k",    "q6_k",    "q6_k"),
    "iq3_xs":    _all("iq3_xxs",  "iq3_s",    "q6_k",    "q6_k",    "q6_k", Rule(_GATE_UP, "iq3_s", "0-2")),
    "iq3_xxs":   _all("iq3_xxs",  "iq3_xxs",  "q6_k",    "q6_k",    "q6_k"),
    "q2_k":      _all("q2_k",     "q3_k",     "q6_k",    "q6_k",    "q6_k"),
    "q2_k_s":    _all("q2_k",     "q2_k",     "q6_k",    "q6_k",    "q6_k"),
    "iq2_m":     _all("iq2_s",    "iq2_s",    "q6_k",    "q6_k",    "q6_k", Rule(_DOWN, "iq3_s", "0-2")),
    "iq2_s":     _all("iq2_s",    "iq2_s",    "q6_k",    "q6_k",    "q6_k"),
    "iq2_xs":    _all("iq2_xs",   "iq2_xs",   "q6_k",    "q6_k",    "q6_k"),
    "iq2_xxs":   _all("iq2_xxs",  "iq2_xxs",  "q6_k",    "q6_k",    "q6_k"),
    "q2_0":      _all("q2_0",     "q2_0",     "q8_0",    "q8_0",    "q8_0"),
}  # fmt: skip

# Names that llama.cpp's users know, and why they are not here.
NOT_WRITTEN = {
    "iq1_s": "there is no encoder for its 1.56 bits a weight here; the smallest type is iq2_xxs",
    "iq1_m": "there is no encoder for its 1.75 bits a weight here; the smallest type is iq2_xxs",
    "tq1_0": "it is for models trained to three values a weight",
    "tq2_0": "it is for models trained to three values a weight",
}

TYPES: dict[str, Recipe] = {name: Recipe(name, **fields) for name, fields in _TABLE.items()}


def named(name: str) -> Recipe:
    """The recipe behind a type's name, case ignored."""
    recipe = TYPES.get(name.lower())
    if recipe is None:
        raise UsageError("no such type", found=name, expected=", ".join(TYPES), remedy=_remedy(name.lower()))
    return recipe


def _remedy(name: str) -> str | None:
    """What to say to a name that is not among the types."""
    if name in NOT_WRITTEN:
        return f"{name} is not written: {NOT_WRITTEN[name]}"
    near = [known for known in TYPES if known.startswith(f"{name}_") or name.startswith(f"{known}_")]
    return f"did you mean {' or '.join(near)}?" if near else None


def plain(experts: str, dense: str) -> Recipe:
    """One codec for all experts and one for embedding, head and attention: what --experts and --dense ask for."""
    return Recipe(f"{experts}+{dense}", {p: experts if p in EXPERT_PARTS else dense for p in PARTS})


def read_recipe(text: str | bytes, where: object) -> Recipe:
    """A recipe from TOML."""
    try:
        table = tomllib.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput("the recipe is not TOML", file=where, found=str(error)[:200]) from error
    unknown = set(table) - {"name", "rule", *WIDTHS, *PARTS}
    if unknown:
        raise BadInput("the recipe has unknown keys", file=where, found=", ".join(sorted(unknown)))
    missing = [part for part in PARTS if part not in table]
    if missing:
        raise BadInput("the recipe does not say what every part gets", file=where, expected=", ".join(missing))
    rules = table.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise BadInput("the recipe's rules are not tables", file=where, expected="[[rule]] tables")
    return Recipe(
        str(table.get("name", "recipe")),
        {part: _codec(table[part], part, where) for part in PARTS},
        tuple(_rule(rule, where) for rule in rules),
        **{width: _width(table[width], width, where) for width in WIDTHS if width in table},
        where=str(where),
    )


def _width(value: object, what: str, where: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_WIDTH or value % 32:
        raise BadInput(f"the recipe's {what} is no width", file=where, found=value, expected="a multiple of 32")
    return value


def _rule(table: Mapping[str, Any], where: object) -> Rule:
    unknown = set(table) - {"match", "codec", "layers"}
    if unknown or not isinstance(table.get("match"), str):
        raise BadInput(
            "a rule has unknown keys, or no match", file=where, found=dict(table), expected="match, codec, layers"
        )
    layers = table.get("layers")
    if layers is not None:
        if not isinstance(layers, str):
            raise BadInput("a rule's layers are not text", file=where, found=layers, expected='such as "0-2, 21-"')
        try:
            parse_layers(layers, 1)
        except UsageError as error:
            found = f"match = {table['match']!r}, layers = {layers!r}"
            raise BadInput("a rule's layers are no list", file=where, found=found, expected=error.expected) from error
    return Rule(table["match"], _codec(table.get("codec"), f"rule {table['match']}", where), layers)


def _codec(name: object, what: str, where: object) -> str:
    known = [codec.name for codec in BY_GGML_ID.values()]
    if not isinstance(name, str) or name.lower() not in known:
        strange = "a codec that no GGUF has" if isinstance(name, str) and name.lower() in CODECS else "an unknown codec"
        raise BadInput(f"{what} asks for {strange}", file=where, found=name, expected=", ".join(known))
    return name.lower()

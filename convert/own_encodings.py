"""What "auto" writes into a GGUF: every tensor in the encoding it has, bit for bit.

A source may hold its tensors in any mixture: another quantizer gave the first layers more bits, gate and up are stored apart in
two types, a file of ours is widened. The recipe made here names each tensor's own codec; `stored` finds the view whose rows are
that codec's bytes already, where the canonical view cannot show them: alternating rows of two encodings come out as float32
there, and so do rows that end in the middle of a block.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from gptoss_convert.convert.cut import Restored
from gptoss_convert.convert.names import (
    DOWN,
    GATE_UP,
    HEAD,
    canonical_shapes,
    gguf_gate_up,
    gguf_name,
    is_gate_up,
    layer_name,
    split_name,
)
from gptoss_convert.convert.plan import BLOCKS, SCALES, Plan
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Alternating, View
from gptoss_convert.convert.widen import Cropped, Wide, required
from gptoss_convert.errors import Refused, UsageError
from gptoss_convert.kernels.codecs import BY_GGML_ID, CODECS, FLOATS
from gptoss_convert.quant.recipe import EXPERT_PARTS, PARTS, Recipe, Rule, part_of, plain

AUTO = "auto"


def auto_recipe(source: Source, experts: str, dense: str) -> Recipe:
    """The recipe of --experts and --dense, where "auto" gives each tensor its own encoding."""
    own: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    for name in canonical_shapes(source.config):
        for there, half in _gguf_tensors(name):
            part = part_of(there)
            if part is not None:
                asked = experts if part in EXPERT_PARTS else dense
                own[part][there] = _known(source, name, half) if asked == AUTO else asked
    codecs = {part: Counter(found.values()).most_common(1)[0][0] for part, found in own.items()}
    rules = [Rule(there, c) for part, found in own.items() for there, c in found.items() if c != codecs[part]]
    recipe = plain(codecs["gate"], codecs["attention"])
    if recipe.codecs != codecs or rules:
        recipe = Recipe(AUTO, codecs, tuple(rules))
    wide = source.wide
    needed = required(source.config, {there: c for found in own.values() for there, c in found.items()})
    if wide is None or needed is None or wide.intermediate < source.config.intermediate:
        return recipe
    return replace(recipe, hidden=wide.hidden, intermediate=wide.intermediate)  # the widths that its blocks lie in


def _gguf_tensors(name: str) -> list[tuple[str, str]]:
    """(GGUF name, part) of every tensor that a canonical one becomes."""
    if is_gate_up(name):
        return list(zip(gguf_gate_up(name), ("gate", "up"), strict=True))
    there = gguf_name(name)
    assert there is not None
    return [(there, "")]


def _known(source: Source, name: str, part: str) -> str:
    encoding = own_encoding(source.views[name], part)
    if CODECS[encoding].ggml_id not in BY_GGML_ID:
        option = "--experts" if split_name(name)[1].startswith("mlp") else "--dense"
        raise UsageError(
            "GGUF has no type for what the source holds, so its bits cannot be kept", found=f"{encoding} in {name}",
            remedy=f"say what to write: {option}, --type or --recipe",
        )  # fmt: skip
    return encoding


def own_encoding(view: View, part: str) -> str:
    """The encoding of a part of a view: of gate or up where they are stored apart, else the view's."""
    view = view.base if isinstance(view, Restored) else view
    return (_half(view, part) or view).encoding


def _half(view: View, part: str) -> View | None:
    """The gate rows or the up rows as a view of their own, where they are stored apart; None otherwise."""
    if isinstance(view, Alternating) and not view.columns:
        return {"gate": view.gate, "up": view.up}.get(part)
    if isinstance(view, Cropped | Wide):
        half = _half(view.base, part)
        experts, rows, columns = view.stack
        return None if half is None else replace(view, base=half, stack=(experts, rows // 2, columns))
    return None


def stored_part(view: View, part: str, codec: str) -> View | None:
    """The view of gate's or up's rows, or of all rows where they are one, whose chunks are in `codec`; None without one.

    Of a view whose gate and up are stored together there is none of either.
    """
    half = _half(view, part) if part else view
    return None if half is None else _stored(half, codec)


def _stored(view: View, codec: str) -> View | None:
    if isinstance(view, Wide) and isinstance(view.base, Cropped) and view.base.base.stack == view.stack:
        return _stored(view.base.base, codec)  # as wide as the file is: its own rows
    return view if view.encoding == codec and not getattr(view, "as_values", False) else None


def require_bits_kept(source: Source, plan: Plan, experts: str, dense: str) -> None:
    """Refuse a plan of "auto" that could only encode a tensor anew: the experts were cut, or other widths are asked for."""
    for name, slots in plan.slots.items():
        for slot in slots:
            part = part_of(slot.name)
            asked = None if part is None else experts if part in EXPERT_PARTS else dense
            if asked != AUTO or slot.codec in FLOATS:
                continue
            view = plan.source.views[name]
            if _stored(_half(view, slot.part) or view, slot.codec) is None:
                raise Refused(
                    "the tensor's bits cannot be kept in these widths",
                    file=source.path,
                    tensor=slot.name,
                    found=f"{slot.codec} in rows of {slot.shape[-1]}",
                    remedy="say what to write: --type, --recipe, or --experts and --dense; or leave --widen out",
                )


def encoding_name(view: View) -> str:
    """A view's encoding in words: of gate and up, where these are stored in two, both ("q2_k/q3_k")."""
    return "/".join(dict.fromkeys(own_encoding(view, part) for part in ("gate", "up")))


# A source's encoding → codecs that hold each of its values as it is.
EXACT = {"mxfp4": ("mxfp4", "q8_0", "q5_0", "int8_g32", "int8_moe")}


def rounded_codecs(plan: Plan, name: str) -> dict[str, str]:
    """Part ("", "gate", "up") → codec of a matrix of the plan, for those parts whose values are rounded to a codec."""
    source = plan.source.views[name].encoding
    found = {}
    for slot in plan.slots[name]:
        codec = "mxfp4" if slot.codec in (BLOCKS, SCALES) else slot.codec
        stored = stored_part(plan.source.views[name], slot.part, slot.codec) is not None
        if codec not in FLOATS and codec != source and codec not in EXACT.get(source, ()) and not stored:
            found[slot.part] = codec
    return found


def require_rounding(plan: Plan, method: str) -> None:
    """UsageError where a method of rounding is asked for and no matrix of the plan is rounded."""
    inner = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [GATE_UP, DOWN]
    names = [layer_name(n, name) for n in range(plan.source.config.layers) for name in inner] + [HEAD]
    if not any(rounded_codecs(plan, name) for name in names):
        raise UsageError(
            f"--method {method} would change nothing: no matrix is rounded",
            found=f"every matrix of {plan.target} is kept as it is, or held exactly",
            remedy="leave --method and --calibration out, or choose a smaller --type",
        )

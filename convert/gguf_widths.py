"""The widths of a GGUF: those that a recipe's blocks need or that it asks for, what stands against them, and what the file says.

    --widen auto    wider by zeros where blocks do not divide the rows (widen.py)
    --widen cut     the experts narrower instead, by their least important neurons (cut.py); the residual stream wider
    --widen none    neither: refused where blocks do not divide the rows
    widths          of the recipe or of --widen 3072x2816, whatever the blocks need

Widening cannot make every recipe fit: attention's output has rows of H·hd columns, which it does not touch, and an embedding must
hold the zeros that are added exactly, since they enter the residual stream. Both are refused with tensor, recipe and remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.cut import KEY_DROPPED, MOST_NEURONS, Kept, cut, describe, dropped_list, is_cut_to
from gptoss_convert.convert.names import EMBEDDING, split_name
from gptoss_convert.convert.plan import Slot
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.widen import (
    GAINS_ROUNDED,
    KEY_GAIN,
    KEY_HIDDEN,
    KEY_INTERMEDIATE,
    Widening,
    gain_encoding,
    required,
    row_blocks,
    row_width,
    widen,
)
from gptoss_convert.errors import Refused
from gptoss_convert.formats.gguf import Value, ValueType, array, string, u32
from gptoss_convert.kernels.codecs import BY_GGML_ID, CODECS
from gptoss_convert.quant.recipe import Recipe
from gptoss_convert.quant.zeros import RUN, holds_zeros

DESCRIPTION = "general.description"
OURS = "By gptoss-convert: "  # how a description of ours begins
Slots = Mapping[str, list[Slot]]
Neurons = Callable[[Source, int], Mapping[int, Kept]]  # which to keep of each expert, by layer


@dataclass(frozen=True)
class Changed:
    """A source in a recipe's widths, what to say of it, what it loses, and the keys that undo it."""

    source: Source
    notes: list[str]
    losses: list[str]
    keys: list[tuple[str, Value]]


def change_widths(
    source: Source, slots: Slots, recipe: Recipe, mode: str, neurons: Neurons, present: Collection[str]
) -> Changed:
    """The source in the widths that the recipe needs. slots: in its own widths; present: keys that the file has already."""
    true = source.config
    wide = choose_widths(true, slots, recipe, mode, source.path)
    notes = [_uncut(true, slots)] if mode == "cut" and (wide is None or wide.intermediate >= true.intermediate) else []
    if wide is None:
        return Changed(source, notes, [], [])
    keys, losses = own_keys(source, slots, recipe, wide, present)
    if wide.intermediate < true.intermediate:
        kept = neurons(source, wide.intermediate)
        keys.append((KEY_DROPPED, array(ValueType.UINT16, dropped_list(kept, true.intermediate))))
        source = cut(source, kept)
    return Changed(widen(source, wide), [*notes, describe_change(true, slots, recipe, wide)], losses, keys)


def choose_widths(config: ModelConfig, slots: Slots, recipe: Recipe, mode: str, where: object) -> Widening | None:
    """The widths of a recipe's file, None for the model's own; Refused where there are none in which it can be written."""
    codecs = _codecs(slots)
    wide = required(config, codecs, (recipe.hidden, recipe.intermediate))
    own = Widening(config.hidden, config.intermediate)
    place = recipe.where or where
    if mode == "none" and wide is not None:
        _require_fit(config, slots, recipe, own, "let the model be widened (--widen auto)", place)
        raise Refused("other widths are asked for, and --widen none forbids them", file=place, found=_text(wide))
    if mode == "cut" and wide is not None and wide.intermediate > config.intermediate and recipe.intermediate is None:
        wide = Widening(wide.hidden, _cut_width(config, row_blocks(codecs)["intermediate"]))
    if wide is not None and wide.intermediate < config.intermediate:
        _require_cuttable(config.intermediate, wide.intermediate)
    _require_fit(config, slots, recipe, wide or own, "leave the widths to --widen auto", place)
    if wide is not None and wide.hidden > config.hidden:
        _require_zeros(config, slots, recipe, wide, place)
    return wide


def own_keys(
    source: Source, slots: Slots, recipe: Recipe, wide: Widening, present: Collection[str]
) -> tuple[list[tuple[str, Value]], list[str]]:
    """What a file of other widths says of the model it was made of, but for the neurons cut; and what these widths lose."""
    true = source.config
    gain, exact = gain_encoding(source, wide)
    losses = [] if exact else [GAINS_ROUNDED]
    if wide.intermediate < true.intermediate and not is_cut_to(source, wide.intermediate):
        losses.append(describe(true.intermediate, wide.intermediate))
    keys = [
        (KEY_HIDDEN, u32(true.hidden)),
        (KEY_INTERMEDIATE, u32(true.intermediate)),
        (KEY_GAIN, string(gain)),
    ]
    if DESCRIPTION not in present:
        keys.append((DESCRIPTION, string(OURS + describe_change(true, slots, recipe, wide))))
    return keys, losses


def is_own_description(key: str, value: Value) -> bool:
    """Whether a key is the description that `own_keys` gives, which holds of one file only."""
    return key == DESCRIPTION and str(value.value).startswith(OURS)


def describe_change(config: ModelConfig, slots: Slots, recipe: Recipe, wide: Widening) -> str:
    """What becomes of the widths, and why."""
    experts = f"from {config.intermediate} to {wide.intermediate}"
    cut_ones = wide.intermediate < config.intermediate
    added = []
    if wide.hidden > config.hidden:
        added.append(f"widened from {config.hidden} to {wide.hidden} columns")
    if wide.intermediate > config.intermediate:
        added.append(f"experts {'' if added else 'widened '}{experts}")
    said = ([f"experts cut {experts} neurons"] if cut_ones else []) + added
    blocks = row_blocks(_codecs(slots))
    failing = sorted({block for width, block in blocks.items() if getattr(config, width) % block})
    why = f"because blocks of {' and '.join(map(str, failing))} do not divide the rows"
    if (recipe.hidden or recipe.intermediate) and wide != required(config, _codecs(slots)):
        why = "as asked for"
    ending = "; what is added is zeros and changes nothing" if added else ""
    return f"{', '.join(said)}, {why}{ending}"


def _uncut(config: ModelConfig, slots: Slots) -> str:
    block = row_blocks(_codecs(slots))["intermediate"]
    why = "widths are asked for" if config.intermediate % block else f"blocks of {block} divide them"
    return f"--widen cut cuts none of the experts' {config.intermediate} neurons: {why}"


def _codecs(slots: Slots) -> dict[str, str]:
    return {slot.name: slot.codec for group in slots.values() for slot in group}


def _text(wide: Widening) -> str:
    return f"{wide.hidden}x{wide.intermediate}"


# --- what stands against it --------------------------------------------------------------------------------------------


def _cut_width(config: ModelConfig, block: int) -> int:
    width = config.intermediate - config.intermediate % block
    if not width:
        raise Refused(
            "the experts cannot be cut: they have fewer neurons than one block holds",
            found=f"{config.intermediate} neurons", expected=f"at least {block}", remedy="widen them: --widen auto",
        )  # fmt: skip
    return width


def _require_cuttable(width: int, kept: int) -> None:
    """More than a quarter of the neurons by weight norm leaves another model."""
    if 4 * kept < 3 * width:
        raise Refused(
            "too many neurons would be cut", found=f"{kept} of {width} kept", expected=f"at least {-(-3 * width // 4)}",
            remedy="widen the experts instead: --widen auto",
        )  # fmt: skip
    if width > MOST_NEURONS:
        raise Refused("experts of so many neurons cannot be cut", found=width, expected=f"at most {MOST_NEURONS}")


def _require_fit(
    config: ModelConfig, slots: Slots, recipe: Recipe, wide: Widening, widening_remedy: str, place: object
) -> None:
    """Refuse the first tensor whose rows its codec does not divide."""
    columns = {"hidden": wide.hidden, "intermediate": wide.intermediate, "attention": config.q_rows}
    for name, group in slots.items():
        for slot in group:
            width = row_width(slot.name)
            if CODECS[slot.codec].fits(columns[width]):
                continue
            remedy = widening_remedy
            if width == "attention":
                fitting = [c for c in ("q8_0", "bf16") if CODECS[c].fits(columns[width])]
                remedy = f"no widening changes these; a recipe with another codec for attention: {', '.join(fitting)}"
            origin = recipe.origin(slot.name, split_name(name)[0], config.layers)
            raise Refused(
                "the codec's blocks do not divide the tensor's rows", file=place, tensor=slot.name,
                found=f"{columns[width]} columns; {recipe.name}: {origin}",
                expected=f"a multiple of {CODECS[slot.codec].block} for {slot.codec}", remedy=remedy,
            )  # fmt: skip


def _require_zeros(config: ModelConfig, slots: Slots, recipe: Recipe, wide: Widening, place: object) -> None:
    """Refuse an embedding whose codec would make something else of the zeros that are added."""
    (slot,) = slots[EMBEDDING]
    if holds_zeros(slot.codec, config.hidden):
        return
    able = [c.name for c in BY_GGML_ID.values() if c.fits(wide.hidden) and holds_zeros(c.name, config.hidden)]
    raise Refused(
        "the embedding's codec cannot hold the zeros that widening adds, and they enter the residual stream",
        file=place, tensor=slot.name,
        found=f"{wide.hidden} columns, zeros from {config.hidden} on; {recipe.name}: "
        f"{recipe.origin(slot.name, None, config.layers)}",
        expected=f"zeros in whole runs of {RUN[slot.codec]} for {slot.codec}",
        remedy=f"a recipe with another codec for the embedding: {', '.join(able)}",
    )  # fmt: skip

"""Forecasts from headers alone: how large the file of each type will be, to the byte, and whether it makes sense.

A type makes no sense for a source when it

- spends more bits on an expert's matrix than the source holds of it: nothing can be gained, every value is there already;
- gives a file larger than the lossless one, for a source whose experts are MXFP4 (experts as they are, the rest as it is).

A type is impossible for a source in which no width divides its rows, see gguf_widths.py.

`--experts` and `--dense` say what to spend: of MXFP4 and floating-point experts they get what they ask for, with a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.cut import KEY_DROPPED
from gptoss_convert.convert.gguf_widths import choose_widths, own_keys
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.plan import Slot, slot_bytes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.target_gguf import ALIGNMENT, general_metadata, gguf_slots, model_metadata
from gptoss_convert.convert.views import held_encodings
from gptoss_convert.convert.widen import Widening, widened_config
from gptoss_convert.errors import Refused
from gptoss_convert.formats.gguf import Value, ValueType, align, array, header_bytes
from gptoss_convert.kernels.codecs import CODECS, FLOATS
from gptoss_convert.quant.recipe import TYPES, Recipe, part_of, plain


@dataclass(frozen=True)
class Forecast:
    """One type of GGUF for one source. `bytes`: of the single file; bits: a weight; `senseless`, `impossible`: why, or None.

    Of an impossible type there are no sizes.
    """

    type: str
    bytes: int | None
    expert_bits: float | None
    bits: float | None
    widened: Widening | None
    senseless: str | None
    impossible: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        wide = self.widened and {"hidden": self.widened.hidden, "intermediate": self.widened.intermediate}
        return {**vars(self), "widened": wide}


def bits_per_weight(codec: str) -> float:
    """Bits of one value, scales included."""
    return 8 * CODECS[codec].block_bytes / CODECS[codec].block


class Forecaster:
    """Forecasts for one source; the metadata are built once."""

    def __init__(self, source: Source, name: str | None = None) -> None:
        self.source = source
        slots = gguf_slots(source.config, plain("mxfp4", "bf16"))
        keys = [*general_metadata(source, slots, name), *model_metadata(source, 0)]
        self._present = {key for key, _ in keys}
        self._keys_bytes = header_bytes(keys, [])
        experts = [view for name, view in source.views.items() if is_expert_matrix(name)]
        held = frozenset[str]().union(*map(held_encodings, experts))
        self.quantized = not held <= {"mxfp4", *FLOATS}
        self.lossless_bytes = self._size(self._as_it_is(slots), []) if held == {"mxfp4"} else None

    def every_type(self) -> list[Forecast]:
        """All known types, largest first, then the impossible ones."""
        found = [self.of(recipe) for recipe in TYPES.values()]
        return sorted(found, key=lambda f: (f.bytes is None, -(f.bytes or 0), f.type))

    def of(self, recipe: Recipe, mode: str = "auto") -> Forecast:
        """The forecast of one recipe, with --widen `mode`."""
        slots = gguf_slots(self.source.config, recipe)
        try:
            wide = choose_widths(self.source.config, slots, recipe, mode, self.source.path)
        except Refused as error:
            why = f"{error.what} ({error.tensor}: {error.found})"
            return Forecast(recipe.name, None, None, None, None, None, why)
        made = slots if wide is None else gguf_slots(widened_config(self.source.config, wide), recipe)
        tensors = [slot for group in made.values() for slot in group]
        size = self._size(tensors, [] if wide is None else self._own_keys(slots, recipe, wide))
        experts = [slot for slot in tensors if "_exps.weight" in slot.name]
        return Forecast(
            type=recipe.name,
            bytes=size,
            expert_bits=sum(8 * slot_bytes(slot) for slot in experts) / sum(map(_count, experts)),
            bits=8 * size / self.source.config.parameters,
            widened=wide,
            senseless=self._spent(made) or self._larger(size),
        )

    def _own_keys(self, slots: Mapping[str, list[Slot]], recipe: Recipe, wide: Widening) -> list[tuple[str, Value]]:
        true = self.source.config
        keys, _ = own_keys(self.source, slots, recipe, wide, self._present)
        if wide.intermediate < true.intermediate:
            dropped = [0] * (true.layers * true.experts * (true.intermediate - wide.intermediate))
            keys.append((KEY_DROPPED, array(ValueType.UINT16, dropped)))
        return keys

    def _size(self, tensors: list[Slot], own: list[tuple[str, Value]]) -> int:
        infos = [(slot.name, len(slot.shape)) for slot in tensors]
        head = self._keys_bytes + header_bytes(own, infos) - header_bytes([], [])
        return align(head, ALIGNMENT) + sum(align(slot_bytes(slot), ALIGNMENT) for slot in tensors)

    def _as_it_is(self, slots: Mapping[str, list[Slot]]) -> list[Slot]:
        """The tensors of the file that keeps every matrix in its own encoding."""
        return [
            slot if part_of(slot.name) is None else Slot(slot.name, self._own(name, slot), slot.shape)
            for name, group in slots.items()
            for slot in group
        ]

    def _own(self, name: str, slot: Slot) -> str:
        encoding = self.source.views[name].encoding
        return encoding if CODECS[encoding].fits(slot.shape[-1]) else "f32"

    def _spent(self, slots: Mapping[str, list[Slot]]) -> str | None:
        """The expert matrix on which most bits are spent for nothing, in words."""
        excess: list[tuple[float, str]] = []
        for name, group in slots.items():
            if not is_expert_matrix(name):
                continue
            held = max(map(bits_per_weight, held_encodings(self.source.views[name])))
            for slot in group:
                spent = bits_per_weight(slot.codec)
                if spent > held:
                    spending = (
                        f"{slot.codec} spends {spent:g} bits a weight on experts that hold {held:g} ({slot.name})"
                    )
                    excess.append((spent - held, f"{spending}: nothing can be gained"))
        return max(excess, key=lambda item: item[0])[1] if excess else None

    def _larger(self, size: int) -> str | None:
        if self.lossless_bytes is None or size <= self.lossless_bytes:
            return None
        return f"{size:,} bytes, more than the {self.lossless_bytes:,} of the lossless file"


def require_sense(source: Source, recipe: Recipe, mode: str, *, allow_larger: bool, asked: bool) -> list[str]:
    """Refuse a recipe whose file would be larger than the lossless one, or spend bits on experts for nothing.

    asked: whether --experts and --dense named the codecs. Then it is said in a note (returned) where the source is MXFP4, and
    passes where it is floats.
    """
    forecaster = Forecaster(source)
    forecast = forecaster.of(recipe, mode)
    if forecast.senseless is None:
        return []
    if asked and not forecaster.quantized:
        return [forecast.senseless] if forecaster.lossless_bytes is not None else []
    if not allow_larger:
        raise Refused(
            f"the type {recipe.name} makes no sense for this source",
            file=source.path,
            found=forecast.senseless,
            expected="a smaller file, or one that spends no bits for nothing",
            remedy="gptoss-convert plan lists every type; no --type at all keeps what the source has; "
            "--allow-larger writes it all the same",
        )
    return []


def _count(slot: Slot) -> int:
    total = 1
    for size in slot.shape:
        total *= size
    return total

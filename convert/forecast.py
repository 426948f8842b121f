"""Forecasts from headers alone: how large the file of each type will be, to the byte, and whether it makes sense.

A type makes no sense for a source whose experts are MXFP4 (4.25 bits a weight) when it

- spends more bits on experts: nothing can be gained, every value is there already;
- gives a file larger than the lossless one (experts MXFP4, the rest as it is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.cut import KEY_DROPPED
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.plan import Slot, slot_bytes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.target_gguf import ALIGNMENT, build_metadata, gguf_slots, widening_keys
from gptoss_convert.convert.widen import Widening, required, widened_config
from gptoss_convert.errors import Refused
from gptoss_convert.formats.gguf import Value, ValueType, align, array, header_bytes
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.quant.recipe import TYPES, Recipe, plain

MXFP4_BITS = 8 * CODECS["mxfp4"].block_bytes / CODECS["mxfp4"].block


@dataclass(frozen=True)
class Forecast:
    """One type of GGUF for one source. `bytes`: of the single file; bits: a weight; `senseless`: why not, or None."""

    type: str
    bytes: int
    expert_bits: float
    bits: float
    widened: Widening | None
    senseless: str | None

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
        lossless = gguf_slots(source.config, plain("mxfp4", "bf16"))
        tensors = [slot for group in lossless.values() for slot in group]
        self._keys = build_metadata(source, tensors, name)
        self._keys_bytes = header_bytes(self._keys, [])
        self._packed = all(v.encoding == "mxfp4" for n, v in source.views.items() if is_expert_matrix(n))
        self.lossless_bytes = self.file_bytes(plain("mxfp4", "bf16")) if self._packed else None

    def every_type(self) -> list[Forecast]:
        """All known types, largest first."""
        return sorted(
            (self.of(recipe) for recipe in TYPES.values() if all(c in CODECS for c in recipe.codecs.values())),
            key=lambda f: (-f.bytes, f.type),
        )

    def of(self, recipe: Recipe) -> Forecast:
        """The forecast of one recipe."""
        wide = self.widening(recipe)
        slots = self._slots(recipe, wide)
        size = self._size(slots, wide)
        experts = {slot.name: slot for slot in slots if "_exps.weight" in slot.name}
        weights = sum(_count(slot) for slot in experts.values())
        spent = sum(8 * slot_bytes(slot) for slot in experts.values())
        return Forecast(
            type=recipe.name,
            bytes=size,
            expert_bits=spent / weights,
            bits=8 * size / self.source.config.parameters,
            widened=wide,
            senseless=self._senseless({slot.name: slot.codec for slot in experts.values()}, size),
        )

    def widening(self, recipe: Recipe) -> Widening | None:
        """What the recipe's blocks need."""
        slots = gguf_slots(self.source.config, recipe)
        codecs = {slot.name: slot.codec for group in slots.values() for slot in group}
        return required(self.source.config, codecs, (recipe.hidden, recipe.intermediate))

    def file_bytes(self, recipe: Recipe) -> int:
        """Exactly the bytes of the single file that `convert` writes."""
        wide = self.widening(recipe)
        return self._size(self._slots(recipe, wide), wide)

    def _slots(self, recipe: Recipe, wide: Widening | None) -> list[Slot]:
        config: ModelConfig = self.source.config if wide is None else widened_config(self.source.config, wide)
        return [slot for group in gguf_slots(config, recipe).values() for slot in group]

    def _size(self, slots: list[Slot], wide: Widening | None) -> int:
        true = self.source.config
        own: list[tuple[str, Value]] = widening_keys(self.source) if wide is not None else []
        if wide is not None and wide.intermediate < true.intermediate:
            dropped = [0] * (true.layers * true.experts * (true.intermediate - wide.intermediate))
            own.append((KEY_DROPPED, array(ValueType.UINT16, dropped)))
        head = self._keys_bytes + header_bytes(own, [(s.name, len(s.shape)) for s in slots]) - header_bytes([], [])
        return align(head, ALIGNMENT) + sum(align(slot_bytes(slot), ALIGNMENT) for slot in slots)

    def _senseless(self, experts: Mapping[str, str], size: int) -> str | None:
        if not self._packed or self.lossless_bytes is None:
            return None
        name, codec = max(experts.items(), key=lambda item: bits_per_weight(item[1]))
        if bits_per_weight(codec) > MXFP4_BITS:
            return (
                f"{codec} spends {bits_per_weight(codec):g} bits a weight on experts that hold {MXFP4_BITS:g} "
                f"({name}): nothing can be gained"
            )
        if size > self.lossless_bytes:
            return f"{size:,} bytes, more than the {self.lossless_bytes:,} of the lossless file"
        return None


def require_sense(source: Source, recipe: Recipe) -> None:
    """Refuse a recipe whose file would be larger than the lossless one, or spend bits on experts for nothing."""
    forecast = Forecaster(source).of(recipe)
    if forecast.senseless is not None:
        raise Refused(
            f"the type {recipe.name} makes no sense for this source",
            file=source.path,
            found=forecast.senseless,
            expected="a smaller file; the lossless one is --type mxfp4, or no --type at all",
            remedy="gptoss-convert plan lists every type; --allow-larger writes it all the same",
        )


def _count(slot: Slot) -> int:
    total = 1
    for size in slot.shape:
        total *= size
    return total

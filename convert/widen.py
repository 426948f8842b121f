"""Widening: a wider model that computes the same function, so that codecs with blocks of 256 divide its rows.

2880 = 11·256 + 64, so no K- or i-type fits a gpt-oss row. With the residual stream D widened to D' and each expert's F to F' by
zeros, they do, and no runtime needs to know:

    tensor                     change
    embedding, head            zero columns
    attention and mlp norm,    gain · √(D/D'), zeros beyond D; epsilon · D/D'. The mean square over D' of a vector with
    final norm                 D' − D zeros is D/D' of that over D, so the normed vector comes out the same
    q, k, v, router            zero columns
    attention output, down     zero rows, zero bias
    gate, up                   zero columns, zero rows, zero bias: gate 0 makes the activation 0
    down                       zero columns

Heads, rope and the router's choice are untouched. A gain is widened in float64 and rounded to float32. Where every gain of the
model is a bfloat16 (as in a release, and in any GGUF made from one), dividing and rounding to bfloat16 gives the original back:
nothing of it is lost. Otherwise what comes back may be off by float32's rounding, 2^-23 of the gain at most (`gain_encoding`).

The file says what it is by keys of our own, from which `narrow` makes the original's views again: the proof and every later
comparison are against the source, not against a widened copy. A file of ours that is widened to the widths it has keeps its bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import Shape, as_stack, canonical_shapes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Stack, View, read_encoding
from gptoss_convert.errors import Refused
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, FLOATS, encode_float
from gptoss_convert.kernels.floats import F32

Widths = tuple[int | None, int | None]  # D' and F' as asked for; None: by arithmetic
KEY_HIDDEN = "gptoss-convert.widened.hidden"  # the true D
KEY_INTERMEDIATE = "gptoss-convert.widened.intermediate"  # the true F
KEY_GAIN = "gptoss-convert.widened.gain_encoding"  # what the norms' gains are rounded to on the way back
GAIN_ROUNDING = 2.0**-23  # two roundings to float32, of a gain and of its way back
GAINS_ROUNDED = "the norms' gains are rounded to float32 by widening, by 2^-23 of each at most"


@dataclass(frozen=True)
class Widening:
    """From D to `hidden` and from F to `intermediate`."""

    hidden: int
    intermediate: int


def required(config: ModelConfig, codecs: Mapping[str, str], asked: Widths = (None, None)) -> Widening | None:
    """The least widening that makes every GGUF tensor's rows divide by its codec's block; None where they do.

    codecs: GGUF name → codec. asked: (D', F') that the user chose instead, either of them None; an F' below F means that
    neurons are cut. Refuses a D' below D, whose channels all experts share.
    """
    least = (_up(getattr(config, width), block) for width, block in row_blocks(codecs).items())
    hidden, intermediate = (chosen or width for chosen, width in zip(asked, least, strict=True))
    if hidden < config.hidden:
        raise Refused(
            "the residual stream cannot be made narrower: all its channels are in use",
            found=f"{hidden} columns asked for", expected=f"{config.hidden} or more",
        )  # fmt: skip
    return None if (hidden, intermediate) == (config.hidden, config.intermediate) else Widening(hidden, intermediate)


def row_blocks(codecs: Mapping[str, str]) -> dict[str, int]:
    """What the rows of each width must be multiples of, for codecs by GGUF name."""
    blocks = {"hidden": 1, "intermediate": 1}
    for name, codec in codecs.items():
        width = row_width(name)
        if width != "attention":
            blocks[width] = math.lcm(blocks[width], CODECS[codec].block)
    return blocks


def row_width(name: str) -> str:
    """Which width the rows of a GGUF matrix have: hidden, intermediate, or attention's H·hd, which no widening changes."""
    if ".attn_output.weight" in name:
        return "attention"
    return "intermediate" if ".ffn_down_exps.weight" in name else "hidden"


def _up(width: int, block: int) -> int:
    return width + -width % block


def widened_config(config: ModelConfig, widening: Widening) -> ModelConfig:
    """The configuration of the wide model; epsilon shrinks with the mean."""
    share = config.hidden / widening.hidden
    return replace(config, hidden=widening.hidden, intermediate=widening.intermediate, rms_eps=config.rms_eps * share)


def is_gain(name: str) -> bool:
    """Whether a canonical tensor is a norm's gain over the residual stream."""
    return name.endswith("layernorm.weight") or name == "model.norm.weight"


def gain_factor(true_width: int, width: int) -> float:
    """What a gain is multiplied with when its vector is widened: √(D/D')."""
    return math.sqrt(true_width / width)


def gain_encoding(source: Source, widening: Widening) -> tuple[str, bool]:
    """What gains are rounded to on their way back, and whether every one comes back as it is.

    Only where the gains are stored in float32, their values are read: they may be bfloat16's all the same.
    """
    factor = gain_factor(source.config.hidden, widening.hidden)
    gains = [view for name, view in source.views.items() if is_gain(name)]
    held = {view.encoding for view in gains}
    made = all(isinstance(view, Gain) and view.base.stack == (1, 1, widening.hidden) for view in gains)
    if held in ({"bf16"}, {"f16"}) or made:
        return gains[0].encoding, True
    values = [view.read(0, 0, 1).values() for view in gains]
    for encoding in FLOATS:
        back = (_unscaled(_scaled(gain, factor), factor, encoding).values() for gain in values)
        if all(map(np.array_equal, back, values)):
            return encoding, True
    return "f32", False


def _scaled(values: F32, factor: float) -> F32:
    return values if factor == 1.0 else (values.astype(np.float64) * factor).astype(np.float32)


def _unscaled(values: F32, factor: float, encoding: str) -> Rows:
    return Rows(encoding, encode_float((values.astype(np.float64) / factor).astype(np.float32), encoding))


def widen(source: Source, widening: Widening) -> Source:
    """The same source as the wide model."""
    config = widened_config(source.config, widening)
    factor = gain_factor(source.config.hidden, widening.hidden)
    shapes = canonical_shapes(config)
    views: dict[str, View] = {}
    for name, view in source.views.items():
        stack = as_stack(shapes[name])
        if isinstance(view, Gain) and view.base.stack == stack:
            views[name] = view.base  # of a wide file of ours in the very widths: not rounded again
        else:
            views[name] = Wide(view, stack, factor if is_gain(name) else 1.0)
    return replace(source, config=config, views=views)


@dataclass(frozen=True)
class Wide:
    """A view with zero rows and columns added up to `stack`, and values multiplied with `factor`."""

    base: View
    stack: Stack
    factor: float = 1.0

    @property
    def encoding(self) -> str:
        """As the base; float32 where a factor or a width in mid-block makes new values."""
        held = read_encoding(self.base)
        return held if self.factor == 1.0 and CODECS[held].fits(self.stack[2]) else "f32"

    @property
    def true_columns(self) -> int:
        """Columns that hold the model's own values."""
        return self.base.stack[2]

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        _, rows, columns = self.base.stack
        chunk = self.base.read(expert, min(start, rows), min(stop, rows))
        height, width = stop - start, self.stack[2]
        if self.encoding == "mxfp4" and isinstance(chunk, Mxfp4):
            groups = width // mxfp4.BLOCK
            blocks = np.zeros((height, groups, mxfp4.CODE_BYTES), np.uint8)
            scales = np.zeros((height, groups), np.uint8)
            blocks[: chunk.shape[0], : chunk.scales.shape[1]] = chunk.blocks
            scales[: chunk.shape[0], : chunk.scales.shape[1]] = chunk.scales
            return Mxfp4(blocks, scales)
        if self.encoding not in FLOATS and isinstance(chunk, Rows):  # blocks of zero bytes are zeros in every codec
            data = np.zeros((height, CODECS[self.encoding].row_bytes(width)), np.uint8)
            data[: chunk.shape[0], : chunk.data.shape[1]] = chunk.data
            return Rows(self.encoding, data)
        values = np.zeros((height, width), np.float32)
        if chunk.shape[0]:
            values[: chunk.shape[0], :columns] = _scaled(chunk.values(), self.factor)
        return Rows(self.encoding, encode_float(values, self.encoding))


# --- back --------------------------------------------------------------------------------------------------------------


def narrow(source: Source, hidden: int, intermediate: int, gain_encoding: str) -> Source:
    """The model that a wide file was made of: true widths, gains and epsilon."""
    wide = source.config
    eps = _true_eps(wide.rms_eps, hidden / wide.hidden)
    config = replace(wide, hidden=hidden, intermediate=intermediate, rms_eps=eps)
    factor = gain_factor(hidden, wide.hidden)
    shapes: dict[str, Shape] = canonical_shapes(config)
    views: dict[str, View] = {}
    for name, view in source.views.items():
        stack = as_stack(shapes[name])
        if is_gain(name):
            views[name] = Gain(view, stack, factor, gain_encoding)
        else:
            views[name] = view if view.stack == stack else Cropped(view, stack)
    return replace(source, config=config, views=views, wide=wide, wide_views=source.views)


def _true_eps(wide: float, share: float) -> float:
    """The shortest decimal whose `share` is the wide epsilon, as float32 holds it."""
    candidates = (float(f"{wide / share:.{digits}g}") for digits in range(1, 18))
    return next((eps for eps in candidates if np.float32(eps * share) == np.float32(wide)), wide / share)


@dataclass(frozen=True)
class Cropped:
    """The first rows and columns of a view. Columns cut in mid-block come out as float32 values, exactly."""

    base: View
    stack: Stack

    @property
    def as_values(self) -> bool:
        """Whether it is read as float32, whatever the file holds."""
        return not CODECS[self.encoding].fits(self.stack[2])

    @property
    def encoding(self) -> str:
        """As the base: what the file holds."""
        return self.base.encoding

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        chunk, columns = self.base.read(expert, start, stop), self.stack[2]
        if isinstance(chunk, Mxfp4) and columns % mxfp4.BLOCK == 0:
            groups = columns // mxfp4.BLOCK
            return Mxfp4(np.ascontiguousarray(chunk.blocks[:, :groups]), np.ascontiguousarray(chunk.scales[:, :groups]))
        if isinstance(chunk, Rows) and CODECS[chunk.encoding].fits(columns):
            size = CODECS[chunk.encoding].row_bytes(columns)
            return Rows(chunk.encoding, np.ascontiguousarray(chunk.data[:, :size]))
        values = np.ascontiguousarray(chunk.values()[:, :columns])
        return Rows("f32", encode_float(values, "f32"))


@dataclass(frozen=True)
class Gain:
    """A norm's gain with the widening's factor taken out again, rounded to the encoding it once had."""

    base: View
    stack: Stack
    factor: float
    encoding: str

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        return _unscaled(self.base.read(expert, start, stop).values()[:, : self.stack[2]], self.factor, self.encoding)

"""Checkpoints whose experts are integers in compressed-tensors' form under vLLM's names: what `target_compressed` writes.

    experts.N.{w13,w2}_weight_packed I32 [R, C·b/32] + _weight_scale BF16 [R, C/32]      b 4 or 8: codecs int4_g32, int8_g32
    experts.{gate_up_proj,down_proj} I8 [E, C, R]    + .weight_scale [E, 1, R]           codec int8_channel
    self_attn.q_proj.weight_packed, _scale, _shape; or .weight I8 [R, C] + .weight_scale [R, 1]; or .weight in floats

Recognised by the tensors' names, and read only if config.json's quantization_config and every `weight_shape` (16 bytes, read on
opening) say the same. Other compressed-tensors checkpoints are not read: their `gate_proj` has two meanings that nothing in them
tells apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_convert.config import ModelConfig, from_hf
from gptoss_convert.convert.artifact_card import CARD, MODELING, SOURCE_CARD, modeling_file
from gptoss_convert.convert.companions import Companion, ReadOnce
from gptoss_convert.convert.names import DOWN, GATE_UP, as_stack, canonical_shapes, is_expert_matrix, split_name
from gptoss_convert.convert.source import Layout, Problem, Source
from gptoss_convert.convert.source_safetensors import Located, Tensors
from gptoss_convert.convert.views import PerExpert, Stack, Stored, Transposed, View
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.tree import resolve_inside
from gptoss_convert.kernels.chunks import Rows
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import U8
from gptoss_convert.kernels.int_rows import GROUP, join

_STREAMED = {GATE_UP: "w13", DOWN: "w2"}
_PACKED_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.(w13|w2)_weight_packed$")
_CODECS = {4: "int4_g32", 8: "int8_g32"}


@dataclass(frozen=True)
class Grouped:
    """A matrix as packed codes and group scales, in two tensors: rows of int4_g32 or int8_g32."""

    codes: SourceFile
    codes_offset: int
    scales: SourceFile
    scales_offset: int
    encoding: str
    stack: Stack

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        groups = self.stack[2] // GROUP
        sizes = [groups * nbytes for nbytes in CODECS[self.encoding].fields]
        parts = [
            _bytes(file, offset + start * size, stop - start, size)
            for file, offset, size in (
                (self.scales, self.scales_offset, sizes[0]),
                (self.codes, self.codes_offset, sizes[1]),
            )
        ]
        return Rows(self.encoding, join(self.encoding, *parts))


@dataclass(frozen=True)
class Channels:
    """Bare int8 codes, possibly stored transposed, and a scale for each row: rows of int8_channel."""

    base: View
    scales: View  # of stack (E, R, 1)

    encoding = "int8_channel"

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        codes, scales = self.base.read(expert, start, stop), self.scales.read(expert, start, stop)
        assert isinstance(codes, Rows)
        return Rows(self.encoding, join(self.encoding, scales.values().view(np.uint8), codes.data))


def _bytes(file: SourceFile, offset: int, rows: int, row_bytes: int) -> U8:
    return file.read_array(offset, rows * row_bytes).reshape(rows, row_bytes)


def has_integer_experts(tensors: Tensors) -> bool:
    """Whether the names are vLLM's for integer experts."""
    for name, tensor in tensors.items():
        if _PACKED_EXPERT.search(name):
            return True
        if name.endswith(GATE_UP) and tensor.entry.dtype == "I8" and name + ".weight_scale" in tensors:
            return True
    return False


def open_compressed(folder: Path, tensors: Tensors, path: Path, table: Mapping[str, Any], digest: str) -> Source:
    """The source, but for what all safetensors sources have in common. path, table, digest: of config.json."""
    bits = _bits(table.get("quantization_config"), path)
    plain = {key: value for key, value in table.items() if key != "quantization_config"}
    if _names_our_code(plain.get("auto_map")):
        del plain["auto_map"]  # never run here; other code is refused with the rest of the configuration
    config = from_hf(plain, path)
    source = Source(folder, Layout.COMPRESSED, config, {}, [], config_table=plain, config_sha256=digest)
    _Reader(source, tensors, config, bits).read()
    _note_code(source, folder)
    return source


def companions_of_source(companions: Mapping[str, Companion], folder: Path) -> dict[str, Companion]:
    """The companions without our card, which is true of this folder only: the card it was made from takes its place."""
    kept = {name: companion for name, companion in companions.items() if name != CARD}
    if (folder / SOURCE_CARD).exists():
        kept[CARD] = ReadOnce(resolve_inside(folder, SOURCE_CARD))
    return kept


def _names_our_code(auto_map: object) -> bool:
    names = list(auto_map.values()) if isinstance(auto_map, dict) else []
    return bool(names) and all(isinstance(name, str) and name.startswith(MODELING + ".") for name in names)


def _note_code(source: Source, folder: Path) -> None:
    file = f"{MODELING}.py"
    if not (folder / file).exists():
        source.notes.append(f"{file} is missing: transformers cannot load this folder")
    elif ReadOnce(resolve_inside(folder, file))() != modeling_file():
        source.notes.append(
            f"{file} is not this version's: transformers runs it with trust_remote_code=True; read it before"
        )


def _bits(method: object, path: Path) -> int | None:
    """Bits of packed groups, or None for int8 with a scale for each output, as config.json says."""
    if not isinstance(method, dict) or method.get("quant_method") != "compressed-tensors":
        found = method.get("quant_method") if isinstance(method, dict) else None
        raise BadInput(
            "the experts are integers, and config.json does not say how they are to be read", file=path,
            found=f"quantization_config of {found}", expected="quant_method compressed-tensors",
        )  # fmt: skip
    groups = method.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if isinstance(weights, dict):
        common = (weights.get("type"), weights.get("symmetric"), weights.get("actorder"))
        strategy, bits, size = (weights.get(key) for key in ("strategy", "num_bits", "group_size"))
        if common == ("int", True, None):
            if strategy == "group" and bits in _CODECS and size == GROUP:
                return int(bits)
            if strategy == "channel" and bits == 8:
                return None
    raise BadInput(
        "a form of compressed-tensors that is not read", file=path, found=f"weights {weights}",
        expected=f"one group of symmetric integers: 4 or 8 bits in groups of {GROUP}, or 8 bits by channel",
    )  # fmt: skip


class _Reader:
    """Builds the views; what is missing or has a wrong form becomes a problem."""

    def __init__(self, source: Source, tensors: Tensors, config: ModelConfig, bits: int | None) -> None:
        self.source, self.tensors, self.config, self.bits = source, tensors, config, bits

    def read(self) -> None:
        for name, shape in canonical_shapes(self.config).items():
            if is_expert_matrix(name):
                self._experts(name) if self.bits else self._channels(name, name, name + ".weight_scale")
            elif name.endswith("_proj.weight") and name + "_packed" in self.tensors:
                self._attention(name, shape)
            elif name.endswith("_proj.weight") and name + "_scale" in self.tensors:
                self._channels(name, name, name + "_scale")
            elif name in self.tensors:
                self._add(name, self.tensors[name].stored(), name)

    def _add(self, name: str, view: View, *names: str) -> None:
        self.source.views[name], self.source.names[name] = view, names

    def _problem(self, what: str, tensor: str, found: str, expected: str) -> None:
        self.source.problems.append(Problem(what, tensor, found, expected))

    def _located(self, name: str, *there: str) -> list[Located] | None:
        """The tensors that a canonical one is read from; None, and the missing ones named, if not all are there."""
        missing = [n for n in there if n not in self.tensors]
        if missing:
            self.source.names[name] = tuple(n for n in there if n in self.tensors) or (name,)
            self.source.problems.extend(Problem("a tensor is missing", n) for n in missing)
            return None
        return [self.tensors[n] for n in there]

    def _experts(self, name: str) -> None:
        layer, inner = split_name(name)
        stems = [f"model.layers.{layer}.mlp.experts.{e}.{_STREAMED[inner]}_" for e in range(self.config.experts)]
        names = [stem + part for stem in stems for part in ("weight_packed", "weight_scale")]
        found = self._located(name, *names)
        if found is None:
            return
        self.source.names[name] = tuple(names)
        views = [self._grouped(*found[at : at + 2]) for at in range(0, len(found), 2)]
        if all(view is not None for view in views):
            self._add(name, PerExpert([view for view in views if view is not None]), *names)

    def _grouped(self, codes: Located, scales: Located) -> Grouped | None:
        assert self.bits
        words, groups = codes.entry.shape, scales.entry.shape
        wanted = (*groups[:-1], groups[-1] * self.bits) if groups else ()  # a group of 32 takes as many words as bits
        forms = (codes.entry.dtype, scales.entry.dtype, len(groups))
        if forms != ("I32", "BF16", 2) or words != wanted:
            found = f"{codes.entry.dtype} {list(words)}, scales {scales.entry.dtype} {list(groups)}"
            expected = f"I32 [R, C·{self.bits}/32], BF16 [R, C/32]"
            self._problem("packed integers of the wrong form", codes.entry.name, found, expected)
            return None
        stack = (1, groups[0], groups[1] * GROUP)
        return Grouped(
            codes.file, codes.entry.offset, scales.file, scales.entry.offset, _CODECS[self.bits], stack,
        )  # fmt: skip

    def _attention(self, name: str, shape: tuple[int, ...]) -> None:
        names = [name + part for part in ("_packed", "_scale", "_shape")]
        found = self._located(name, *names)
        if found is None:
            return
        self.source.names[name] = tuple(names)
        if self.bits is None:
            self._problem("packed integers beside channels", names[0], "pack-quantized", "int8 with a scale a row")
            return
        said = found[2].file.read_array(found[2].entry.offset, found[2].entry.nbytes)
        if found[2].entry.dtype != "I64" or said.view("<i8").tolist() != list(shape):
            self._problem("a weight_shape does not fit", names[2], f"{said[:16].tolist()} as bytes", f"I64 {shape}")
            return
        view = self._grouped(found[0], found[1])
        if view is not None:
            self._add(name, view, *names)

    def _channels(self, name: str, codes_name: str, scales_name: str) -> None:
        found = self._located(name, codes_name, scales_name)
        if found is None:
            return
        self.source.names[name] = (codes_name, scales_name)
        codes, scales = found[0].entry, found[1].entry
        stacked = len(codes.shape) == 3
        rows = codes.shape[-1] if stacked else codes.shape[0] if codes.shape else 0
        wanted = (codes.shape[0], 1, rows) if stacked else (rows, 1)
        encoding = found[1].encoding
        if codes.dtype != "I8" or not 2 <= len(codes.shape) <= 3 or encoding is None or scales.shape != wanted:
            text = f"{codes.dtype} {list(codes.shape)}, scales {scales.dtype} {list(scales.shape)}"
            self._problem("int8 channels of the wrong form", codes_name, text, "I8, floating-point scales [R, 1]")
            return
        stored = Stored(found[0].file, codes.offset, "int8", as_stack(codes.shape))
        base: View = Transposed(stored) if stacked else stored
        view = Channels(base, Stored(found[1].file, scales.offset, encoding, (*base.stack[:2], 1)))
        self._add(name, view, codes_name, scales_name)

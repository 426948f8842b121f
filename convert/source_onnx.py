"""ONNX folders that this tool wrote: what `target_onnx` writes, read back as the canonical model.

The graph is not interpreted. It is made again from config.json and the variant that its metadata name, and must be the same byte
for byte; so are the rotary tables. Then every tensor lies where the layout says, and computes what the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_convert.config import from_hf
from gptoss_convert.convert.companions import collect_companions
from gptoss_convert.convert.names import as_stack, canonical_shapes
from gptoss_convert.convert.onnx_graph import PRODUCER, build
from gptoss_convert.convert.onnx_layout import (
    DATA_FILE,
    METADATA,
    MODEL_FILE,
    Home,
    Variant,
    cache_tensors,
    homes,
    placed,
    read_variant,
    require_runnable,
    yarn,
)
from gptoss_convert.convert.plan import BLOCKS
from gptoss_convert.convert.source import Layout, Source, StoredTensor
from gptoss_convert.convert.source_safetensors import read_config
from gptoss_convert.convert.views import Packed, RowRange, Stack, Stored, View
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.onnx import TYPE_NAMES, Header, Tensor, model_bytes, read_header, require_ranges
from gptoss_convert.formats.tree import resolve_inside
from gptoss_convert.kernels.chunks import Rows
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.int_rows import join
from gptoss_convert.kernels.rotary import table_rows


@dataclass(frozen=True)
class Blocks:
    """A stack of matrices as codes and scales, in two ranges of one file: rows of a codec of `signed_blocks`."""

    file: SourceFile
    codes_offset: int
    scales_offset: int
    encoding: str
    stack: Stack

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        _, rows, columns = self.stack
        first, count = expert * rows + start, stop - start
        parts = [
            self.file.read_array(offset + first * size, count * size).reshape(count, size)
            for offset, size in zip(
                (self.scales_offset, self.codes_offset), CODECS[self.encoding].field_bytes(columns), strict=True
            )
        ]
        return Rows(self.encoding, join(self.encoding, *parts))


def open_onnx(folder: Path) -> Source:
    """The source; BadInput for graphs that are not this tool's, or not what its own configuration makes."""
    files: list[SourceFile] = []
    try:
        files.append(SourceFile(resolve_inside(folder, MODEL_FILE), MODEL_FILE))
        header = read_header(files[0])
        variant = read_variant(header.metadata.get(METADATA), files[0].path)
        files.append(SourceFile(resolve_inside(folder, DATA_FILE), DATA_FILE))
        path, table, digest = read_config(folder)
        config = from_hf(table, path)
        require_runnable(config, path)
        found = homes(config, variant)
        tensors = placed(config, found)
        model, data = files
        if bytes(model.read(0, model.size)) != model_bytes(build(config, variant, tensors, header.version), DATA_FILE):
            raise BadInput(
                "the graph is not the one that config.json makes", file=model.path,
                found=f"written by {header.producer} {header.version}", expected=f"{PRODUCER}'s graph, unchanged",
                remedy="if an older version of this tool wrote it, convert its source again",
            )  # fmt: skip
        require_ranges(header, model, data)
        source = Source(folder, Layout.ONNX, config, {}, files, config_table=table, config_sha256=digest)
        _require_tables(source, data)
    except BaseException:
        for file in files:
            file.close()
        raise
    at = {tensor.name: tensor for tensor in tensors}
    stacks = {name: as_stack(shape) for name, shape in canonical_shapes(config).items()}
    for name, home in found.items():
        source.views[name] = _view(home, at, stacks[name], data)
        source.names[name] = tuple(slot.name for slot in home.slots)
    source.stored = _stored(header)
    source.companions = collect_companions(folder)
    source.check_shapes()
    return source


def variant_of(folder: Path) -> Variant:
    """The variant of a folder of ours, from its graph alone."""
    with SourceFile(resolve_inside(folder, MODEL_FILE), MODEL_FILE) as file:
        return read_variant(read_header(file).metadata.get(METADATA), file.path)


def _view(home: Home, at: Mapping[str, Tensor], stack: Stack, data: SourceFile) -> View:
    first = at[home.slots[0].name]
    if home.slots[0].codec == BLOCKS:
        _, rows, columns = stack
        scales = at[home.slots[1].name].offset
        strides = (rows * columns // 2, rows * columns // 32)
        return Packed(data, first.offset, data, scales, stack, *strides)
    slot = home.slots[0]
    total = slot.shape[-2] if len(slot.shape) > 1 else slot.shape[0]
    vector = len(slot.shape) == 1
    whole = (1, 1, total) if vector else (stack[0], total, stack[2])
    view: View
    if len(home.slots) == 1:
        view = Stored(data, first.offset, slot.codec, whole)
    else:
        view = Blocks(data, first.offset, at[home.slots[1].name].offset, slot.codec, whole)
    rows = stack[2] if vector else stack[1]
    return view if total == rows else RowRange(view, slot.first_row, rows, total, columns=vector)


def _require_tables(source: Source, data: SourceFile) -> None:
    """A unit in the last place is left to the machine that wrote the file: its C library may round another way."""
    config = source.config
    for first, *made in table_rows(yarn(config), config.max_positions):
        for tensor, rows in zip(cache_tensors(config), made, strict=True):
            at = tensor.offset + first * rows.shape[1] * 4
            found = data.read_array(at, rows.nbytes).view("<i4").reshape(rows.shape).astype(np.int64)
            if (np.abs(found - rows.view("<i4")) > 1).any():
                raise BadInput(
                    "a rotary table is not the one that config.json makes", file=data.path, tensor=tensor.name,
                    found=f"other values from position {first} on",
                    remedy="the file is corrupt, or made for another configuration",
                )  # fmt: skip


def _stored(header: Header) -> list[StoredTensor]:
    return [
        StoredTensor(t.name, TYPE_NAMES[t.kind], t.shape, t.nbytes, DATA_FILE if t.raw is None else MODEL_FILE)
        for t in header.tensors.values()
    ]

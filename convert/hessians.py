"""Full Hessians on disk: of every matrix's inputs the mean of x xᵀ, a file a layer. `calibrate --hessians FOLDER` writes them.

    FOLDER/
        layer-0000.safetensors …    model.layers.0.mlp.experts.gate_up_proj.hessian     F32 [E, C (C + 1) / 2]
                                    model.layers.0.mlp.experts.gate_up_proj.own_tokens  I64 [E]
        head.safetensors            lm_head.weight.hessian, …
        gptoss-hessians.json        what they were made from, and the model's widths

A Hessian is symmetric: the file has its upper triangle, row after row (`numpy.triu` order). q, k and v have the same inputs and
one Hessian, under q's name. Experts' are shrunk already (quant/shrinkage.py). Of gpt-oss-20b a layer takes 1.1 GB, the whole
27 GB; of 120b 4.3 GB and 155 GB. The space is reserved before the first byte; a killed run is taken up after the last layer
whose bytes have their digest, as the statistics' are. Memory: about ten Hessians of the widest input (330 MB).

Here the inputs are those of the source's own layers; `--method gptq` with a text has each layer's from the rounded ones before
it, which is better by what rounding changes in them, and takes a pass of its own for every artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import DOWN, GATE_UP, HEAD, as_stack, canonical_shapes, layer_name
from gptoss_convert.errors import BadInput
from gptoss_convert.formats import safetensors
from gptoss_convert.formats.files import SourceFile, parse_json
from gptoss_convert.formats.output import Output

MARKER = "gptoss-hessians.json"
VALUES, OWN = ".hessian", ".own_tokens"
_QKV = tuple(f"self_attn.{p}_proj.weight" for p in "qkv")
_INNER = (_QKV[0], "self_attn.o_proj.weight", GATE_UP, DOWN)
Bools = NDArray[np.bool_]


def stored_name(name: str) -> str:
    """The matrix under whose name a matrix's Hessian lies: k and v have q's."""
    for inner in _QKV[1:]:
        if name.endswith(inner):
            return name.removesuffix(inner) + _QKV[0]
    return name


def file_of(layer: int | None) -> str:
    """The file of a layer, or of the head."""
    return "head.safetensors" if layer is None else f"layer-{layer:04}.safetensors"


def _tensors(config: ModelConfig, layer: int | None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    shapes = canonical_shapes(config)
    for name in [HEAD] if layer is None else [layer_name(layer, inner) for inner in _INNER]:
        experts, columns = as_stack(shapes[name])[0], shapes[name][-1]
        yield name + VALUES, "F32", (experts, columns * (columns + 1) // 2)
        yield name + OWN, "I64", (experts,)


def _layers(config: ModelConfig) -> list[int | None]:
    return [*range(config.layers), None]


def _widths(config: ModelConfig) -> dict[str, int]:
    return {name: int(getattr(config, name)) for name in ("layers", "experts", "hidden", "intermediate", "q_rows")}


class Writer:
    """The folder as it grows. `output`: open under MARKER; call `open` first, then a layer's `put`s, then its `finish`."""

    def __init__(self, output: Output, config: ModelConfig, facts: dict[str, Any]) -> None:
        self._output, self._config, self._facts = output, config, facts
        self._built = {layer: safetensors.build_header(list(_tensors(config, layer))) for layer in _layers(config)}
        self._upper: dict[int, Bools] = {}

    def open(self, digest: str) -> int:
        """Reserve the space; returns how many layers an earlier run has left whole."""
        sizes = {
            layer: max(e.offset + e.nbytes for e in entries.values()) for layer, (_, entries) in self._built.items()
        }
        journal = self._output.open(digest, [(file_of(layer), size) for layer, size in sizes.items()])
        for layer, (head, _) in self._built.items():
            self._output.write(file_of(layer), 0, head)
        done = 0
        known = {record.get("layer"): record.get("digest") for record in journal}
        while done < self._config.layers and known.get(done) == self._digest_of(done):
            done += 1
        return done

    def put(self, layer: int | None, name: str, expert: int, own: int, hessian: Tensor) -> None:
        """One matrix's mean of x xᵀ f32 [C, C], and how many tokens the router sent."""
        columns = len(hessian)
        if columns not in self._upper:
            self._upper[columns] = np.triu(np.ones((columns, columns), bool))
        packed = np.ascontiguousarray(hessian.cpu().numpy()[self._upper[columns]], "<f4")
        entries = self._built[layer][1]
        place, counts = entries[name + VALUES], entries[name + OWN]
        for offset, data in (
            (place.offset + expert * packed.nbytes, packed), (counts.offset + 8 * expert, np.array([own], "<i8"))
        ):  # fmt: skip
            self._output.write(file_of(layer), offset, data.tobytes())

    def finish(self, layer: int) -> None:
        """A layer is whole."""
        self._output.record({"layer": layer, "digest": self._digest_of(layer)})

    def publish(self) -> None:
        """All are: give the folder its name."""
        document = {"schema": "gptoss-convert/hessians/1", "model": _widths(self._config), "facts": self._facts}
        self._output.write_small(MARKER, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
        self._output.publish()

    def _digest_of(self, layer: int | None) -> str:
        hasher, at = blake3.blake3(), 0
        size = max(e.offset + e.nbytes for e in self._built[layer][1].values())
        while at < size:
            data = self._output.read(file_of(layer), at, min(size - at, 1 << 24))
            hasher.update(data)
            at += len(data)
        return hasher.hexdigest()


class Reader:
    """A folder of Hessians for a model; BadInput for one of another model. Files are opened as they are asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self._config = folder, config
        with SourceFile(folder / MARKER) as file:
            document = parse_json(bytes(file.read(0, file.size)), folder / MARKER)
        if document.get("model") != _widths(config) or not isinstance(document.get("facts"), dict):
            raise BadInput(
                "the Hessians are of another model", file=folder / MARKER,
                found=document.get("model"), expected=_widths(config),
            )  # fmt: skip
        self.facts: dict[str, Any] = document["facts"]

    def own(self, layer: int) -> list[int]:
        """Tokens that the router sent to each expert."""
        count = self._config.experts
        return [int(n) for n in np.frombuffer(self._read(layer, layer_name(layer, GATE_UP) + OWN, 0, 8 * count), "<i8")]

    def hessian(self, layer: int | None, name: str, expert: int) -> Tensor:
        """f32 [C, C] of a canonical matrix, an expert's of a stack."""
        columns = canonical_shapes(self._config)[name][-1]
        nbytes = 2 * columns * (columns + 1)
        packed = np.frombuffer(self._read(layer, stored_name(name) + VALUES, nbytes * expert, nbytes), "<f4")
        if not np.isfinite(packed).all():
            raise BadInput(
                "a Hessian is not finite", file=self.folder / file_of(layer), tensor=name, found=f"expert {expert}"
            )
        out = np.zeros((columns, columns), np.float32)
        out[np.triu(np.ones((columns, columns), bool))] = packed
        upper = torch.from_numpy(out)
        return upper + upper.triu(1).T

    def _read(self, layer: int | None, name: str, start: int, nbytes: int) -> bytearray:
        """Bytes of a tensor, after a look at its shape."""
        wanted = {n: shape for n, _, shape in _tensors(self._config, layer)}[name]
        with SourceFile(self.folder / file_of(layer)) as file:
            entry = safetensors.read_header(file).entries.get(name)
            if entry is None or entry.shape != wanted:
                raise BadInput(
                    "the Hessians are of another model", file=file.path, tensor=name,
                    found="missing" if entry is None else list(entry.shape), expected=list(wanted),
                )  # fmt: skip
            return file.read(entry.offset + start, nbytes)

"""A source: somebody's checkpoint, seen as the canonical model. Told apart by what its tensors are, never by file names.

`open_source(path)` looks at the content of what is there (a folder of safetensors, a GGUF, metal's model.bin), reads the
headers, checks every count, name and shape against the configuration, and returns a `Source` whose views read the
canonical tensors in place. Nothing of a tensor's data is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.companions import Companion
from gptoss_convert.convert.names import as_stack, canonical_shapes
from gptoss_convert.convert.views import View, misfit
from gptoss_convert.errors import BadInput, Refused, printable
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import Value
from gptoss_convert.formats.sniff import Kind, identify
from gptoss_convert.formats.tree import source_root, walk


class Layout(StrEnum):
    """The layouts that are read."""

    HF = "hf"
    ORIGINAL = "original"
    METAL = "metal"
    BF16 = "bf16"
    BF16_MISNAMED = "bf16-misnamed"
    LINEARISED = "linearised"
    PER_EXPERT = "per-expert"
    COMPRESSED = "compressed-tensors"
    GGUF = "gguf"
    ONNX = "onnx"


DESCRIPTION = {
    Layout.HF: "the official Hugging Face layout: experts in MXFP4",
    Layout.ORIGINAL: "the reference code's layout (original/): fused qkv, experts in MXFP4",
    Layout.METAL: "metal's model.bin: rotated q and k, folded scales, experts in MXFP4",
    Layout.BF16: "Hugging Face, experts as fused floating-point tensors [E, in, out]",
    Layout.BF16_MISNAMED: "fused floating-point experts that transformers saved under the names of packed ones (*_blocks)",
    Layout.LINEARISED: "one linear module for each expert, gate and up rows alternating (as unsloth saves)",
    Layout.PER_EXPERT: "gate_proj, up_proj and down_proj apart for each expert",
    Layout.COMPRESSED: "integer experts in compressed-tensors' form, under vLLM's names",
    Layout.GGUF: "GGUF of architecture gpt-oss",
    Layout.ONNX: "an ONNX graph of this tool with its data file",
}


WEIGHT_SUFFIXES = (".safetensors", ".gguf", "model.bin")


@dataclass(frozen=True)
class Problem:
    """Something odd about a source: a tensor missing, unexpected or misshapen. Fatal to a conversion."""

    what: str
    tensor: str
    found: str | None = None
    expected: str | None = None


@dataclass
class Source:
    """A checkpoint opened for reading.

    views: canonical name → view; problems: what keeps it from being converted; losses: what this layout has already lost
    against the release; notes: what a user should know; companions: tokenizer and other small files by name, as bytes or as
    the path to read them from; config_table: the HF config.json as found; metadata: a GGUF's.
    """

    path: Path
    layout: Layout
    config: ModelConfig
    views: dict[str, View]
    files: list[SourceFile]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # canonical → the tensors it is read from
    problems: list[Problem] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    companions: dict[str, Companion] = field(default_factory=dict)
    metadata: Mapping[str, Value] = field(default_factory=dict)
    config_table: Mapping[str, Any] | None = None
    config_sha256: str | None = None  # of the config.json that was read
    stored: list[StoredTensor] = field(default_factory=list)
    revision: str | None = None
    wide: ModelConfig | None = None  # of a widened file: the widths that its tensors have
    wide_views: Mapping[str, View] = field(default_factory=dict)  # and these, padding and all
    kept: Mapping[int, NDArray[np.uint16]] | None = None  # of a cut file, see cut.py: the neurons [E, F'] of each layer
    gate_meaning: str | None = None  # of a per-expert checkpoint, see gate_meaning.py

    def require_sound(self) -> None:
        """Raise unless every canonical tensor is there with its shape and nothing is unexplained."""
        if not self.problems:
            return
        first, more = self.problems[0], len(self.problems) - 1
        raise BadInput(
            first.what + (f" (and {more} more problems)" if more else ""),
            file=self.path,
            tensor=first.tensor,
            found=first.found,
            expected=first.expected,
            remedy="gptoss-convert inspect lists them all",
        )

    def check_shapes(self) -> None:
        """Compare the views with the configuration; what does not fit becomes a problem."""
        wanted = canonical_shapes(self.config)
        for name, shape in wanted.items():
            if name not in self.views:
                if not self.names.get(name):  # else the parts that are missing or wrong have been named
                    self.problems.append(Problem("a tensor is missing", name, expected=str(list(shape))))
            elif found := misfit(self.views[name]):
                self.problems.append(Problem("the parts of a tensor do not fit together", name, found))
            elif self.views[name].stack != as_stack(shape):
                found = str(list(self.views[name].stack))
                self.problems.append(Problem("a tensor's shape does not fit", name, found, str(list(as_stack(shape)))))

    def check_unchanged(self) -> None:
        """Raise InputChanged if any file is no longer what was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file lists it, for the inspector."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


def open_source(path: Path, *, gate_proj: str | None = None, tokenizer: Path | None = None) -> Source:
    """The source at `path`: a folder, a .safetensors, .gguf or model.bin file, or a hub cache snapshot.

    gate_proj: which of its two known meanings "gate_proj" has in a per-expert checkpoint ("deinterleaved" or "halves"),
    where the weights do not tell. tokenizer: a folder to take tokenizer and template from when the source has none.
    """
    path = source_root(path)
    source = _open_folder(path, gate_proj) if path.is_dir() else _open_file(path, gate_proj)
    if tokenizer is not None:
        from gptoss_convert.convert.companions import collect_companions

        found = collect_companions(tokenizer)
        if "tokenizer.json" not in found:
            source.close()
            raise BadInput("no tokenizer.json in the folder given as --tokenizer", file=tokenizer)
        source.companions = {**source.companions, **found}
    return source


def _open_file(path: Path, gate_proj: str | None) -> Source:
    with SourceFile(path) as file:
        kind = identify(bytes(file.read(0, min(file.size, 512))))
    if kind is Kind.GGUF:
        from gptoss_convert.convert.source_gguf import open_gguf

        return open_gguf(path)
    if kind is Kind.METAL:
        from gptoss_convert.convert.source_metal import open_metal

        return open_metal(path)
    if kind is Kind.SAFETENSORS:
        from gptoss_convert.convert.source_safetensors import open_safetensors

        return open_safetensors(path.parent, [path.name], gate_proj)
    raise BadInput(
        "not a checkpoint that is read",
        file=path,
        found=kind.value if kind else "unknown content",
        expected="safetensors, GGUF or metal's model.bin",
        remedy="name the folder that model.onnx lies in"
        if path.suffix == ".onnx"
        else "pickles are never opened: convert them to safetensors where you trust them"
        if kind in (Kind.PICKLE, Kind.ZIP)
        else None,
    )


def _open_folder(folder: Path, gate_proj: str | None) -> Source:
    files = {entry.name: entry.path for entry in walk(folder)}
    kinds = {name: _kind_of(path) for name, path in files.items() if "/" not in name}
    tensors = [name for name, kind in kinds.items() if kind is Kind.SAFETENSORS]
    ggufs = sorted(name for name, kind in kinds.items() if kind is Kind.GGUF)
    metal = [name for name, kind in kinds.items() if kind is Kind.METAL]
    if tensors:
        from gptoss_convert.convert.source_safetensors import open_safetensors

        return open_safetensors(folder, tensors, gate_proj)
    if ggufs:
        from gptoss_convert.convert.source_gguf import open_gguf
        from gptoss_convert.formats.gguf_split import open_split

        if len(open_split(files[ggufs[0]])) != len(ggufs):
            raise Refused(
                "the folder holds several GGUF models", file=folder, found=", ".join(map(printable, ggufs[:6])),
                remedy="name the file to read",
            )  # fmt: skip
        return open_gguf(files[ggufs[0]])
    if metal:
        return _open_file(files[metal[0]], gate_proj)
    if "model.onnx" in files:
        from gptoss_convert.convert.source_onnx import open_onnx

        return open_onnx(folder)
    raise BadInput("no checkpoint in the folder", file=folder, found=_what_is_there(files, kinds), remedy=_hint(files))


def _kind_of(path: Path) -> Kind | None:
    with SourceFile(path) as file:
        return identify(bytes(file.read(0, min(file.size, 512))))


def _what_is_there(files: Mapping[str, Path], kinds: Mapping[str, Kind | None]) -> str:
    for name, kind in kinds.items():
        if name.endswith(WEIGHT_SUFFIXES) and kind is not None and kind not in (Kind.PICKLE, Kind.ZIP):
            return f"{printable(name)}: {kind.value}"
    pickles = [name for name, kind in kinds.items() if kind in (Kind.PICKLE, Kind.ZIP)]
    if pickles:
        return f"{printable(pickles[0])}, a pickle or zip archive; such files are never opened"
    return f"{len(files)} files, none of them safetensors, GGUF or model.bin" if files else "an empty folder"


def _hint(files: Mapping[str, Path]) -> str | None:
    below = sorted({name.rpartition("/")[0] for name in files if name.endswith(WEIGHT_SUFFIXES)})
    return f"there is one in {printable(below[0])}/" if below else None

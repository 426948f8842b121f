"""The inspector: what a source is, and everything odd about it, in one document.

    open_source ──► facts from headers (layout, model, tensors, files) ──┐
                ├─► inspect_values: every value                          ├─► Inspection
                └─► inspect_beside: tokenizer, templates, other files  ──┘

A verdict on the weights is `verify`'s; "official" is said here of tokenizers and templates only, by their digests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.inspect_beside import ERROR, Document, Oddity, documents, kinds_of, odd_files
from gptoss_convert.convert.inspect_values import Values, read_values
from gptoss_convert.convert.names import (
    canonical_shapes,
    gguf_gate_up,
    gguf_name,
    is_gate_up,
    original_name,
    split_name,
)
from gptoss_convert.convert.source import DESCRIPTION, Layout, Problem, Source, StoredTensor, open_source
from gptoss_convert.convert.source_safetensors import INDEX
from gptoss_convert.errors import ExitCode, printable
from gptoss_convert.formats.gguf import Value
from gptoss_convert.formats.sniff import EXECUTABLE, Kind
from gptoss_convert.formats.tree import TreeFile, source_root, walk

MAX_TEXT = 2000  # characters of a metadata value that are shown
UNEXPECTED = "a tensor that gpt-oss does not have"  # as the sources say it


@dataclass(frozen=True)
class FileFact:
    """A file of the source. role: weights, configuration, companion, pickle (never opened), other (not read)."""

    name: str
    nbytes: int
    role: str


@dataclass(frozen=True)
class Inspection:
    """All that is known of a source. values: None when they were not looked at; sizes in bytes."""

    path: Path
    layout: Layout
    revision: str | None
    config: ModelConfig
    files: list[FileFact]
    tensors: list[StoredTensor]
    documents: list[Document]
    metadata: dict[str, Any]
    values: Values | None
    notes: list[str]
    losses: list[str]
    oddities: list[Oddity]

    @property
    def description(self) -> str:
        """The layout in a sentence."""
        return DESCRIPTION[self.layout]

    @property
    def model(self) -> str:
        """The release whose widths these are, or the counts that tell models apart."""
        release, config = self.config.release, self.config
        if release:
            return f"{release} (widths; not a verdict on the weights)"
        return (
            f"other: {config.layers} layers, {config.experts} experts ({config.experts_per_token} a token), "
            f"hidden {config.hidden}, intermediate {config.intermediate}"
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the embedding table and the experts that are not chosen."""
        c = self.config
        expert = 2 * c.intermediate * (c.hidden + 1) + c.hidden * (c.intermediate + 1)
        return c.parameters - c.vocab * c.hidden - c.layers * (c.experts - c.experts_per_token) * expert

    @property
    def weight_bytes(self) -> int:
        """Size of the files that hold the weights."""
        return sum(file.nbytes for file in self.files if file.role == "weights")

    @property
    def dtypes(self) -> list[dict[str, Any]]:
        """Tensors and bytes by type as stored, the largest first."""
        tensors = Counter(tensor.dtype for tensor in self.tensors)
        nbytes = {dtype: sum(t.nbytes for t in self.tensors if t.dtype == dtype) for dtype in tensors}
        order = sorted(tensors, key=lambda dtype: (-nbytes[dtype], dtype))
        return [{"dtype": dtype, "tensors": tensors[dtype], "bytes": nbytes[dtype]} for dtype in order]

    def exit_code(self) -> ExitCode:
        """What the command ends with: OK unless something was found that would stop a conversion."""
        return ExitCode.BAD_INPUT if any(o.severity == ERROR for o in self.oddities) else ExitCode.OK

    def as_dict(self) -> dict[str, Any]:
        """The whole, for `--json`."""
        config = {key: _plain(value) for key, value in asdict(self.config).items() if key != "sliding"}
        config["sliding_layers"] = [n for n, slides in enumerate(self.config.sliding) if slides]
        return {
            "path": str(self.path),
            "layout": self.layout.value,
            "description": self.description,
            "revision": self.revision,
            "model": self.model,
            "release_widths": self.config.release,
            "parameters": self.config.parameters,
            "active_parameters": self.active_parameters,
            "config": config,
            "weight_bytes": self.weight_bytes,
            "files": [asdict(file) for file in self.files],
            "dtypes": self.dtypes,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "documents": [asdict(document) for document in self.documents],
            "metadata": self.metadata,
            "values_looked_at": self.values is not None,
            "values": self.values.as_dict() if self.values else None,
            "notes": self.notes,
            "losses": self.losses,
            "oddities": [asdict(oddity) for oddity in self.oddities],
            "sound": self.exit_code() is ExitCode.OK,
            "exit_code": int(self.exit_code()),
        }


def inspect_source(
    path: Path,
    *,
    values: bool = True,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
    gate_proj: str | None = None,
) -> Inspection:
    """Inspect the source at `path`; what is hopeless raises, see `open_source`. values=False reads headers only."""
    with open_source(source_root(path), gate_proj=gate_proj) as source:
        return inspect_open(source, values=values, threads=threads, progress=progress)


def inspect_open(
    source: Source, *, values: bool, threads: int, progress: Callable[[int], None] | None = None
) -> Inspection:
    """Inspect a source that is open."""
    beside = walk(source.path) if source.path.is_dir() else []
    kinds = kinds_of(beside)
    read = {file.name for file in source.files}
    found, odd = documents(source, beside)
    looked = read_values(source, threads, progress or (lambda _: None)) if values else None
    stored = _problems(source)
    if looked is not None:
        stored += [
            Oddity(ERROR, "values that are not finite numbers", stored_name(source, name), str(tally), "finite values")
            for name, tally in sorted(looked.bad.items())
        ]
    return Inspection(
        path=source.path,
        layout=source.layout,
        revision=source.revision,
        config=source.config,
        files=_files(source, beside, kinds),
        tensors=source.stored,
        documents=found,
        metadata={key: _metadata(value) for key, value in source.metadata.items()},
        values=looked,
        notes=list(source.notes),
        losses=list(source.losses),
        oddities=sorted([*stored, *odd, *odd_files(kinds, read)], key=lambda oddity: oddity.severity != ERROR),
    )


def stored_name(source: Source, name: str) -> str:
    """What the source calls, or would call, a canonical tensor."""
    names = source.names.get(name)
    if names:
        return " and ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"
    if source.layout is Layout.GGUF:
        return " and ".join(gguf_gate_up(name)) if is_gate_up(name) else gguf_name(name) or name
    if source.layout is Layout.ORIGINAL:
        return original_name(name) or f"{_fused(name)} (rows of {name})"
    return name


def _fused(name: str) -> str:
    """The tensor of original/ that q, k and v are parts of."""
    layer, _ = split_name(name)
    return f"block.{layer}.attn.qkv.{name.rpartition('.')[2]}"


def _problems(source: Source) -> list[Oddity]:
    """The source's problems, each once, without those that only follow from another one."""
    canonical = canonical_shapes(source.config)
    misshapen = {p.tensor for p in source.problems if p.found and p.what != UNEXPECTED}

    def follows(problem: Problem) -> bool:
        name = problem.tensor
        if problem.found:
            return problem.what == UNEXPECTED and name in misshapen
        if name not in canonical:
            return False
        fused = source.layout is Layout.ORIGINAL and original_name(name) is None
        return name in source.names or (fused and _fused(name) in misshapen)

    odd = [
        Oddity(ERROR, p.what, stored_name(source, p.tensor) if p.tensor in canonical else p.tensor, p.found, p.expected)
        for p in source.problems
        if not follows(p)
    ]
    return list(dict.fromkeys(odd))


def _files(source: Source, beside: list[TreeFile], kinds: Mapping[str, Kind | None]) -> list[FileFact]:
    weights = [FileFact(file.name, file.size, "weights") for file in source.files]
    read = {file.name for file in weights}

    def role(name: str) -> str:
        if kinds[name] in EXECUTABLE:
            return "pickle"
        if name in ("config.json", INDEX) and source.layout not in (Layout.GGUF, Layout.METAL):
            return "configuration"
        return "companion" if name in source.companions else "other"

    return weights + [FileFact(file.name, file.size, role(file.name)) for file in beside if file.name not in read]


def _metadata(value: Value) -> Any:
    """A metadata value for JSON: scalars as they are, arrays by type and count."""
    if isinstance(value.value, list):
        kind = value.element_type.name if value.element_type else ""
        return {"array_of": kind, "count": len(value.value)}
    return _plain(value.value)


def _plain(value: Any) -> Any:
    """A value that JSON can hold: no infinities, and of long text the beginning."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return printable(value, MAX_TEXT) if isinstance(value, str) and len(value) > MAX_TEXT else value

"""Checkpoints in safetensors: Hugging Face's official layout, `original/`, and the forms that fine-tunes come in.

Which one it is follows from the tensors' names, types and ranks (`_expert_form`), not from file names, the index or the
config's quantization_config, any of which may be stale:

    experts found as                                             layout
    gate_up_proj_blocks U8 rank 4 + gate_up_proj_scales U8       HF (release)
    gate_up_proj_blocks floating rank 3, no scales               BF16_MISNAMED (a mistake of transformers 5.23)
    gate_up_proj floating rank 3                                 BF16: [E, in, out]
    gate_up_projs.<e>.weight floating rank 2                     LINEARISED: [out, in], rows alternating
    <e>.gate_proj.weight + <e>.up_proj.weight                    PER_EXPERT: see gate_meaning.py
    block.N.mlp.mlp1_weight.blocks                               ORIGINAL
    <e>.w13_weight_packed, or gate_up_proj I8 with .weight_scale COMPRESSED: see source_compressed.py
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gptoss_convert.config import ModelConfig, from_hf, from_original
from gptoss_convert.convert.companions import Companion, ReadOnce, collect_companions
from gptoss_convert.convert.names import (
    DOWN,
    GATE_UP,
    HEAD,
    as_stack,
    canonical_shapes,
    is_expert_matrix,
    original_name,
    split_name,
)
from gptoss_convert.convert.source import Layout, Problem, Source, StoredTensor
from gptoss_convert.convert.views import (
    Alternating,
    Packed,
    PerExpert,
    RowPerExpert,
    RowRange,
    Stored,
    Transposed,
    View,
)
from gptoss_convert.errors import BadInput, Refused, printable
from gptoss_convert.formats.files import SourceFile, parse_json, read_json
from gptoss_convert.formats.safetensors import Entry, read_header
from gptoss_convert.formats.tree import hub_place, resolve_inside

FLOAT_ENCODINGS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
INDEX = "model.safetensors.index.json"

# What other tools leave behind, told by a part of the tensor names, and why it is not a source.
_FOREIGN = (
    (r"^base_model\.model\.|\.lora_[AB]\.", "a LoRA adapter: only the differences; merge it onto its base first"),
    (r"\.quant_state\.|\.absmax$", "bitsandbytes' 4-bit quantization: the original values are gone"),
    (r"\.(qweight|qzeros|g_idx)$", "a GPTQ or AWQ quantization: the original values are gone"),
    (r"\.weight_packed$", "a compressed-tensors quantization: the original values are gone"),
    (r"experts\.gate_proj\.(weight|scales)$", "MLX's layout, which is not read; take the checkpoint it was made from"),
)


@dataclass(frozen=True)
class Located:
    """A tensor and the file it lies in."""

    entry: Entry
    file: SourceFile

    @property
    def encoding(self) -> str | None:
        """The float codec's name, or None for integers."""
        return FLOAT_ENCODINGS.get(self.entry.dtype)

    def stored(self) -> Stored:
        """A view of the tensor as rows of floats."""
        encoding = self.encoding
        if encoding is None:
            raise BadInput(
                "a tensor's type cannot be read as numbers", file=self.file.path, tensor=self.entry.name,
                found=self.entry.dtype, expected="BF16, F16 or F32",
            )  # fmt: skip
        if not 1 <= len(self.entry.shape) <= 3:
            raise BadInput(
                "a tensor has a shape that gpt-oss does not have", file=self.file.path, tensor=self.entry.name,
                found=list(self.entry.shape), expected="one to three dimensions",
            )  # fmt: skip
        return Stored(self.file, self.entry.offset, encoding, as_stack(self.entry.shape))


Tensors = Mapping[str, Located]


def open_safetensors(folder: Path, names: list[str], gate_proj: str | None) -> Source:
    """Open the named safetensors files of a folder as a source, or those that its index names where it has one."""
    index = folder / INDEX
    if index.exists():
        names = list(set(_weight_map(index).values()))
    files: list[SourceFile] = []
    try:
        files.extend(SourceFile(resolve_inside(folder, name), name) for name in sorted(names))
        tensors = _gather(files)
        if index.exists():
            _check_index(index, tensors, files)
        source = _build(folder, files, tensors, gate_proj)
    except BaseException:
        for file in files:
            file.close()
        raise
    source.check_shapes()
    return source


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise BadInput("the index has no weight_map of tensor names to file names", file=index)
    return table


def _gather(files: Iterable[SourceFile]) -> dict[str, Located]:
    tensors: dict[str, Located] = {}
    for file in files:
        for name, entry in read_header(file).entries.items():
            if name in tensors:
                raise BadInput(
                    "a tensor lies in two files", file=file.path, tensor=name, found=tensors[name].file.name,
                    remedy="leave only the files of one model in the folder",
                )  # fmt: skip
            tensors[name] = Located(entry, file)
    if not tensors:
        raise BadInput("the files hold no tensors", file=next(iter(files)).path)
    return tensors


def _check_index(index: Path, tensors: Tensors, files: list[SourceFile]) -> None:
    named = _weight_map(index)
    for name, file_name in named.items():
        if name not in tensors:
            raise BadInput("the index names a tensor that no file holds", file=index, tensor=name, expected=file_name)
        if tensors[name].file.name != file_name:
            raise BadInput(
                "the index names another file for a tensor than the one that holds it",
                file=index, tensor=name, found=tensors[name].file.name, expected=file_name,
            )  # fmt: skip
    unnamed = next((name for name in tensors if name not in named), None)
    if unnamed is not None:
        raise BadInput(
            "a file holds a tensor that the index does not name", file=tensors[unnamed].file.path, tensor=unnamed
        )


def _build(folder: Path, files: list[SourceFile], tensors: Tensors, gate_proj: str | None) -> Source:
    from gptoss_convert.convert.source_compressed import has_integer_experts, open_compressed

    ours = has_integer_experts(tensors)
    for pattern, reason in () if ours else _FOREIGN:
        culprit = next((name for name in tensors if re.search(pattern, name)), None)
        if culprit:
            raise Refused(f"this is {reason}", file=folder, tensor=culprit)
    if ours:
        source = open_compressed(folder, tensors, *read_config(folder))
    elif any(name.startswith("block.") for name in tensors):
        source = _open_original(folder, tensors)
    else:
        source = _open_hf(folder, tensors, gate_proj)
    source.files = files
    source.stored = [
        StoredTensor(t.entry.name, t.entry.dtype, t.entry.shape, t.entry.nbytes, t.file.name) for t in tensors.values()
    ]
    used = {name for names in source.names.values() for name in names}
    for name, tensor in tensors.items():
        if name not in used:
            found = f"{tensor.entry.dtype} {list(tensor.entry.shape)}"
            source.problems.append(Problem("a tensor that gpt-oss does not have", name, found))
    place = hub_place(folder)
    source.revision = f"{place.repo}@{place.revision}" if place else None
    _find_companions(source, folder)
    return source


def _find_companions(source: Source, folder: Path) -> None:
    source.companions = collect_companions(folder)
    if source.layout is Layout.COMPRESSED:
        from gptoss_convert.convert.source_compressed import companions_of_source

        source.companions = companions_of_source(source.companions, folder)
    parent = folder.parent
    if "tokenizer.json" not in source.companions and source.layout is Layout.ORIGINAL and parent != folder:
        # The release keeps original/ below the folder with the tokenizer.
        above = collect_above(parent)
        if above:
            source.companions = {**above, **source.companions}
            source.notes.append("tokenizer and template are taken from the folder above")


def collect_above(parent: Path) -> dict[str, Companion]:
    """Companions of the folder above, only where that is plainly the model's own: it holds config.json and a tokenizer."""
    if not (parent / "config.json").is_file() or not (parent / "tokenizer.json").is_file():
        return {}
    return collect_companions(parent)


def read_config(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """Path, table and SHA-256 of the configuration, of one reading."""
    path = folder / "config.json"
    if not path.exists():
        raise BadInput("the folder has no config.json", file=folder, remedy="take it from the model's repository")
    data = ReadOnce(resolve_inside(folder, "config.json"))()
    return path, parse_json(data, path), hashlib.sha256(data).hexdigest()


# --- original/ ---------------------------------------------------------------------------------------------------------


def _open_original(folder: Path, tensors: Tensors) -> Source:
    path, table, digest = read_config(folder)
    config = from_original(table, path)
    source = Source(folder, Layout.ORIGINAL, config, {}, [], config_sha256=digest)
    parts = {"q": (0, config.q_rows), "k": (config.q_rows, config.kv_rows)}
    parts["v"] = (config.q_rows + config.kv_rows, config.kv_rows)
    for name in canonical_shapes(config):
        there = original_name(name)
        if there is None:
            layer, inner = split_name(name)
            _, kind, suffix = inner.replace("self_attn.", "self_attn ").replace("_proj.", " ").split()
            there = f"block.{layer}.attn.qkv.{suffix}"
            if there in tensors:
                first, count = parts[kind]
                total = config.q_rows + 2 * config.kv_rows
                _add(source, name, RowRange(tensors[there].stored(), first, count, total, suffix == "bias"), there)
        elif is_expert_matrix(name):
            _add_packed(source, name, tensors, there + ".blocks", there + ".scales")
        elif there in tensors:
            _add(source, name, tensors[there].stored(), there)
    return source


def _add(source: Source, name: str, view: View, *names: str) -> None:
    source.views[name] = view
    source.names[name] = names


def _add_packed(source: Source, name: str, tensors: Tensors, blocks_name: str, scales_name: str) -> None:
    blocks, scales = tensors.get(blocks_name), tensors.get(scales_name)
    if blocks is None or scales is None:
        if blocks or scales:  # where both are missing, the matrix is
            source.names[name] = (blocks_name if blocks else scales_name,)
            source.problems.append(Problem("a tensor is missing", scales_name if blocks else blocks_name))
        return
    shape, groups = blocks.entry.shape, scales.entry.shape
    fits = len(shape) == 4 and shape[3] == 16 and shape[:3] == groups
    if blocks.entry.dtype != "U8" or scales.entry.dtype != "U8" or not fits:
        found = f"{blocks.entry.dtype} {list(shape)}, scales {scales.entry.dtype} {list(groups)}"
        source.problems.append(
            Problem("packed experts of the wrong form", blocks_name, found, "U8 [E, R, G, 16], [E, R, G]")
        )
        source.names[name] = (blocks_name, scales_name)
        return
    stack = (shape[0], shape[1], shape[2] * 32)
    view = Packed(
        blocks.file, blocks.entry.offset, scales.file, scales.entry.offset, stack,
        blocks_stride=prod(shape[1:]), scales_stride=prod(groups[1:]),
    )  # fmt: skip
    _add(source, name, view, blocks_name, scales_name)


# --- Hugging Face and what fine-tuning makes of it ---------------------------------------------------------------------


def _open_hf(folder: Path, tensors: Tensors, gate_proj: str | None) -> Source:
    path, table, digest = read_config(folder)
    config = from_hf(table, path)
    layout = _expert_form(tensors, folder)
    source = Source(folder, layout, config, {}, [], config_table=table, config_sha256=digest)
    for name in canonical_shapes(config):
        if ".mlp.experts." not in name:
            there = name if name in tensors else name.replace("router.", "router.linear.")
            if there in tensors:
                _add(source, name, tensors[there].stored(), there)
    if HEAD not in source.views and table.get("tie_word_embeddings") is True:
        raise Refused("the head is tied to the embedding, which no gpt-oss runtime expects", file=path, tensor=HEAD)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        if layout is Layout.LINEARISED:
            _add_linearised(source, prefix, tensors, config)
        elif layout is Layout.PER_EXPERT:
            _add_per_expert(source, prefix, tensors, config)
        else:
            _add_fused(source, prefix, tensors, layout)
    if layout is Layout.PER_EXPERT:
        from gptoss_convert.convert.gate_meaning import decide

        decide(source, gate_proj)
    _note_config(source, table)
    return source


def _expert_form(tensors: Tensors, folder: Path) -> Layout:
    for name, tensor in tensors.items():
        rank, is_float = len(tensor.entry.shape), tensor.encoding is not None
        if name.endswith(GATE_UP + "_blocks"):
            return Layout.BF16_MISNAMED if is_float and rank == 3 else Layout.HF
        if name.endswith(GATE_UP) and rank == 3:
            if not is_float:
                raise Refused(
                    "the fused experts have a type that is not read", file=tensor.file.path, tensor=name,
                    found=tensor.entry.dtype, expected="BF16, F16 or F32",
                )  # fmt: skip
            return Layout.BF16
        if re.search(r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$", name):
            return Layout.LINEARISED
        if re.search(r"\.mlp\.experts\.\d+\.gate_proj\.weight$", name):
            return Layout.PER_EXPERT
    some = ", ".join(printable(name, 80) for name in sorted(tensors)[:3])
    raise BadInput("no gpt-oss experts among the tensors", file=folder, found=some, remedy="is this a gpt-oss model?")


def _add_fused(source: Source, prefix: str, tensors: Tensors, layout: Layout) -> None:
    for matrix in (GATE_UP, DOWN):
        name = prefix + matrix
        if layout is Layout.HF:
            _add_packed(source, name, tensors, name + "_blocks", name + "_scales")
        else:
            there = name + "_blocks" if layout is Layout.BF16_MISNAMED else name
            if there in tensors and len(tensors[there].entry.shape) == 3:
                _add(source, name, Transposed(tensors[there].stored()), there)
        if name + "_bias" in tensors:
            _add(source, name + "_bias", tensors[name + "_bias"].stored(), name + "_bias")


def _add_linearised(source: Source, prefix: str, tensors: Tensors, config: ModelConfig) -> None:
    for matrix in (GATE_UP, DOWN):
        names = [f"{prefix}{matrix}s.{e}" for e in range(config.experts)]
        _add_experts(source, prefix + matrix, names, tensors)


def _add_experts(source: Source, name: str, stems: list[str], tensors: Tensors) -> None:
    for suffix, kind, there in ((".weight", PerExpert, name), (".bias", RowPerExpert, name + "_bias")):
        names = [stem + suffix for stem in stems]
        missing = [n for n in names if n not in tensors]
        source.problems.extend(Problem("a tensor is missing", n) for n in missing)
        if missing:
            source.names[there] = tuple(n for n in names if n in tensors)
        else:
            _add(source, there, kind([tensors[n].stored() for n in names]), *names)


def _add_per_expert(source: Source, prefix: str, tensors: Tensors, config: ModelConfig) -> None:
    """Gate and up as two stacks, joined for now as if de-interleaved; `gate_meaning.decide` has the last word."""
    stems = {p: [f"{prefix}mlp.experts.{e}.{p}_proj" for e in range(config.experts)] for p in ("gate", "up", "down")}
    _add_experts(source, prefix + DOWN, stems["down"], tensors)
    for part in ("gate", "up"):
        _add_experts(source, f"{prefix}{part}", stems[part], tensors)
    for suffix, columns in (("", False), ("_bias", True)):
        gate, up = (source.views.pop(f"{prefix}{part}{suffix}", None) for part in ("gate", "up"))
        names = sum((source.names.pop(f"{prefix}{part}{suffix}", ()) for part in ("gate", "up")), ())
        source.names[prefix + GATE_UP + suffix] = names
        if gate is not None and up is not None:
            source.views[prefix + GATE_UP + suffix] = Alternating(gate, up, columns)


def _note_config(source: Source, table: Mapping[str, object]) -> None:
    method = table.get("quantization_config")
    packed = source.layout is Layout.HF
    stale = isinstance(method, dict) and method.get("quant_method") == "mxfp4"
    if stale and not packed:
        source.notes.append("config.json speaks of MXFP4, but the experts are floating-point: its word is not taken")
    if packed and not stale:
        source.notes.append("config.json lacks MXFP4's quantization_config, but the experts are packed")
    if source.layout is Layout.BF16_MISNAMED:
        source.notes.append(
            "the experts are floating-point tensors under the names of packed ones (transformers itself would ignore them "
            "and start from random experts); they are read as [E, in, out]"
        )

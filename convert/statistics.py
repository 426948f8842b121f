"""Calibration statistics: of every matrix, the mean square of each input, expert by expert, as a file.

    Statistics ◄─► GGUF imatrix: what llama-quantize --imatrix reads and llama-imatrix writes

    <gguf tensor>.in_sum2     F32 [E, C]   mean square · count                       llama.cpp's
    <gguf tensor>.counts      F32 [E, 1]   the count, at least 1                     llama.cpp's
    <gguf tensor>.own_counts  F32 [E, 1]   tokens that the router sent               ours
    <gguf tensor>.own_weights F32 [E, 1]   w of quant/shrinkage.py                   ours

The mean squares are shrunk already, so that llama-quantize gets, for a rarely chosen expert, what we take ourselves, and no
expert has a count of zero, which it would replace by ones. Files of llama-imatrix have no shrunk statistics and no others'
tokens: a rarely seen expert of gate and up is shrunk towards all tokens of the layer (the experts' sums add up to them), one of
down towards the mean over the experts, and that is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import (
    DOWN,
    GATE_UP,
    HEAD,
    as_stack,
    canonical_shapes,
    gguf_gate_up,
    gguf_name,
    is_expert_matrix,
    is_gate_up,
    layer_name,
)
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import (
    GgufHeader,
    TensorInfo,
    Value,
    ValueType,
    array,
    build_header,
    f32,
    read_header,
    string,
    u32,
)
from gptoss_convert.kernels.floats import F32
from gptoss_convert.quant.shrinkage import WORTH, effective, level, own_weight, shrink, tokens_wanted

SUMS, COUNTS, OWN_COUNTS, OWN_WEIGHTS = ".in_sum2", ".counts", ".own_counts", ".own_weights"
KEY = "gptoss-convert.calibration."
Counts = NDArray[np.int64]
F64 = NDArray[np.float64]
LARGEST = 1e30  # of a mean square: an input of 1e15, beyond which sums of products leave float32
MOST_TOKENS = 1 << 31  # that a count may say: metadata hold it in 32 bits


@dataclass(frozen=True)
class Inputs:
    """The inputs of one tensor's matrices. mean: f32 [E, C], shrunk; own: tokens that the router sent, [E]; weight: w, [E]."""

    mean: F32
    own: Counts
    weight: F32


@dataclass
class Statistics:
    """inputs: canonical name of a matrix → its Inputs; facts: what they were made from, for certificates."""

    inputs: dict[str, Inputs] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def importance(self, name: str) -> F32 | None:
        """f32 [E, C] of a canonical matrix, levelled by how few tokens it was counted over; None where nothing is known."""
        found = self.inputs.get(name)
        if found is None:
            return None
        total, columns = self._tokens, found.mean.shape[1]
        tokens = [
            effective(int(n), max(total - int(n), 0), columns) if len(found.own) > 1 else int(n) for n in found.own
        ]
        return level(found.mean, np.array(tokens))

    @property
    def _tokens(self) -> int:
        """Tokens of the text: what a matrix without experts has seen; without one, at least what the busiest expert has."""
        single = [int(i.own[0]) for i in self.inputs.values() if len(i.own) == 1]
        return max(single or [int(i.own.max()) for i in self.inputs.values()], default=0)

    def coverage(self, config: ModelConfig) -> dict[str, Any]:
        """Router load and experts short of tokens, layer by layer, and how many more tokens they would need."""
        layers = [self.inputs[layer_name(n, GATE_UP)].own for n in range(config.layers)]
        wanted = tokens_wanted(max(config.hidden, config.intermediate))
        counts = np.array(layers)
        tokens = int(counts[0].sum()) // config.experts_per_token if len(counts) else 0
        short = counts < wanted
        least = int(counts.min()) if counts.size else 0
        return {
            "tokens": tokens,
            "needed": wanted,
            "experts": int(counts.size),
            "short": int(short.sum()),
            "unseen": int((counts == 0).sum()),
            "least": least,
            "median": float(np.median(counts)) if counts.size else 0.0,
            "more_tokens_for_all": None if not least else max(0, -(-tokens * wanted // least) - tokens),
            "more_tokens_for_nine_in_ten": _more(counts, tokens, wanted),
            "router_load": [[round(float(c) / max(tokens, 1), 6) for c in row] for row in counts],
        }


def _more(counts: NDArray[np.int64], tokens: int, wanted: int) -> int | None:
    """Further tokens of the same kind until nine experts in ten have what they need."""
    if not counts.size:
        return None
    tenth = int(np.quantile(counts, 0.1, method="lower"))
    return None if not tenth else max(0, -(-tokens * wanted // tenth) - tokens)


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix that statistics are kept for: canonical name → (E, C)."""
    inner = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [GATE_UP, DOWN]
    names = [layer_name(n, name) for n in range(config.layers) for name in inner] + [HEAD]
    shapes = canonical_shapes(config)
    return {name: (as_stack(shapes[name])[0], shapes[name][-1]) for name in names}


def gguf_names(name: str) -> tuple[str, ...]:
    """The GGUF tensors that a canonical matrix is."""
    if is_gate_up(name):
        return gguf_gate_up(name)
    there = gguf_name(name)
    assert there is not None
    return (there,)


# --- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A statistics file before its numbers are known: header, where each tensor goes, bytes in all."""

    head: bytes
    places: Mapping[str, TensorInfo]
    size: int

    def columns(self, name: str) -> int:
        """Inputs of a canonical matrix, as the file has them."""
        return self.places[gguf_names(name)[0] + SUMS].shape[0]


def lay_out(config: ModelConfig, facts: Mapping[str, Any], wide: ModelConfig | None = None) -> Layout:
    """The file for this model and these facts (strings and integers). wide: of a widened file, the widths that it has: what
    llama-quantize needs of an imatrix for it. What widening added has a mean square of zero.
    """
    keys: list[tuple[str, Value]] = [
        ("general.type", string("imatrix")),
        ("imatrix.datasets", array(ValueType.STRING, [str(facts["text"])])),
        ("imatrix.chunk_count", u32(max(int(facts["tokens"]) // int(facts["context"]), 1))),
        ("imatrix.chunk_size", u32(int(facts["context"]))),
        (KEY + "worth", f32(WORTH)),
    ]
    keys += [(KEY + k, string(str(v))) for k, v in sorted(facts.items())]
    tensors: list[tuple[str, int, tuple[int, ...]]] = []
    for name, (experts, columns) in matrices(wide or config).items():
        for there in gguf_names(name):
            tensors.append((there + SUMS, 0, (columns, experts)))
            tensors += [(there + suffix, 0, (1, experts)) for suffix in (COUNTS, OWN_COUNTS, OWN_WEIGHTS)]
    head, placed = build_header(keys, tensors)
    end = max(info.offset + info.nbytes for info in placed)
    return Layout(head, {info.name: info for info in placed}, end + -end % 32)


def tensors_of(name: str, inputs: Inputs, columns: int | None = None) -> dict[str, F32]:
    """What a matrix's Inputs become in the file, filled up to `columns` with zeros: tensor name → f32."""
    counts = np.maximum(inputs.own, 1).astype(np.float32)
    mean = np.pad(inputs.mean, ((0, 0), (0, (columns or inputs.mean.shape[1]) - inputs.mean.shape[1])))
    return {
        there + suffix: np.ascontiguousarray(values, np.float32)
        for there in gguf_names(name)
        for suffix, values in (
            (SUMS, mean * counts[:, None]),
            (COUNTS, counts),
            (OWN_COUNTS, inputs.own),
            (OWN_WEIGHTS, inputs.weight),
        )
    }


# --- reading -----------------------------------------------------------------------------------------------------------


def read_statistics(path: Path, config: ModelConfig) -> Statistics:
    """A statistics file of ours, or an imatrix of llama.cpp's, for this model; BadInput for one of another shape."""
    with SourceFile(path) as file:
        header = read_header(file)
        if "general.type" not in header.metadata or header.metadata["general.type"].value != "imatrix":
            raise BadInput(
                "not a file of calibration statistics", file=path, expected="a GGUF with general.type imatrix",
                remedy="make one with gptoss-convert calibrate, or with llama-imatrix --output-format gguf",
            )  # fmt: skip
        facts = {k.removeprefix(KEY): v.value for k, v in header.metadata.items() if k.startswith(KEY)}
        ours = bool(facts)
        if not ours:
            datasets = header.metadata.get("imatrix.datasets")
            facts = {"text": ", ".join(map(str, datasets.value)) if datasets else "unknown", "made_by": "llama-imatrix"}
        statistics = Statistics(facts=facts)
        for name, shape in matrices(config).items():
            found = [_read(file, header, there, shape) for there in gguf_names(name)]
            if found[0] is None and not ours and not is_expert_matrix(name):  # the head: --process-output was not given
                statistics.notes.append(f"{path.name} has no statistics of {name}: its columns count alike")
                continue
            if found[0] is None:
                raise BadInput(
                    "the statistics are of another model, or of a part of it", file=path, tensor=gguf_names(name)[0] + SUMS,
                    found="no such tensor", expected=f"float32 {list(shape)}",
                )  # fmt: skip
            sums, counts, own, weight = found[0]
            if not ours:
                own, weight, means = _shrunk(sums, counts, name, statistics.notes)
            else:
                means = sums.astype(np.float64) / np.maximum(counts, 1)[:, None]
            if means.max(initial=0) > LARGEST:
                raise BadInput(
                    "a mean square is too large to be one", file=path, tensor=name, found=float(means.max()),
                    expected=f"at most {LARGEST:g}",
                )  # fmt: skip
            statistics.inputs[name] = Inputs(means.astype(np.float32), own.astype(np.int64), weight)
    return statistics


def _shrunk(sums: F32, counts: F32, name: str, notes: list[str]) -> tuple[F32, F32, F64]:
    """Own counts, weights and shrunk means of llama-imatrix's sums: others are all of the layer's, or for down the experts'
    mean.
    """
    columns, total = sums.shape[1], float(counts.sum())
    if not total:
        raise BadInput("the statistics have counted no token", tensor=name)
    totals = sums.astype(np.float64)
    weight = np.array([own_weight(int(n), columns) for n in counts], np.float32)
    if name.endswith(DOWN) and (weight < 1).any():
        notes.append(f"{name}: experts with few tokens lean on the mean over the layer's experts")
    means = np.empty_like(totals)
    for expert, count in enumerate(counts):
        rest = total - float(count)
        others = (totals.sum(axis=0) - totals[expert]) / rest if rest else totals[expert] * 0
        own = totals[expert] / max(float(count), 1.0)
        means[expert] = shrink(own, others, int(count), columns) if rest else own
    return counts, weight, means


def _read(file: SourceFile, header: GgufHeader, name: str, shape: tuple[int, int]) -> tuple[F32, F32, F32, F32] | None:
    experts, columns = shape
    if name + SUMS not in header.tensors:
        return None
    parts: list[F32] = []
    for suffix, wanted in (
        (SUMS, (experts, columns)),
        (COUNTS, (experts,)),
        (OWN_COUNTS, (experts,)),
        (OWN_WEIGHTS, (experts,)),
    ):
        info = header.tensors.get(name + suffix)
        if suffix == SUMS and info is not None and info.nbytes > 4 * experts * columns:
            parts.append(_narrowed(file, info, name, experts, columns))
            continue
        if info is None and suffix in (OWN_COUNTS, OWN_WEIGHTS):
            parts.append(np.ones(experts, np.float32))
            continue
        if info is None or info.nbytes != 4 * int(np.prod(wanted)):
            raise BadInput(
                "the statistics are of another model", file=file.path, tensor=name + suffix,
                found="missing" if info is None else f"{info.nbytes} bytes", expected=f"float32 {list(wanted)}",
            )  # fmt: skip
        parts.append(_numbers(file, info).reshape(wanted))
        if suffix in (COUNTS, OWN_COUNTS) and (parts[-1] >= MOST_TOKENS).any():
            raise BadInput(
                "a count of tokens is too large", file=file.path, tensor=name + suffix, found=float(parts[-1].max()),
                expected=f"less than {MOST_TOKENS}",
            )  # fmt: skip
    if (parts[3] > 1).any():
        raise BadInput("a weight is larger than one", file=file.path, tensor=name + OWN_WEIGHTS)
    if ((parts[1] <= 0) & parts[0].any(axis=1)).any():
        raise BadInput("sums without a count", file=file.path, tensor=name)
    return parts[0], parts[1], parts[2], parts[3]


def _narrowed(file: SourceFile, info: TensorInfo, name: str, experts: int, columns: int) -> F32:
    """The sums of a widened file's inputs without the columns that widening added, which must be zeros."""
    values = _numbers(file, info)
    if values.size % experts == 0 and not values.reshape(experts, -1)[:, columns:].any():
        return np.ascontiguousarray(values.reshape(experts, -1)[:, :columns])
    raise BadInput(
        "the statistics are of another model", file=file.path, tensor=name + SUMS,
        found=f"{info.nbytes} bytes", expected=f"float32 {[experts, columns]}",
    )  # fmt: skip


def _numbers(file: SourceFile, info: TensorInfo) -> F32:
    """A tensor's float32 values, none negative, all finite."""
    values = np.frombuffer(bytes(file.read(info.offset, info.nbytes)), "<f4")
    if not np.isfinite(values).all() or (values < 0).any():
        raise BadInput("a statistic is negative or not finite", file=file.path, tensor=info.name)
    return values.copy()

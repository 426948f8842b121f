"""The proof: read the artifact back and compare what it says, and what it computes, with the source.

Two independent comparisons:

1. **Tensor by tensor.** The artifact is opened by the same readers as any source. Each canonical tensor's rows are compared
   with the source's: *byte-equal* (the very bits in canonical encoding), *value-equal* (every number the same, −0 = 0), or
   the measured error. Where a fixed rule rounds (`signed_blocks.FIXED`), each value must lie within half a step of the source's.
2. **Expert by expert.** For every layer and expert the MoE forward pass on asymmetric probes, computed from the raw tensors of
   each side by its own format's words (`witness.py`), must agree within what (1) measured. A conversion whose reader and
   writer share one mistake passes (1) and fails here.

A tensor's **values digest** is BLAKE3 over its leaves' BLAKE3 digests in order; a leaf is up to LEAF_ROWS consecutive rows of
one expert's matrix (a plain matrix or vector is expert 0) as bfloat16 where the encoding's values are bfloat16's (bf16, mxfp4),
else as float32, little-endian, −0 written as 0. It names the values whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import blake3
import numpy as np

from gptoss_convert.convert.names import DOWN, GATE_UP, Shape, as_stack, canonical_shapes, is_expert_matrix, layer_name
from gptoss_convert.convert.own_encodings import encoding_name, own_encoding, stored_part
from gptoss_convert.convert.plan import LEAF_ROWS
from gptoss_convert.convert.progress import Advance
from gptoss_convert.convert.proof_leaves import Leaf, compare_leaf, relative, values_dtype
from gptoss_convert.convert.proof_widths import as_made, kept_only, require_gains, require_padding
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import View, read_encoding, reads_whole
from gptoss_convert.convert.widen import GAIN_ROUNDING, Gain
from gptoss_convert.convert.witness import Witness
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import ProofFailed
from gptoss_convert.kernels.experts import F64, probes
from gptoss_convert.kernels.floats import F32
from gptoss_convert.quant.encode import fate

BYTE_EQUAL, VALUE_EQUAL, DIFFERENT = "byte-equal", "value-equal", "different"
PROBES = 2
# Summation order and float32 rounding of two routes to one number; anything wrong is of the size of the output itself.
SAME = 1e-4
# Below this, two orders of summing the same float32 products: written as 0, so that no machine's order enters a certificate.
SUMMATION_NOISE = 2e-6
# How far an output may be off when the weights are: a few times their own relative error (both layers of the expert, the
# activation's slope), but never near the output itself: a permuted matrix gives 1.4, half of one 1.0. With two bits a weight a
# single expert may come near that by rounding alone (0.9 was seen on random weights), the middle one of a layer does not.
OUTPUT_OVER_WEIGHTS = 6.0
NEVER_ABOVE = 1.2
MEDIAN_NEVER_ABOVE = 0.85
# What rounding to a codec can cost the values of one leaf, relative to them; more is a fault, not a rounding. Generous for
# weights of any shape (a block with one outlier), and small enough that rows in the wrong order show.
WEIGHTS_AT_MOST = {
    "f32": 1e-6,
    "bf16": 0.005,
    "f16": 0.01,
    "q8_0": 0.025,
    "int8_g32": 0.025,
    "int8_channel": 0.15,
    "int4_g32": 0.3,
    "int8_mm": 0.025,
    "int8_moe": 0.025,
    "int4_mm": 0.3,
    "int4_moe": 0.3,
    "q6_k": 0.1,
    "q5_0": 0.15,
    "q5_1": 0.15,
    "q5_k": 0.15,
}
WEIGHTS_OTHERWISE = 0.6
# GPTQ moves values from the nearest level on purpose: nearer for inputs like the text, farther for these probes, which are like
# none. At two bits 0.61 was seen of weights and 1.34 of an output; a permuted matrix's weights are 1.4 off, and show.
GPTQ_FARTHER = 1.5
METHOD_KEY = "gptoss-convert.rounding.method"


@dataclass(frozen=True)
class TensorProof:
    """How one canonical tensor came through. rms_error: relative to the source's; largest_error: of a value."""

    name: str
    shape: Shape
    source_encoding: str
    artifact_encoding: str
    verdict: str
    values_digest: str
    values_dtype: str
    artifact_digest: str | None = None  # where the values differ, of the artifact's, in artifact_dtype
    artifact_dtype: str | None = None
    different: int = 0
    rms_error: float = 0.0
    worst_leaf: float = 0.0
    largest_error: float = 0.0
    lost_by_cutting: float | None = None  # of a cut file: what the dropped neurons held; the errors are of the rest


@dataclass(frozen=True)
class LayerProof:
    """Relative error of each expert's output on the probes: |artifact − source| / |source|, largest over the probes.

    cut_errors: of a cut file, what dropping the neurons alone makes of the source's outputs; the errors are against these.
    """

    layer: int
    expert_errors: tuple[float, ...]
    allowed: float
    cut_errors: tuple[float, ...] | None = None


@dataclass
class Proof:
    """All tensors and all experts."""

    tensors: list[TensorProof] = field(default_factory=list)
    layers: list[LayerProof] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)  # codecs that no second decoder could read

    @property
    def lossless(self) -> bool:
        """Every value of every tensor is the source's."""
        return all(tensor.verdict != DIFFERENT for tensor in self.tensors)

    def count(self, verdict: str) -> int:
        """Tensors with that verdict."""
        return sum(tensor.verdict == verdict for tensor in self.tensors)

    @property
    def worst_output(self) -> float:
        """The largest relative error of any expert's output."""
        return max((max(layer.expert_errors) for layer in self.layers), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """For the certificate."""
        return {
            "lossless": self.lossless,
            "byte_equal": self.count(BYTE_EQUAL),
            "value_equal": self.count(VALUE_EQUAL),
            "different": self.count(DIFFERENT),
            "probes_per_expert": PROBES,
            "worst_expert_output_error": self.worst_output,
            "codecs_without_second_decoder": self.unchecked,
            "tensors": [
                {k: v for k, v in asdict(t).items() if v is not None and (t.verdict == DIFFERENT or k not in _ERRORS)}
                for t in self.tensors
            ],
            "layers": [{k: v for k, v in asdict(layer).items() if v is not None} for layer in self.layers],
        }


_ERRORS = ("different", "rms_error", "worst_leaf", "largest_error")


def prove(source: Source, artifact: Source, *, threads: int, advance: Advance) -> Proof:
    """Compare and return the proof; ProofFailed if anything is off beyond what the encodings explain."""
    shapes = canonical_shapes(source.config)
    _same_model(source, artifact)
    require_padding(artifact, threads)
    require_gains(source, artifact)
    proof = Proof()
    jobs = {name: list(_jobs(shape, source.views[name], artifact.views[name])) for name, shape in shapes.items()}
    results: dict[tuple[str, _Range], list[Leaf]] = {}
    workers = Workers()

    def compare(job: tuple[str, _Range]) -> None:
        name, rows = job
        results[job] = _compare(source, artifact, name, rows)
        advance((rows.stop - rows.start) * as_stack(shapes[name])[2])

    workers.each([(name, rows) for name, parts in jobs.items() for rows in parts], compare, threads)
    workers.join()
    for name, shape in shapes.items():
        leaves = [leaf for rows in jobs[name] for leaf in results[name, rows]]
        proof.tensors.append(_tensor_proof(name, shape, leaves, source, artifact))
    _require_close_weights(proof, as_made(source, artifact), artifact)
    _prove_experts(source, artifact, proof, threads, advance)
    return proof


def work_size(source: Source) -> int:
    """What `prove` reports to `advance` in all: values compared and values multiplied."""
    shapes = canonical_shapes(source.config)
    values = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(values.values()) + sum(count for name, count in values.items() if is_expert_matrix(name))


def _same_model(source: Source, artifact: Source) -> None:
    """The artifact's own configuration must describe the same model, as far as its format can say."""
    mine, theirs = vars(source.config), vars(artifact.config)
    for key, value in mine.items():
        if key in ("token_ids", "attention_factor"):
            continue  # not in every format; what a target cannot express it has refused
        same = math.isclose(value, theirs[key], rel_tol=1e-6) if isinstance(value, float) else value == theirs[key]
        if not same:
            raise ProofFailed(
                "the artifact describes another model", file=artifact.path, found=f"{key} {theirs[key]}", expected=value
            )
    artifact.require_sound()


# --- tensor by tensor --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    expert: int
    start: int
    stop: int


def _jobs(shape: Shape, *views: View) -> Iterator[_Range]:
    """What is read at a time: a leaf, or the whole matrix of a view that cannot read less."""
    experts, rows, _ = as_stack(shape)
    height = rows if any(reads_whole(view) for view in views) else LEAF_ROWS
    for expert in range(experts):
        for start in range(0, rows, height):
            yield _Range(expert, start, min(start + height, rows))


def _compare(source: Source, artifact: Source, name: str, rows: _Range) -> list[Leaf]:
    a = source.views[name].read(rows.expert, rows.start, rows.stop)
    b = artifact.views[name].read(rows.expert, rows.start, rows.stop)
    if a.shape != b.shape:
        raise ProofFailed("a tensor came back with another shape", tensor=name, found=b.shape, expected=a.shape)
    parts = [slice(start, start + LEAF_ROWS) for start in range(0, rows.stop - rows.start, LEAF_ROWS)]

    def reference(first: int, values: F32) -> F32:
        kept = artifact.kept
        return values if kept is None else kept_only(kept, name, rows.expert, rows.start + first, values)

    leaves = [compare_leaf(a.select(part), b.select(part), part.start, reference) for part in parts]
    for leaf in leaves:
        if leaf.astray is not None:
            row, column = leaf.astray
            raise ProofFailed(
                "a value of the artifact is not where rounding puts it", file=artifact.path, tensor=name,
                found=f"expert {rows.expert}, row {rows.start + row}, column {column}",
                expected=f"within half a step of {encoding_name(artifact.views[name])}",
                remedy="a fault of the conversion or of the disk; nothing was written. Run it again, and report it if it stays",
            )  # fmt: skip
    return leaves


def _tensor_proof(name: str, shape: Shape, leaves: list[Leaf], source: Source, artifact: Source) -> TensorProof:
    theirs = (encoding_name(source.views[name]), encoding_name(artifact.views[name]))
    different = sum(leaf.different for leaf in leaves)
    if all(leaf.same_bytes for leaf in leaves):
        verdict = BYTE_EQUAL
    else:
        verdict = DIFFERENT if different else VALUE_EQUAL
    square = sum(leaf.square for leaf in leaves)
    error = math.sqrt(sum(leaf.error for leaf in leaves) / square) if square else 0.0
    lost = sum(leaf.lost for leaf in leaves)
    return TensorProof(
        name, shape, *theirs, verdict,
        values_digest=blake3.blake3(b"".join(leaf.digest for leaf in leaves)).hexdigest(),
        values_dtype=values_dtype(theirs[0]),
        artifact_digest=blake3.blake3(b"".join(leaf.artifact_digest for leaf in leaves)).hexdigest() if different else None,
        artifact_dtype=values_dtype(theirs[1]) if different else None,
        different=different,
        rms_error=_rounded(error if different else 0.0),
        worst_leaf=_rounded(max(map(relative, leaves))),
        largest_error=_rounded(max(leaf.largest for leaf in leaves)),
        lost_by_cutting=_rounded(math.sqrt(lost / (lost + square))) if lost else None,
    )  # fmt: skip


def _allowed(made: View, held: View) -> float:
    """How far an artifact's tensor may be off. made: the source's, in the artifact's widths."""
    if isinstance(held, Gain) and held.encoding == "f32":
        return GAIN_ROUNDING
    allowed = 0.0
    for part in ("gate", "up"):
        codec = own_encoding(held, part)
        kept = stored_part(made, part, codec) or stored_part(made, "", codec)
        if kept is None and fate(read_encoding(made), codec).startswith("rounded"):
            allowed = max(allowed, WEIGHTS_AT_MOST.get(codec, WEIGHTS_OTHERWISE))
    return allowed


def _farther(artifact: Source) -> float:
    method = artifact.metadata.get(METHOD_KEY)
    return GPTQ_FARTHER if method is not None and method.value == "gptq" else 1.0


def _require_close_weights(proof: Proof, made: Source, artifact: Source) -> None:
    farther = _farther(artifact)
    for tensor in proof.tensors:
        if tensor.verdict != DIFFERENT or (tensor.lost_by_cutting and not tensor.worst_leaf):
            continue
        allowed = _allowed(made.views[tensor.name], artifact.views[tensor.name]) * farther
        if not tensor.worst_leaf <= allowed or not allowed:  # or NaN
            raise ProofFailed(
                "a tensor of the artifact does not hold the source's values",
                tensor=tensor.name,
                found=f"{tensor.different} values differ, relative error {tensor.worst_leaf:g} in some {LEAF_ROWS} rows",
                expected=f"an error below {allowed}" if allowed else "the same values",
                remedy="this is a fault of the conversion; nothing was written. Please report it",
            )


# --- expert by expert --------------------------------------------------------------------------------------------------


def _prove_experts(source: Source, artifact: Source, proof: Proof, threads: int, advance: Advance) -> None:
    config = source.config
    a, b = Witness(source), Witness(artifact)
    weight_errors = {tensor.name: tensor.rms_error for tensor in proof.tensors}
    errors: dict[tuple[int, int], float] = {}
    cuts: dict[tuple[int, int], float] = {}
    values = config.hidden * config.intermediate * 3

    def run(job: tuple[int, int]) -> None:
        layer, expert = job
        x = probes(config.hidden, PROBES, seed=layer * config.experts + expert)
        want = a.forward(layer, expert, x, config.swiglu_limit, artifact.kept)
        got = b.forward(layer, expert, x, config.swiglu_limit)
        errors[job] = _output_error(got, want)
        if artifact.kept is not None:
            cuts[job] = _output_error(want, a.forward(layer, expert, x, config.swiglu_limit))
        advance(values)

    workers = Workers()
    workers.each([(n, e) for n in range(config.layers) for e in range(config.experts)], run, threads)
    workers.join()
    proof.unchecked = sorted(a.unchecked | b.unchecked)
    for layer in range(config.layers):
        names = [layer_name(layer, part + suffix) for part in (GATE_UP, DOWN) for suffix in ("", "_bias")]
        weights = math.hypot(*(weight_errors[name] for name in names))
        farther = _farther(artifact)
        allowed = min(max(OUTPUT_OVER_WEIGHTS * weights, SAME), NEVER_ABOVE * farther)
        middle = min(allowed, MEDIAN_NEVER_ABOVE * farther)
        found = tuple(errors[layer, expert] for expert in range(config.experts))
        dropped = tuple(_rounded(cuts[layer, expert]) for expert in range(config.experts)) if cuts else None
        proof.layers.append(LayerProof(layer, tuple(map(_rounded, found)), _rounded(allowed), dropped))
        worst = int(np.argmax(found))
        worst = next((i for i, error in enumerate(found) if math.isnan(error)), worst)
        median = float(np.median(found))
        if not found[worst] <= allowed or not median <= middle:
            raise ProofFailed(
                "an expert of the artifact does not compute what the source's computes",
                file=artifact.path,
                tensor=f"layer {layer}, expert {worst}",
                found=f"relative output error {found[worst]:.3g}, of the layer's middle expert {median:.3g}",
                expected=f"at most {allowed:.3g}, and {middle:.3g}",
                remedy="this is a fault of the conversion; nothing was written. Please report it",
            )


def _output_error(got: F64, want: F64) -> float:
    size = np.maximum(np.linalg.norm(want, axis=1), np.finfo(np.float64).tiny)
    error = float((np.linalg.norm(got - want, axis=1) / size).max())
    return 0.0 if error <= SUMMATION_NOISE else error


def _rounded(number: float) -> float:
    """Six significant digits: what does not depend on the machine's last bit."""
    return float(f"{number:.6g}")

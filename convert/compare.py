"""`compare`: how far an artifact is from its source, tensor by tensor, expert by expert, and in what it says next.

    both open ─► every tensor, rows at a time ─► relative RMS, worst block
    with text ─► both walk through their layers together ─► each expert on the source's own activations, the stream after each
        layer
              ─► logits of both, a few tokens at a time ─► KL divergence, top-1 agreement, both perplexities

KL divergence is Σ p (ln p − ln q) over the vocabulary, p the source's distribution; scored are the tokens in the second half of
each sequence, as llama-perplexity does, so that every one has some context. Standard errors are of means over scored tokens,
taken as independent; of a perplexity and of the ratio of two by the delta method, exp(mean) · se(mean), the ratio's from paired
differences.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_convert import __version__
from gptoss_convert.convert.compare_tensors import compare_tensors, part_of, stored_bytes
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.names import (
    DOWN,
    GATE_UP,
    canonical_shapes,
    layer_name,
    split_name,
)
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.texts import Texts
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.quant.shrinkage import evenly, tokens_wanted

SCHEMA = "gptoss-convert/compare/1"
SAMPLE = 256  # tokens of an expert on which both sides are run
F64 = NDArray[np.float64]
METRICS = (
    "kld", "kld_median", "kld_p99", "kld_max", "top1_disagreement", "perplexity_ratio", "tensor_rms", "expert_error",
)  # fmt: skip


# --- text --------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Of each scored token: KL divergence, whether both sides' likeliest token is one, and both negative log-likelihoods."""

    kld: list[F64] = field(default_factory=list)
    same: list[F64] = field(default_factory=list)
    source: list[F64] = field(default_factory=list)
    artifact: list[F64] = field(default_factory=list)

    def add(self, p: Tensor, q: Tensor, following: Tensor) -> None:
        """Logits of both sides f32 [T, V], and the tokens that follow [T]."""
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kld = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0)
        self.kld.append(kld.cpu().numpy())
        self.same.append((p.argmax(-1) == q.argmax(-1)).double().cpu().numpy())
        for side, logs in ((self.source, p), (self.artifact, q)):
            side.append(-logs.gather(1, following[:, None].to(logs.device))[:, 0].double().cpu().numpy())

    def summary(self) -> dict[str, Any]:
        """Means with standard errors, and the distribution of the divergence."""
        kld, same, mine, theirs = (np.concatenate(a) for a in (self.kld, self.same, self.source, self.artifact))
        return {
            "scored": len(kld),
            "kld": {
                "mean": float(kld.mean()), "se": _se(kld), "median": float(np.median(kld)),
                "p99": float(np.quantile(kld, 0.99)), "max": float(kld.max()),
            },
            "top1": {"agreement": float(same.mean()), "se": _se(same)},
            "perplexity": {"source": _exp(mine), "artifact": _exp(theirs), "ratio": _exp(theirs - mine)},
        }  # fmt: skip


def _se(values: F64) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _exp(values: F64) -> dict[str, float]:
    """exp of a mean, with its standard error."""
    value = math.exp(min(float(values.mean()), 700.0))
    return {"value": value, "se": value * _se(values)}


@dataclass
class Walked:
    """What the two walks have shown."""

    tokens: list[list[int]] = field(default_factory=list)
    errors: list[list[float | None]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)


def walk_both(source: Source, artifact: Source, texts: Texts, device: str, show: ShowProgress) -> Walked:
    """Both models over the text, layer by layer, then their logits."""
    where = choose_device(device)
    mine, theirs = (Walk(Weights(side, where), texts.sequences) for side in (source, artifact))
    walked = Walked()
    for walk in (mine, theirs):
        walk.embed()
    with show("compare", source.config.layers + 1) as advance:
        for layer in range(source.config.layers):
            for walk in (mine, theirs):
                walk.attend(layer)
                walk.choose(layer)
            _experts(mine, theirs, layer, walked)
            lost = (theirs.x - mine.x).double().square().sum() / mine.x.double().square().sum()
            walked.layers[-1]["hidden_error"] = float(lost.sqrt())
            for walk in (mine, theirs):
                walk.weights.forget()
            advance(1)
        _score(mine, theirs, texts, walked.scores)
        advance(1)
    return walked


def _experts(mine: Walk, theirs: Walk, layer: int, walked: Walked) -> None:
    counts: list[int] = []
    errors: list[float | None] = []
    square = lost = 0.0
    for expert in range(mine.config.experts):
        own = [walk.chosen(expert) for walk in (mine, theirs)]
        counts.append(len(own[0][0]))
        if not any(len(tokens) for tokens, _ in own):
            errors.append(None)
            continue
        matrices = [
            [walk.weights.expert(layer_name(layer, name), expert) for name in (GATE_UP, DOWN)]
            for walk in (mine, theirs)
        ]
        sample = own[0][0][torch.from_numpy(evenly(SAMPLE, len(own[0][0])))]
        outputs = []
        for walk, (gate_up, down) in zip((mine, theirs), matrices, strict=True):
            parts = [
                walk.project(layer, expert, down, walk.activate(layer, expert, gate_up, u))
                for _, u in mine.inputs(sample)
            ]
            outputs.append(torch.cat(parts).double() if parts else torch.zeros(0))
        energy, error = float(outputs[0].square().sum()), float((outputs[1] - outputs[0]).square().sum())
        errors.append(math.sqrt(error / energy) if energy else None)
        square, lost = square + energy, lost + error
        for walk, (tokens, shares), (gate_up, down) in zip((mine, theirs), own, matrices, strict=True):
            for part, u in walk.inputs(tokens):
                y = walk.project(layer, expert, down, walk.activate(layer, expert, gate_up, u))
                walk.add(tokens[part], shares[part], y)
    walked.tokens.append(counts)
    walked.errors.append(errors)
    walked.layers.append({"layer": layer, "output_error": math.sqrt(lost / square) if square else 0.0})


def scored_positions(sequences: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Tokens whose following token is scored, in the second half of each sequence, and what follows them."""
    at, following, start = [], [], 0
    for sequence in sequences:
        here = np.arange(len(sequence) // 2, len(sequence) - 1)
        at.append(start + here)
        following.append(np.asarray(sequence)[here + 1])
        start += len(sequence)
    return torch.from_numpy(np.concatenate(at)), torch.from_numpy(np.concatenate(following).astype(np.int64))


def _score(mine: Walk, theirs: Walk, texts: Texts, scores: Scores) -> None:
    at, following = scored_positions(texts.sequences)
    if not len(at):
        raise UsageError(
            "the text has no token to score", found=texts.name, expected="sequences of three tokens at least"
        )
    step = max(mine.tokens_of_logits // 4, 1)
    for start in range(0, len(at), step):
        part = slice(start, start + step)
        scores.add(mine.logits(at[part]), theirs.logits(at[part]), following[part])


# --- the whole ---------------------------------------------------------------------------------------------------------


def compare(
    source: Source, artifact: Source, texts: Texts | None, *, device: str = "cpu", threads: int = 1, context: int = 0,
    show: ShowProgress,
) -> dict[str, Any]:  # fmt: skip
    """The document that `compare --json` prints and `--report` shows."""
    _require_same_shape(source, artifact)
    walked = None if texts is None else walk_both(source, artifact, texts, device, show)
    tensors = compare_tensors(source, artifact, threads, show)
    c = source.config
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "source": _side(source),
        "artifact": {
            **_side(artifact),
            "widened": None if artifact.wide is None else [artifact.wide.hidden, artifact.wide.intermediate],
            "method": _method(artifact),
            "losses": list(artifact.losses),
        },
        "model": {
            "layers": c.layers, "experts": c.experts, "experts_per_token": c.experts_per_token, "hidden": c.hidden,
            "intermediate": c.intermediate, "vocab": c.vocab, "release": c.release,
        },
        "tensors": tensors,
        "experts": None if walked is None else {"tokens": walked.tokens, "output_error": walked.errors},
        "layers": None if walked is None else walked.layers,
        "text": None if walked is None or texts is None else {
            "name": texts.name, "digest": texts.digest, "tokens": texts.tokens, "context": context, **walked.scores.summary()
        },
        "sizes": {"parts": _sizes(source, artifact)},
        "coverage": None if walked is None or texts is None else _coverage(walked.tokens, c.hidden, texts.tokens),
        "gates": [],
        "versions": {"gptoss_convert": __version__, "torch": None if walked is None else torch.__version__},
        "device": device,
    }  # fmt: skip
    return document


def _require_same_shape(source: Source, artifact: Source) -> None:
    mine, theirs = canonical_shapes(source.config), canonical_shapes(artifact.config)
    # metal leaves out the vocabulary's rows without a token
    odd = next((n for n, shape in mine.items() if theirs.get(n) != shape), None) or next(
        iter(theirs.keys() - mine.keys()), None
    )
    if odd is not None:
        raise BadInput(
            "the two are not one model in two forms", file=artifact.path, tensor=odd,
            found=list(theirs.get(odd, ())) or "no such tensor", expected=list(mine.get(odd, ())) or "no such tensor",
            remedy="the artifact comes first, its source second",
        )  # fmt: skip


def _side(source: Source) -> dict[str, Any]:
    return {
        "name": Path(source.path).resolve().name,
        "layout": str(source.layout),
        "bytes": sum(file.size for file in source.files),
        "digest": None,
    }


def _method(artifact: Source) -> str | None:
    found = artifact.metadata.get("gptoss-convert.rounding.method")
    return None if found is None else str(found.value)


def _sizes(source: Source, artifact: Source) -> dict[str, dict[str, float]]:
    values: dict[str, int] = defaultdict(int)
    stored: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in canonical_shapes(source.config).items():
        part = part_of(split_name(name)[1])
        values[part] += math.prod(shape)
        stored[part][0] += stored_bytes(source, name)
        stored[part][1] += stored_bytes(artifact, name)
    return {
        part: {"source": mine, "artifact": theirs, "bits_per_weight": round(8 * theirs / values[part], 4)}
        for part, (mine, theirs) in stored.items()
    }


def _coverage(tokens: list[list[int]], columns: int, total: int) -> dict[str, Any]:
    needed = tokens_wanted(columns)
    return {
        "needed": needed,
        "short": sum(count < needed for row in tokens for count in row),
        "router_load": [[round(count / max(total, 1), 6) for count in row] for row in tokens],
    }


# --- gates -------------------------------------------------------------------------------------------------------------


def parse_gate(text: str) -> tuple[str, float]:
    """ "kld=0.02" → (metric, limit)."""
    metric, _, limit = text.partition("=")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if metric not in METRICS or not value >= 0:
        raise UsageError("not a gate", found=text, expected=f"METRIC=LIMIT, METRIC one of {', '.join(METRICS)}")
    return metric, value


def judge(document: dict[str, Any], gates: Sequence[tuple[str, float]]) -> bool:
    """Measure the document by its gates, write the result into it; whether all are kept."""
    for metric, limit in gates:
        found = _metric(document, metric)
        document["gates"].append({"metric": metric, "limit": limit, "found": found, "passed": found <= limit})
    return all(gate["passed"] for gate in document["gates"])


def _metric(document: Mapping[str, Any], metric: str) -> float:
    if metric == "tensor_rms":
        return float(max(tensor["relative_rms"] for tensor in document["tensors"]))
    text = document["text"]
    if text is None:
        raise UsageError(f"the gate {metric} needs a text", remedy="give --text")
    if metric == "expert_error":
        return float(max((e for row in document["experts"]["output_error"] for e in row if e is not None), default=0.0))
    if metric == "top1_disagreement":
        return 1.0 - float(text["top1"]["agreement"])
    if metric == "perplexity_ratio":
        return float(text["perplexity"]["ratio"]["value"])
    return float(text["kld"]["mean" if metric == "kld" else metric.removeprefix("kld_")])

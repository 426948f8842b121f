"""`compare`: how far an artifact is from its source, tensor by tensor, expert by expert, and in what it says next.

    both open ─► every tensor, rows at a time ─► relative RMS, worst block
    with text ─► both walk through their layers together ─► each expert on the source's own activations, the stream after each
        layer
              ─► logits of both, a few tokens at a time ─► KL divergence, top-1 agreement, both perplexities

KL divergence is Σ p (ln p − ln q) over the vocabulary, p the source's distribution; scored are the tokens in the second half of
each sequence, as llama-perplexity does, so that every one has some context. Standard errors are of means over scored tokens,
taken as independent, and unknown (None) of fewer than two; of a perplexity and of the ratio of two by the delta method,
exp(mean) · se(mean), the ratio's from paired differences.

A figure in which a value that is no finite number takes part is NaN or infinite itself, never left out; JSON shows it as null.
Every file of both sides is hashed beside the work.
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
from gptoss_convert.convert.calibration import FILE, KEY
from gptoss_convert.convert.compare_tensors import compare_tensors, part_of, relative, stored_bytes
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.names import (
    DOWN,
    GATE_UP,
    canonical_shapes,
    layer_name,
    split_name,
)
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.run import SourceHashing
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.texts import Texts
from gptoss_convert.convert.views import held_encodings
from gptoss_convert.convert.walk_memory import TOKENS_AT_ONCE
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.tree import resolve_inside
from gptoss_convert.kernels.products import use_threads
from gptoss_convert.quant.shrinkage import evenly, tokens_wanted

SCHEMA = "gptoss-convert/compare/1"
SAMPLE = 256  # tokens of an expert on which both sides are run
F64 = NDArray[np.float64]
INT8_NOTE = (
    "int8 weights with a scale for each output (W8A8): whatever runs them rounds the activations to int8 as well; compare "
    "measures the weights alone, so the model that is run lies farther from the source than these figures say"
)


# --- text --------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Of each scored token: KL divergence, whether both sides' likeliest token is one, and both negative log-likelihoods.

    Where logits are no numbers, nothing of a token is one.
    """

    kld: list[F64] = field(default_factory=list)
    same: list[F64] = field(default_factory=list)
    source: list[F64] = field(default_factory=list)
    artifact: list[F64] = field(default_factory=list)

    def add(self, p: Tensor, q: Tensor, following: Tensor) -> None:
        """Logits of both sides f32 [T, V], and the tokens that follow [T]."""
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kld = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0)
        self.kld.append(kld.cpu().numpy())
        same = (p.argmax(-1) == q.argmax(-1)).double()  # argmax of what is no number is a token nevertheless
        self.same.append(same.masked_fill(kld.isnan(), math.nan).cpu().numpy())
        for side, logs in ((self.source, p), (self.artifact, q)):
            side.append(-logs.gather(1, following[:, None].to(logs.device))[:, 0].double().cpu().numpy())

    def summary(self) -> dict[str, Any]:
        """Means with standard errors, and the distribution of the divergence."""
        kld, same, mine, theirs = (np.concatenate(a) for a in (self.kld, self.same, self.source, self.artifact))
        with np.errstate(all="ignore"):  # of infinite values
            return {
                "scored": len(kld),
                "kld": {
                    "mean": float(kld.mean()), "se": _se(kld), "median": float(np.median(kld)),
                    "p99": float(np.quantile(kld, 0.99)), "max": float(kld.max()),
                },
                "top1": {"agreement": float(same.mean()), "se": _se(same)},
                "perplexity": {"source": _exp(mine), "artifact": _exp(theirs), "ratio": _exp(theirs - mine)},
            }  # fmt: skip


def _se(values: F64) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _exp(values: F64) -> dict[str, float | None]:
    """exp of a mean, with its standard error."""
    value, se = float(np.exp(values.mean())), _se(values)
    return {"value": value, "se": None if se is None else value * se}


@dataclass
class Walked:
    """What the two walks have shown."""

    tokens: list[list[int]] = field(default_factory=list)
    errors: list[list[float | None]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)


def walk_both(source: Source, artifact: Source, texts: Texts, device: str, show: ShowProgress) -> Walked:
    """Both models over the text, layer by layer, then their logits."""
    at, following = scored_positions(texts.sequences)
    if not len(at):
        raise UsageError(
            "the text has no token to score", found=texts.name, expected="a sequence of three tokens at least",
            remedy="give a longer text",
        )  # fmt: skip
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
            walked.layers[-1]["hidden_error"] = _distance(mine.x, theirs.x)
            for walk in (mine, theirs):
                walk.weights.forget()
            advance(1)
        _score(mine, theirs, at, following, walked.scores)
        advance(1)
    return walked


def _distance(mine: Tensor, theirs: Tensor) -> float:
    """√(Σ(theirs − mine)² / Σ mine²) of two streams [N, D], a run of tokens at a time."""
    square = lost = 0.0
    for start in range(0, len(mine), TOKENS_AT_ONCE):
        a, b = (side[start : start + TOKENS_AT_ONCE] for side in (mine, theirs))
        square, lost = square + float(a.double().square().sum()), lost + float((b - a).double().square().sum())
    return relative(lost, square)


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
        errors.append(relative(error, energy) if len(sample) else None)
        square, lost = square + energy, lost + error
        for walk, (tokens, shares), (gate_up, down) in zip((mine, theirs), own, matrices, strict=True):
            for part, u in walk.inputs(tokens):
                y = walk.project(layer, expert, down, walk.activate(layer, expert, gate_up, u))
                walk.add(tokens[part], shares[part], y)
    walked.tokens.append(counts)
    walked.errors.append(errors)
    walked.layers.append({"layer": layer, "output_error": relative(lost, square)})


def scored_positions(sequences: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Tokens whose following token is scored, in the second half of each sequence, and what follows them."""
    at, following, start = [], [], 0
    for sequence in sequences:
        here = np.arange(len(sequence) // 2, len(sequence) - 1)
        at.append(start + here)
        following.append(np.asarray(sequence)[here + 1])
        start += len(sequence)
    return torch.from_numpy(np.concatenate(at)), torch.from_numpy(np.concatenate(following).astype(np.int64))


def _score(mine: Walk, theirs: Walk, at: Tensor, following: Tensor, scores: Scores) -> None:
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
    method = _method(artifact)
    with SourceHashing(source) as mine, SourceHashing(artifact) as theirs:
        use_threads(threads)
        walked = None if texts is None else walk_both(source, artifact, texts, device, show)
        tensors = compare_tensors(source, artifact, threads, show)
        digests = mine.join(), theirs.join()
    c = source.config
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "source": _side(source, digests[0]),
        "artifact": {
            **_side(artifact, digests[1]),
            "widened": None if artifact.wide is None else [artifact.wide.hidden, artifact.wide.intermediate],
            "method": method,
            "losses": list(artifact.losses),
            "notes": _notes(artifact),
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


def _side(source: Source, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": Path(source.path).resolve().name,
        "layout": str(source.layout),
        "bytes": sum(file.size for file in source.files),
        "files": [{"name": f.name, "bytes": f.size, "sha256": digests[f.name]} for f in source.files],
    }


def _method(artifact: Source) -> str | None:
    """How the artifact was rounded, as a GGUF's metadata or a file in a folder says."""
    found = artifact.metadata.get(KEY + "method")
    if found is not None:
        return str(found.value)
    if not (artifact.path.is_dir() and (artifact.path / FILE).exists()):
        return None
    method = read_json(resolve_inside(artifact.path, FILE)).get("method")
    return method if isinstance(method, str) else None


def _notes(artifact: Source) -> list[str]:
    """What a reader of the figures must know."""
    rounded = any("int8_channel" in held_encodings(view) for view in artifact.views.values())
    return [INT8_NOTE] if rounded else []


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

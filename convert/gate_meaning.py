"""Which of its two meanings "gate_proj" has in a checkpoint with one gate_proj and one up_proj for each expert.

    deinterleaved   gate_proj = fused rows 0, 2, 4 …, up_proj = rows 1, 3, 5 …      (llama.cpp, AutoRound, GPTQModel)
    halves          gate_proj = the first half of the fused rows, up_proj = the second, each still alternating gate and up
                    (llm-compressor's and Defuser's splitting; wrong as a name, harmless only if undone the same way)

Shapes are the same, so the weights must tell. In a trained gpt-oss gates and ups have different biases (in the release
about −0.5 and −0.9) and different row norms. So with m(x) the mean of a row statistic over all experts of a layer:

    between = m(gate_proj) − m(up_proj);   parity = m(even rows of both) − m(odd rows of both)

De-interleaved tensors differ between and not by parity, halves the other way round. Each difference is compared with its
standard error; the larger must exceed `CLEAR` standard errors and `TIMES` the smaller, in every layer looked at and all
layers must agree. Otherwise nothing is guessed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.convert.names import GATE_UP, layer_name
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Alternating, Halves
from gptoss_convert.errors import Refused

MEANINGS = ("deinterleaved", "halves")
CLEAR = 6.0
TIMES = 3.0
LAYERS = 4
EXPERTS = 8


def decide(source: Source, told: str | None) -> None:
    """Settle the meaning, note it, and replace the views where it is "halves"; Refused where the weights do not tell."""
    if any(layer_name(n, GATE_UP + s) not in source.views for n in range(source.config.layers) for s in ("", "_bias")):
        return  # tensors are missing: reported as such
    measured = _measured(source)
    meaning = told or measured
    if meaning is None:
        raise Refused(
            "gate_proj has two known meanings, and these weights do not tell which one it has here",
            file=source.path,
            found="gate and up rows that do not differ in bias or norm",
            expected="gate_proj = rows 0, 2, 4 … of the fused tensor (deinterleaved), or its first half (halves)",
            remedy="ask the tool that wrote it, then give --gate-proj deinterleaved or --gate-proj halves",
        )
    if meaning == "halves":
        for name, view in source.views.items():
            if isinstance(view, Alternating):
                source.views[name] = Halves(view.gate, view.up, view.columns)
    source.gate_meaning = meaning
    how = "as told" if told else "as measured from biases and row norms"
    if told and measured not in (None, told):
        how = f"as told, though biases and row norms say {measured}"
    what = {
        "deinterleaved": "gate_proj holds the gate rows, up_proj the up rows",
        "halves": "gate_proj holds the first half of the alternating rows, up_proj the second (the names are wrong)",
    }[meaning]
    source.notes.append(f"{what} ({how}: {meaning})")


def _measured(source: Source) -> str | None:
    votes = {_layer_vote(source, layer) for layer in _spread(source.config.layers, LAYERS)}
    return votes.pop() if len(votes) == 1 else None


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def _layer_vote(source: Source, layer: int) -> str | None:
    weights, biases = (source.views[layer_name(layer, GATE_UP + s)] for s in ("", "_bias"))
    assert isinstance(weights, Alternating)
    assert isinstance(biases, Alternating)
    experts = _spread(source.config.experts, EXPERTS)
    rows = weights.gate.stack[1]
    norms = [[np.linalg.norm(v.read(e, 0, rows).values(), axis=1) for v in (weights.gate, weights.up)] for e in experts]
    bias = [[v.read(0, e, e + 1).values()[0] for v in (biases.gate, biases.up)] for e in experts]
    clearest = [_clear(np.array(statistic, np.float64)) for statistic in (bias, norms)]
    decided = {vote for vote in clearest if vote is not None}
    return decided.pop() if len(decided) == 1 else None


def _clear(statistic: NDArray[np.float64]) -> str | None:
    """statistic f64 [experts, 2, rows]: what it says, or None where it says nothing clear."""
    gate, up = statistic[:, 0].reshape(-1), statistic[:, 1].reshape(-1)
    even, odd = statistic[:, :, 0::2].reshape(-1), statistic[:, :, 1::2].reshape(-1)
    between, parity = abs(_separation(gate, up)), abs(_separation(even, odd))
    if between > CLEAR and between > TIMES * parity:
        return "deinterleaved"
    if parity > CLEAR and parity > TIMES * between:
        return "halves"
    return None


def _separation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Difference of means in standard errors."""
    error = np.sqrt(a.var() / a.size + b.var() / b.size)
    return float((a.mean() - b.mean()) / error) if error > 0 else 0.0

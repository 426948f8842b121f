"""Witnesses: what each layout's file computes, read by its consumer's words, is what the model computes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_values
from support.checkpoints import Model, write_hf
from support.layouts import LAYOUTS

from gptoss_convert.convert import witness
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.witness import Witness
from gptoss_convert.kernels.experts import probes

F64 = NDArray[np.float64]


def forward(
    values: Mapping[str, NDArray[np.float32]], layer: int, expert: int, x: NDArray[np.float32], limit: float
) -> F64:
    """The expert's formula in float64: x [P, D] → [P, D]."""
    stem = f"model.layers.{layer}.mlp.experts."
    wide = {name: values[stem + name].astype(np.float64) for name in ("gate_up_proj", "down_proj")}
    bias = {name: values[f"{stem}{name}_bias"][0, expert].astype(np.float64) for name in wide}
    h = x @ wide["gate_up_proj"][expert].T + bias["gate_up_proj"]
    gate, up = np.minimum(h[:, 0::2], limit), np.clip(h[:, 1::2], -limit, limit)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1) @ wide["down_proj"][expert].T + bias["down_proj"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_witness_computes_what_the_model_computes(name: str, layouts: dict[str, Path], awkward_model: Model) -> None:
    values, spec = canonical_values(awkward_model), awkward_model.spec
    with open_source(layouts[name]) as source:
        there = Witness(source)
        for layer in range(spec.layers):
            for expert in range(spec.experts):
                x = probes(spec.hidden, 3, seed=layer * 31 + expert)
                expected = forward(values, layer, expert, x, spec.swiglu_limit)
                found = there.forward(layer, expert, x, spec.swiglu_limit)
                assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected), (layer, expert)


def test_experts_and_layers_differ_so_that_none_can_stand_for_another(awkward_model: Model) -> None:
    values, spec = canonical_values(awkward_model), awkward_model.spec
    x = probes(spec.hidden, 1, seed=1)
    outputs = [forward(values, n, e, x, 7.0) for n in range(spec.layers) for e in range(spec.experts)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.linalg.norm(one - other) > 0.5 * np.linalg.norm(one)


def test_a_square_model_is_read_right_too(square_model: Model, tmp_path: Path) -> None:
    write_hf(square_model, tmp_path)
    x = probes(square_model.spec.hidden, 2, seed=5)
    with open_source(tmp_path) as source:
        found = Witness(source).forward(1, 2, x, 7.0)
    assert np.allclose(found, forward(canonical_values(square_model), 1, 2, x, 7.0), rtol=1e-5, atol=1e-5)


def test_a_witness_shares_with_the_views_no_more_than_the_header_parsers() -> None:
    """Of `views`, `source_*` and `kernels.mxfp4` nothing: a mistake made there must not be made here."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(Path(witness.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    own = {name.removeprefix("gptoss_convert.") for name in imported if name.startswith("gptoss_convert.")}
    assert not {name for name in own if "views" in name or "source_" in name or "mxfp4" in name or "chunks" in name}
    assert {"kernels.witness.decode_ggml", "kernels.witness.decode_release"} <= own

"""Tensors side by side: figures that huge and tiny values do not spoil, and what is not finite told with its place."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import STEADY, Model, write_bf16

from gptoss_convert.convert import compare_tensors as tensors_module
from gptoss_convert.convert.compare_tensors import compare_tensors
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import open_source

SPEC = replace(STEADY, layers=1)
STORED, NAME = "block.0.attn.out.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors") / "plain"
    write_bf16(Model(SPEC), folder, rope="parameters")
    return folder


def changed(folder: Path, *places: tuple[int, int, float], name: str = STORED) -> Path:
    model = Model(SPEC)
    for row, column, value in places:
        model.tensors[name][row, column] = value
    write_bf16(model, folder, rope="parameters")
    return folder


def compared(source: Path, artifact: Path) -> dict[str, dict[str, Any]]:
    with open_source(source) as a, open_source(artifact) as b, warnings.catch_warnings():
        warnings.simplefilter("error")
        return {tensor["name"]: tensor for tensor in compare_tensors(a, b, 2, silent)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_counted_on_its_side_and_placed(
    value: float, plain: Path, tmp_path: Path
) -> None:
    odd = changed(tmp_path / "odd", (37, 100, value), (40, 3, value))
    place = {"expert": 0, "row": 37, "column": 100}
    for source, artifact, counts in (
        (plain, odd, {"source": 0, "artifact": 2}),
        (odd, plain, {"source": 2, "artifact": 0}),
        (odd, odd, {"source": 2, "artifact": 2}),
    ):
        found = compared(source, artifact)
        assert found[NAME]["not_finite"] == counts | place
        assert math.isnan(found[NAME]["relative_rms"])
        assert found[NAME]["worst"] is None
        assert [name for name, tensor in found.items() if tensor["not_finite"]] == [NAME]


def test_huge_differences_are_measured_without_a_warning(plain: Path, tmp_path: Path) -> None:
    found = compared(plain, changed(tmp_path / "huge", (5, 40, 3e38), (6, 70, -3e38)))[NAME]
    value = float(torch.tensor(3e38).to(torch.bfloat16))
    matrix = Model(SPEC).tensors[STORED].double().numpy()
    assert found["relative_rms"] == pytest.approx(math.sqrt(2) * value / math.sqrt(np.square(matrix).sum()), rel=1e-3)
    assert found["not_finite"] is None
    assert found["worst"] | {"relative_rms": 0} == {
        "relative_rms": 0, "expert": 0, "row": 5, "column": 32, "columns": 32,
    }  # fmt: skip
    assert math.isfinite(found["worst"]["relative_rms"])


def test_both_ends_of_the_range_do_not_overflow(tmp_path: Path) -> None:
    found = compared(changed(tmp_path / "one", (0, 0, -3e38)), changed(tmp_path / "two", (0, 0, 3e38)))[NAME]
    assert found["relative_rms"] == pytest.approx(2, rel=1e-6)


def test_a_faint_difference_is_placed_too(tmp_path: Path) -> None:
    found = compared(changed(tmp_path / "one", (9, 70, 1e-30)), changed(tmp_path / "two", (9, 70, 1e-29)))[NAME]
    assert not found["equal"]
    assert (found["worst"]["row"], found["worst"]["column"]) == (9, 64)


def test_something_of_nothing_is_infinitely_far() -> None:
    assert tensors_module.relative(0.0, 0.0) == 0
    assert tensors_module.relative(1e-300, 0.0) == math.inf
    assert math.isnan(tensors_module.relative(0.0, 1.0, spoilt=True))


def test_the_last_columns_of_a_width_that_blocks_do_not_divide_count() -> None:
    a = np.zeros((2, 40), np.float32)
    b = a.copy()
    b[1, 39] = 1
    found = tensors_module._of_rows(a, b, 3, 10)
    assert found.worst == (1.0, 3, 11, 32)

"""The runner: threads that stop together, hashing that follows the writing, and memory that stays within the forecast."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import TRUE_LAYER, Model, write_bf16, write_hf

from gptoss_convert.convert import run
from gptoss_convert.convert.plan import OutFile, Piece, Place, Plan, Step
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import BadInput


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_item_is_worked_on_once(threads: int) -> None:
    done: list[int] = []
    workers = Workers()
    workers.each(range(500), done.append, threads)
    workers.join()
    assert sorted(done) == list(range(500))


def test_the_first_error_stops_all_and_is_raised() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 20:
            raise BadInput("this one")
        time.sleep(0.001)
        done.append(item)

    workers = Workers()
    workers.each(range(5000), work, 3)
    with pytest.raises(BadInput, match="this one"):
        workers.join()
    assert len(done) < 100
    assert workers.stopped.is_set()


def test_an_iterator_that_fails_is_no_deadlock() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise BadInput("no more")

    workers = Workers()
    workers.each(items(), lambda _: None, 2)
    with pytest.raises(BadInput, match="no more"):
        workers.join()


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    running = threading.Event()
    ended: list[int] = []

    def work(item: int) -> None:
        running.set()
        time.sleep(0.05)
        ended.append(item)

    workers = Workers()
    workers.each(range(1000), work, 2)
    running.wait()
    true, calls = threading.Thread.join, 0

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        true(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.join()
    monkeypatch.undo()
    assert not any(thread.is_alive() for thread in workers._threads)
    assert len(ended) < 20


def small_plan() -> Plan:
    """Two files: header of 10, pieces at 10 and 40 (with a gap), and one file of a header alone."""
    pieces = [Piece(0, 40, 10, "f32", "", False, False), Piece(0, 10, 28, "f32", "", False, False)]
    steps = [Step("t", i, 0, 1, (piece,)) for i, piece in enumerate(pieces)]
    files = [OutFile("a", b"h" * 10, 60), OutFile("b", b"h" * 5, 5)]
    places = {"x": Place(0, 40, 10), "y": Place(0, 10, 28)}
    return Plan("gguf", None, {}, {}, files, places, {}, steps)  # type: ignore[arg-type]


def test_the_finished_front_moves_over_gaps_and_never_over_what_is_not_written() -> None:
    plan = small_plan()
    front = run._Front(plan)
    stopped = threading.Event()
    ends: list[int] = []

    def reached(file: int, beyond: int, within: float = 0.3) -> int | None:
        result: list[int] = []
        thread = threading.Thread(target=lambda: result.append(front.wait(file, beyond, stopped)), daemon=True)
        thread.start()
        thread.join(within)
        return result[0] if result else None

    assert reached(0, 0) is None  # the header is not there yet
    front.open(0)
    assert reached(0, 0) == 10
    front.finish(plan.steps[0])  # the later piece first
    assert reached(0, 10) is None
    front.finish(plan.steps[1])
    assert reached(0, 10) == 60
    front.open(1)
    assert reached(1, 0) == 5
    stopped.set()
    assert ends == []


# --- memory ------------------------------------------------------------------------------------------------------------

MEASURED = """
import json, re, sys
from pathlib import Path
from gptoss_convert.convert import conversion, dry_run
from gptoss_convert.convert.progress import silent

path, target, to, more = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
options = conversion.Options(to, **more)
with conversion.open_for(Path(path), options) as source:
    plan = conversion.make_plan(source, Path(target), options)
    told = dry_run.forecast(source, plan, options)
conversion.convert(Path(path), Path(target), options, silent)
# Not ru_maxrss, which a process inherits from the one that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak, "told": told["peak_memory_bytes"], "threads": told["threads"]}))
"""


@pytest.fixture(scope="session")
def true_layer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One layer of the released widths, in MXFP4, bf16 and f32; few experts, because a step is of one."""
    model, folder = Model(replace(TRUE_LAYER, experts=5)), tmp_path_factory.mktemp("true")
    write_hf(model, folder / "hf")
    write_bf16(model, folder / "bf16")
    shutil.copytree(folder / "bf16", folder / "f32")
    for path in (folder / "f32").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.float() if n.endswith(("up_proj", "down_proj")) else t for n, t in tensors.items()}, path)
    return {layout: folder / layout for layout in ("hf", "bf16", "f32")}


@pytest.mark.parametrize(
    ("layout", "to", "options"),
    [
        ("hf", "gguf", {}),
        ("hf", "bf16", {}),
        ("bf16", "hf", {}),
        ("bf16", "gguf", {"experts": "q8_0", "dense": "q8_0"}),
        ("f32", "gguf", {}),
        pytest.param("bf16", "gguf", {"type": "q4_k_m"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("threads", [8])
def test_a_true_layer_needs_no_more_memory_than_forecast(
    layout: str, to: str, options: dict[str, Any], threads: int, true_layer: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    more = json.dumps({**options, "threads": threads})
    command = [sys.executable, "-P", "-c", MEASURED, str(true_layer[layout]), str(target), to, more]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    measured = json.loads(result.stdout)
    assert measured["peak"] <= measured["told"], measured
    assert measured["peak"] < 1.5 * (1 << 30)

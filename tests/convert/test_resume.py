"""A run killed at any moment leaves nothing under the target's name, and the next one takes it up and ends the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_hf, write_per_expert

from gptoss_convert.convert import run
from gptoss_convert.errors import ProofFailed

# The command in a process that ends itself by a signal at a moment of the run.
KILLED = """
import os, signal, sys, threading
from gptoss_convert.formats import output
from gptoss_convert.convert import conversion
from gptoss_convert.cli import main

moment, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
lock, calls = threading.Lock(), 0

def before(owner, name, half=None):
    true = getattr(owner, name)
    def wrapped(*arguments, **options):
        global calls
        with lock:
            calls += 1
            if calls == count:
                if half is not None:
                    half(true, *arguments)
                os.kill(os.getpid(), number)
        return true(*arguments, **options)
    setattr(owner, name, wrapped)

if moment == "record":
    before(output.Output, "record")
elif moment == "torn write":
    before(output.os, "pwrite", lambda true, fd, data, at: true(fd, data[: len(data) // 2], at))
elif moment == "torn journal":
    before(output.os, "write", lambda true, fd, data: true(fd, data[: len(data) // 2]))
elif moment == "proof":
    before(conversion, "prove")
elif moment == "sync":
    before(output.os, "fsync")
elif moment == "rename":
    before(output.Path, "replace")
elif moment == "rename of the folder":
    before(output.Path, "rename")
main(sys.argv[4:])
"""


def killed(moment: str, count: int, *command: str, by: int = signal.SIGKILL) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-P", "-c", KILLED, moment, str(count), str(int(by)), "convert", *command]
    return subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of the steps that are done from now on, in this process."""
    done: list[str] = []
    true = run.do_step

    def counted(step: Any, *more: Any) -> str:
        done.append(step.tensor)
        return true(step, *more)

    monkeypatch.setattr(run, "do_step", counted)
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory, convert: Any) -> dict[str, dict[str, bytes]]:
    """What a run that nothing disturbs makes, by target."""
    results = {}
    for to in ("gguf", "hf", "onnx"):
        folder = tmp_path_factory.mktemp(to)
        convert(hf_folder, folder / ("m.gguf" if to == "gguf" else "m"), to)
        results[to] = contents(folder)
    return results


MOMENTS = [
    ("gguf", "record", 1),
    ("gguf", "record", 40),
    ("gguf", "record", 83),
    ("gguf", "torn write", 57),
    ("gguf", "torn journal", 30),
    ("gguf", "proof", 1),
    ("gguf", "sync", 1),
    ("gguf", "rename", 1),  # of the certificate
    ("gguf", "rename", 2),  # of the artifact, whose certificate stands already
    ("hf", "record", 61),
    ("hf", "rename of the folder", 1),
    ("onnx", "record", 40),
    ("onnx", "torn write", 130),  # after the zeros between the tensors
    ("onnx", "proof", 1),
]


@pytest.mark.parametrize(("to", "moment", "count"), MOMENTS)
def test_a_run_killed_at_any_moment_is_taken_up_and_ends_the_same(
    to: str,
    moment: str,
    count: int,
    hf_folder: Path,
    tmp_path: Path,
    convert: Any,
    steps_done: list[str],
    undisturbed: dict[str, dict[str, bytes]],
) -> None:
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    result = killed(moment, count, str(hf_folder), str(target), "--to", to, "--threads", "2")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not target.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {f".{target.name}.partial", "m.gguf.certificate.json"}
    outcome = convert(hf_folder, target, to)
    sure = {"record": count - 1, "torn write": 30, "torn journal": count - 5}.get(moment, len(outcome.plan.steps))
    assert len(outcome.plan.steps) - len(steps_done) >= sure - 2
    assert contents(tmp_path) == undisturbed[to]


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("to", ["gguf", "hf", "onnx"])
def test_bytes_that_changed_since_are_done_again_wherever_they_lie(
    to: str,
    hf_folder: Path,
    tmp_path: Path,
    convert: Any,
    steps_done: list[str],
    undisturbed: dict[str, dict[str, bytes]],
) -> None:
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    result = killed("proof", 1, str(hf_folder), str(target), "--to", to)
    assert result.returncode == -signal.SIGKILL, result.stderr
    partial = tmp_path / f".{target.name}.partial"
    largest = max((path for path in partial.iterdir() if path.name != "journal"), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    places = [5, size // 3, size // 2, size - 1]
    if to == "gguf":
        whole = undisturbed[to]["m.gguf"]
        places.append(whole.index(b"\0" * 8, whole.index(b"ffn_gate_inp.bias")))
    for place in places:
        spoil(largest, place)
    convert(hf_folder, target, to)
    assert 1 <= len(steps_done) <= len(places)
    assert contents(tmp_path) == undisturbed[to]


def test_padding_that_changed_since_is_zero_again(
    hf_folder: Path, tmp_path: Path, convert: Any, steps_done: list[str], undisturbed: Any
) -> None:
    """SMALL's six sinks in F32 end 8 bytes before the next tensor: bytes that belong to no step."""
    target = tmp_path / "m.gguf"
    killed("proof", 1, str(hf_folder), str(target), "--to", "gguf")
    from gguf import GGUFReader

    ends = [(t.data_offset + t.n_bytes) for t in GGUFReader(tmp_path / ".m.gguf.partial" / "m.gguf").tensors]
    gaps = [end for end in ends if end % 32]
    assert gaps
    spoil(tmp_path / ".m.gguf.partial" / "m.gguf", gaps[0])
    convert(hf_folder, target, "gguf")
    assert steps_done == []
    assert contents(tmp_path) == undisturbed["gguf"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda lines: [*lines[:10], lines[10][:7]], id="torn"),
        pytest.param(
            lambda lines: [*lines[:10], json.dumps({"step": 10**9, "digest": "x"}) + "\n", *lines[10:]], id="absurd"
        ),
        pytest.param(
            lambda lines: [*lines[:5], json.dumps({"step": True, "digest": None, "more": []}) + "\n", *lines[5:]],
            id="odd",
        ),
        pytest.param(lambda lines: [lines[0], *reversed(lines[1:])], id="reordered"),
        pytest.param(lambda lines: lines + lines[1:], id="doubled"),
    ],
)
def test_a_spoiled_journal_costs_work_and_never_a_byte(
    change: Callable[[list[str]], list[str]], hf_folder: Path, tmp_path: Path, convert: Any, undisturbed: Any
) -> None:
    target = tmp_path / "m.gguf"
    killed("record", 30, str(hf_folder), str(target), "--to", "gguf")
    journal = tmp_path / ".m.gguf.partial" / "journal"
    journal.write_text("".join(change(journal.read_text().splitlines(keepends=True))))
    convert(hf_folder, target, "gguf")
    assert contents(tmp_path) == undisturbed["gguf"]


def test_a_run_with_other_options_starts_clean(
    hf_folder: Path, tmp_path: Path, convert: Any, steps_done: list[str]
) -> None:
    target = tmp_path / "m.gguf"
    killed("record", 50, str(hf_folder), str(target), "--to", "gguf")
    outcome = convert(hf_folder, target, "gguf", dense="f32")
    assert len(steps_done) == len(outcome.plan.steps)


def test_a_changed_source_starts_clean(tmp_path: Path, convert: Any, steps_done: list[str]) -> None:
    folder, target = tmp_path / "in", tmp_path / "m.gguf"
    write_hf(Model(SMALL), folder)
    killed("record", 50, str(folder), str(target), "--to", "gguf")
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())  # the same bytes, written again: not trusted to be the same
    outcome = convert(folder, target, "gguf")
    assert len(steps_done) == len(outcome.plan.steps)


def test_the_work_on_one_meaning_of_gate_proj_is_not_taken_for_the_others(
    small_model: Model, tmp_path: Path, convert: Any, steps_done: list[str]
) -> None:
    folder = tmp_path / "in"
    write_per_expert(small_model, folder, "deinterleaved")
    target = tmp_path / "m"
    killed("proof", 1, str(folder), str(target), "--to", "hf", "--gate-proj", "halves")
    outcome = convert(folder, target, "hf", gate_proj="deinterleaved", proof=False)
    assert len(steps_done) == len(outcome.plan.steps)


def test_a_failed_proof_after_taking_up_leaves_nothing(
    hf_folder: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_convert.convert import conversion

    target = tmp_path / "m.gguf"
    killed("record", 50, str(hf_folder), str(target), "--to", "gguf")

    def fail(*_: Any, **__: Any) -> None:
        raise ProofFailed("no")

    monkeypatch.setattr(conversion, "prove", fail)
    with pytest.raises(ProofFailed):
        convert(hf_folder, target, "gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_how_to_go_on_and_keeps_the_work(
    hf_folder: Path, tmp_path: Path, convert: Any, steps_done: list[str], undisturbed: Any
) -> None:
    target = tmp_path / "m.gguf"
    result = killed("record", 40, str(hf_folder), str(target), "--to", "gguf", "--threads", "1", by=signal.SIGINT)
    assert result.returncode == 130
    assert result.stderr.strip() == "interrupted; run the same command again to go on"
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == [".m.gguf.partial"]
    outcome = convert(hf_folder, target, "gguf")
    assert len(outcome.plan.steps) - len(steps_done) >= 39
    assert contents(tmp_path) == undisturbed["gguf"]


def test_an_interrupt_during_the_proof_keeps_all_steps(
    hf_folder: Path, tmp_path: Path, convert: Any, steps_done: list[str]
) -> None:
    target = tmp_path / "m.gguf"
    result = killed("proof", 1, str(hf_folder), str(target), "--to", "gguf", by=signal.SIGINT)
    assert result.returncode == 130
    convert(hf_folder, target, "gguf")
    assert steps_done == []

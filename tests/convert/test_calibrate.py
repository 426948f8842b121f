"""`calibrate`: what a pass of text says about every matrix's inputs, expert by expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.activations import inputs_in_transformers
from support.checkpoints import SMALL, STEADY, Model, write_bf16, write_hf

from gptoss_convert.cli.calibrate import command
from gptoss_convert.convert import calibrate as calibrating
from gptoss_convert.convert import forward
from gptoss_convert.convert.calibrate import calibrate
from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.progress import silent
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.statistics import Statistics, read_statistics
from gptoss_convert.convert.texts import Texts
from gptoss_convert.errors import BadInput, CannotWrite, TargetExists, UsageError
from gptoss_convert.quant.shrinkage import own_weight

SPEC = replace(SMALL, experts=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_hf(Model(SPEC), folder)
    return folder


def texts(lengths: tuple[int, ...] = (50, 50, 31)) -> Texts:
    random = np.random.default_rng(3)
    sequences = [random.integers(0, SPEC.text_tokens, n).astype(np.int32) for n in lengths]
    return Texts(sequences, "some.txt", "ab" * 32, sum(lengths), {"text": 1})


def run(checkpoint: Path, target: Path, found: Texts | None = None) -> Statistics:
    return calibrate(checkpoint, target, lambda _: found or texts(), context=50, show=silent)[0]


def test_means_of_squares_are_those_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    text = texts()
    found, wanted = run(checkpoint, tmp_path / "s.gguf", text), inputs_in_transformers(Model(SPEC), text.sequences, 1)
    for name, key in (("self_attn.q_proj.weight", "q"), ("self_attn.o_proj.weight", "o")):
        mean = np.square(np.concatenate(wanted[key])).mean(axis=0)
        assert found.inputs[layer_name(1, name)].mean[0] == pytest.approx(mean, rel=1e-4, abs=1e-9)
    head = np.square(np.concatenate(wanted["head"])).mean(axis=0)
    assert found.inputs["lm_head.weight"].mean[0] == pytest.approx(head, rel=1e-4, abs=1e-9)


def test_each_experts_own_tokens_are_told_apart_and_shrunk_towards_the_others(checkpoint: Path, tmp_path: Path) -> None:
    text = texts()
    found, u = (
        run(checkpoint, tmp_path / "s.gguf", text),
        np.concatenate(inputs_in_transformers(Model(SPEC), text.sequences, 1)["mlp"]),
    )
    model = Model(SPEC)
    router, bias = (model.tensors[f"block.1.mlp.gate.{n}"].double().numpy() for n in ("weight", "bias"))
    chosen = np.argsort(-(u @ router.T + bias), axis=1)[:, : SPEC.experts_per_token]
    inputs = found.inputs[layer_name(1, GATE_UP)]
    for expert in range(SPEC.experts):
        own = (chosen == expert).any(axis=1)
        assert inputs.own[expert] == own.sum()
        weight = own_weight(int(own.sum()), SPEC.hidden)
        wanted = weight * np.square(u[own]).mean(axis=0) + (1 - weight) * np.square(u[~own]).mean(axis=0)
        assert inputs.mean[expert] == pytest.approx(wanted, rel=1e-4)
        assert inputs.weight[expert] == pytest.approx(weight)
    assert 0 < inputs.own.min() < inputs.own.max()  # unevenly routed, or the test says nothing
    assert inputs.own.sum() == text.tokens * SPEC.experts_per_token


def test_an_expert_that_saw_nothing_still_has_a_statistic_of_down(tmp_path: Path) -> None:
    model = Model(SPEC)
    model.tensors["block.1.mlp.gate.bias"][2] = -100
    write_hf(model, tmp_path / "source")
    found = run(tmp_path / "source", tmp_path / "s.gguf")
    inputs = found.inputs[layer_name(1, DOWN)]
    assert inputs.own[2] == 0
    assert inputs.weight[2] == 0
    assert (inputs.mean[2] > 0).all()
    other = found.inputs[layer_name(1, DOWN)].mean
    assert not np.allclose(
        inputs.mean[2], np.delete(other, 2, axis=0).mean(axis=0), rtol=0.05
    )  # through itself, not an average


def test_the_file_is_an_imatrix_that_gguf_py_reads(checkpoint: Path, tmp_path: Path) -> None:
    found = run(checkpoint, tmp_path / "s.gguf")
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_size"].contents() == 50
    tensors = {t.name: t.data for t in reader.tensors}
    for gate_or_up in ("gate", "up"):
        sums, counts = (tensors[f"blk.2.ffn_{gate_or_up}_exps.weight{s}"] for s in (".in_sum2", ".counts"))
        assert sums.shape == (SPEC.experts, SPEC.hidden)
        means = sums / counts.reshape(-1, 1)
        assert means == pytest.approx(found.inputs[layer_name(2, GATE_UP)].mean, rel=1e-6)
        assert (counts > 0).all()


def test_the_same_input_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        run(checkpoint, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_killed_run_goes_on_after_the_last_finished_layer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    run(checkpoint, tmp_path / "whole.gguf")
    real, worked = calibrating.collect_layer, []

    def collect(walk: forward.Walk, index: int, *more: object) -> dict[str, calibrating.Inputs]:
        worked.append(index)
        if index == layer and len(worked) == layer + 1:
            raise KeyboardInterrupt
        return real(walk, index, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "collect_layer", collect)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "killed.gguf")
    assert not (tmp_path / "killed.gguf").exists()
    run(checkpoint, tmp_path / "killed.gguf")
    assert worked == [*range(layer + 1), *range(layer, SPEC.layers)]
    assert (tmp_path / "killed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]


def test_a_spoilt_stream_is_not_gone_on_from(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(checkpoint, tmp_path / "whole.gguf")
    real = calibrating.collect_layer

    def collect(walk: forward.Walk, index: int, *more: object) -> dict[str, calibrating.Inputs]:
        if index == 2:
            raise KeyboardInterrupt
        return real(walk, index, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "collect_layer", collect)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "killed.gguf")
    stream = tmp_path / ".killed.gguf.partial" / "stream-1.json"
    stream.write_bytes(stream.read_bytes()[:-4] + b"\0\0\0\0")
    monkeypatch.setattr(calibrating, "collect_layer", real)
    run(checkpoint, tmp_path / "killed.gguf")
    assert (tmp_path / "killed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_nothing_that_is_read_is_written_over(tmp_path: Path) -> None:
    for name in ("model", "text"):
        write_hf(Model(SPEC), tmp_path / "source")
        (tmp_path / "t.txt").write_text("The weights of a model are numbers. " * 40)
        victim = tmp_path / "source" / "model.safetensors" if name == "model" else tmp_path / "t.txt"
        if not victim.exists():
            victim = next((tmp_path / "source").glob("*.safetensors"))
        before = victim.read_bytes()
        with pytest.raises(UsageError, match="take the place"):
            calibrate(
                tmp_path / "source",
                victim,
                lambda _: texts(),
                context=50,
                overwrite=True,
                reads=[tmp_path / "t.txt"],
                show=silent,
            )
        assert victim.read_bytes() == before
        with pytest.raises(TargetExists, match="only those that this tool wrote"):
            calibrate(
                tmp_path / "source", tmp_path / "s.gguf", lambda _: texts(), context=50, overwrite=True,
                hessians=tmp_path / "source", show=silent,
            )  # fmt: skip
        shutil.rmtree(tmp_path / "source")


def test_a_model_that_computes_no_numbers_is_refused_and_an_older_file_stays(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path / "bf16")
    path = next(
        p for p in sorted((tmp_path / "bf16").glob("*.safetensors")) if any("down_proj" in n for n in load_file(p))
    )
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("down_proj"))[2, 3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "good.gguf").write_bytes(b"good")
    with pytest.raises(BadInput, match="not a number"):
        calibrate(tmp_path / "bf16", tmp_path / "good.gguf", lambda _: texts(), context=50, overwrite=True, show=silent)
    assert (tmp_path / "good.gguf").read_bytes() == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16", "good.gguf"]


def test_a_run_with_another_meaning_of_gate_proj_takes_nothing_up(checkpoint: Path) -> None:
    with open_source(checkpoint) as source:
        layout = calibrating.lay_out(source.config, {"text": "t", "tokens": 50, "context": 50})
        found = {calibrating._digest(source, layout, "cpu", meaning) for meaning in (None, "halves", "deinterleaved")}
    assert len(found) == 3


def test_a_disk_that_fills_up_between_two_layers_is_named_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CannotWrite, match="not enough space") as error:
        run(checkpoint, tmp_path / "s.gguf")
    assert "stream-0" in str(error.value.file)
    assert not list(tmp_path.iterdir())


def test_coverage_says_who_is_short_and_how_much_text_would_do(checkpoint: Path, tmp_path: Path) -> None:
    found = run(checkpoint, tmp_path / "s.gguf")
    with open_source(checkpoint) as source:
        coverage = found.coverage(source.config)
    assert coverage["needed"] == 2 * SPEC.hidden
    assert coverage["experts"] == SPEC.layers * SPEC.experts
    assert coverage["short"] == coverage["experts"]  # 131 tokens are few
    assert coverage["tokens"] == 131
    least = min(int(found.inputs[layer_name(n, GATE_UP)].own.min()) for n in range(SPEC.layers))
    assert coverage["least"] == least
    if least:
        assert coverage["more_tokens_for_all"] == pytest.approx(131 * 2 * SPEC.hidden / least - 131, abs=1)
    assert np.allclose(np.sum(coverage["router_load"], axis=1), SPEC.experts_per_token, atol=1e-4)


def test_statistics_of_another_model_or_no_statistics_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "s.gguf")
    write_hf(Model(replace(STEADY, hidden=192)), tmp_path / "other")
    with open_source(tmp_path / "other") as other, pytest.raises(BadInput, match="another model"):
        read_statistics(tmp_path / "s.gguf", other.config)
    with open_source(checkpoint) as source:
        source_gguf = tmp_path / "m.gguf"
        from support.checkpoints import write_gguf

        write_gguf(Model(SPEC), source_gguf)
        with pytest.raises(BadInput, match="not a file of calibration"):
            read_statistics(source_gguf, source.config)


def theirs(path: Path, source: Source, counts: list[int]) -> None:
    """An imatrix as llama-imatrix writes it: sums and counts of own tokens alone."""
    writer = gguf.GGUFWriter(path, arch="gpt-oss")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    for n in range(source.config.layers):
        for name, columns in (("gate", SPEC.hidden), ("up", SPEC.hidden), ("down", SPEC.intermediate)):
            sums = random.random((len(counts), columns)).astype(np.float32) * np.array(counts, np.float32)[:, None]
            writer.add_tensor(f"blk.{n}.ffn_{name}_exps.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{n}.ffn_{name}_exps.weight.counts", np.array(counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def damaged(path: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a statistics file with other numbers."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    change(tensors)
    writer = gguf.GGUFWriter(target, arch="gpt-oss")
    writer.add_type("imatrix")
    writer.add_float32("gptoss-convert.calibration.worth", 0.25)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_odd_numbers_in_statistics_are_bad_input_and_nothing_worse(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "s.gguf")
    down = "blk.1.ffn_down_exps.weight"

    def put(suffix: str, value: float, rows: slice = slice(0, 1)) -> Callable[[dict[str, np.ndarray]], None]:
        def change(tensors: dict[str, np.ndarray]) -> None:
            tensors[down + suffix][rows] = value

        return change

    def widened(tensors: dict[str, np.ndarray]) -> None:
        tensors[down + ".in_sum2"] = np.pad(tensors[down + ".in_sum2"], ((0, 0), (0, 32)))
        tensors[down + ".in_sum2"][0, 0] = np.nan

    def huge(tensors: dict[str, np.ndarray]) -> None:
        tensors[down + ".in_sum2"][0] = 3e38
        tensors[down + ".counts"][0] = 1e-30

    def fewer(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            if name.startswith("blk.2."):
                del tensors[name]

    with open_source(checkpoint) as source:
        for change, message in (
            (put(".own_counts", 1e30), "too large"), (put(".in_sum2", np.inf), "not finite"),
            (put(".counts", -1), "negative"), (put(".own_weights", 3), "larger than one"), (widened, "not finite"),
            (huge, "too large"), (fewer, "another model"), (put(".counts", 0), "without a count"),
        ):  # fmt: skip
            path = damaged(tmp_path / "s.gguf", tmp_path / "damaged.gguf", change)
            with pytest.raises(BadInput, match=message):
                read_statistics(path, source.config)

        def nothing(tensors: dict[str, np.ndarray]) -> None:
            for suffix in (".in_sum2", ".counts", ".own_counts", ".own_weights"):
                tensors[down + suffix][0] = 0

        found = read_statistics(damaged(tmp_path / "s.gguf", tmp_path / "damaged.gguf", nothing), source.config)
        assert (found.inputs[layer_name(1, DOWN)].mean[0] == 0).all()


def test_statistics_with_nothing_of_this_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "foreign.gguf", arch="llama")
    writer.add_type("imatrix")
    writer.add_tensor("foo.in_sum2", np.ones((1, 8), np.float32))
    writer.add_tensor("foo.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_source(checkpoint) as source, pytest.raises(BadInput, match="another model"):
        read_statistics(tmp_path / "foreign.gguf", source.config)


def test_llama_imatrix_files_are_read_and_their_rare_experts_shrunk(checkpoint: Path, tmp_path: Path) -> None:
    with open_source(checkpoint) as source:
        theirs(tmp_path / "i.gguf", source, [400, 0, 3, 50, 400, 400, 400, 400])
        found = read_statistics(tmp_path / "i.gguf", source.config)
    inputs = found.inputs[layer_name(0, GATE_UP)]
    assert inputs.weight[0] == 1
    assert inputs.weight[1] == 0
    assert 0 < inputs.weight[2] < inputs.weight[3] < 1
    assert (inputs.mean > 0).all()
    assert found.importance(layer_name(0, "self_attn.q_proj.weight")) is None
    assert any("q_proj" in note for note in found.notes)
    assert found.facts["text"] == "wiki.txt"


def test_the_command_writes_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The weights of a model are numbers. " * 40)
    arguments = [
        str(checkpoint),
        str(tmp_path / "s.gguf"),
        "--text",
        str(tmp_path / "t.txt"),
        "--context",
        "64",
        "--json",
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["facts"]["text"] == "t.txt"
    assert 0 < document["coverage"]["short"] <= SPEC.layers * SPEC.experts
    assert (tmp_path / "s.gguf").exists()

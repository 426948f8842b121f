"""`compare`: distances that are right, told with their errors, and gates that hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import SMALL, STEADY, Model, write_bf16, write_hf

from gptoss_convert.cli import main
from gptoss_convert.cli.compare import command
from gptoss_convert.convert import compare as comparing
from gptoss_convert.convert.calibration import Wish
from gptoss_convert.convert.compare import Scores, compare, scored_positions
from gptoss_convert.convert.compare_gates import METRICS, judge
from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.progress import Advance, silent
from gptoss_convert.convert.source import open_source
from gptoss_convert.convert.texts import Texts, read_texts
from gptoss_convert.errors import BadInput, InputChanged, UsageError

SPEC = replace(STEADY, layers=2, heads=4, experts_per_token=2)
TEXT = "The weights of a model are numbers, and a converter moves them. def convert(source): return 1, 22, 333\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source: MXFP4; noisy: bf16 with noise in one place only; text.txt."""
    folder = tmp_path_factory.mktemp("compare")
    model = Model(SPEC)
    write_hf(model, folder / "source")
    for name, size in (("q4.gguf", "q4_0"), ("q8.gguf", "q8_0")):
        convert(folder / "source", folder / name, Options(to="gguf", type=size, allow_larger=True, proof=False), silent)
    (folder / "text.txt").write_text(TEXT)
    return folder


def document(folder: Path, artifact: str, source: str = "source", text: bool = True) -> dict:  # type: ignore[type-arg]
    with open_source(folder / source) as a, open_source(folder / artifact) as b:
        texts = read_texts(folder / "text.txt", a, 64) if text else None
        return compare(a, b, texts, context=64, threads=2, show=silent)


def test_divergence_and_perplexities_are_those_of_transformers(tmp_path: Path) -> None:
    one, two = Model(SMALL), Model(SMALL)
    head = two.tensors["unembedding.weight"]
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) * 0.1 * head.float().std()
    two.tensors["unembedding.weight"] = (head.float() + noise).to(torch.bfloat16)
    for name, model in (("one", one), ("two", two)):
        write_hf(model, tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    with open_source(tmp_path / "one") as a, open_source(tmp_path / "two") as b:
        texts = read_texts(tmp_path / "text.txt", a, 64)
        found = compare(a, b, texts, context=64, show=silent)["text"]
    kld, nll, ratio, same = [], [], [], []
    for sequence in texts.sequences:
        p, q = (m.logits(sequence.tolist()).double().log_softmax(-1) for m in (one, two))
        for t in range(len(sequence) // 2, len(sequence) - 1):
            kld.append(float((p[t].exp() * (p[t] - q[t])).sum()))
            nll.append(-float(p[t, sequence[t + 1]]))
            ratio.append(float(p[t, sequence[t + 1]] - q[t, sequence[t + 1]]))
            same.append(float(p[t].argmax() == q[t].argmax()))
    assert found["scored"] == len(kld)
    assert found["kld"]["mean"] == pytest.approx(np.mean(kld), rel=1e-3)
    assert found["kld"]["se"] == pytest.approx(np.std(kld, ddof=1) / math.sqrt(len(kld)), rel=1e-3)
    assert found["kld"]["max"] == pytest.approx(max(kld), rel=1e-3)
    assert found["kld"]["p99"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-2)
    assert found["top1"]["agreement"] == pytest.approx(np.mean(same), abs=2 / len(same))
    assert found["perplexity"]["source"]["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert found["perplexity"]["ratio"]["value"] == pytest.approx(math.exp(np.mean(ratio)), rel=1e-3)
    assert found["kld"]["mean"] > 1e-3


def test_a_lossless_artifact_is_at_no_distance(folder: Path) -> None:
    write_bf16(Model(SPEC), folder / "same", rope="parameters")
    found = document(folder, "same")
    assert all(
        tensor["equal"] and tensor["relative_rms"] == 0 and tensor["worst"] is None for tensor in found["tensors"]
    )
    assert found["text"]["kld"]["max"] < 1e-6
    assert found["text"]["top1"] == {"agreement": 1.0, "se": 0.0}
    assert found["text"]["perplexity"]["ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert all(error is None or error < 1e-5 for row in found["experts"]["output_error"] for error in row)


def test_a_smaller_type_is_farther(folder: Path) -> None:
    small, large = (document(folder, name) for name in ("q4.gguf", "q8.gguf"))
    assert small["text"]["kld"]["mean"] > 3 * large["text"]["kld"]["mean"] > 0
    for one, other in zip(small["layers"], large["layers"], strict=True):
        assert one["output_error"] > other["output_error"] == pytest.approx(0, abs=1e-5)  # MXFP4 is exact in Q8_0
        assert one["hidden_error"] > other["hidden_error"]
    assert small["sizes"]["parts"]["down"]["bits_per_weight"] == 4.5
    assert large["sizes"]["parts"]["gate_up"]["bits_per_weight"] == 8.5
    total = sum(part["artifact"] for part in small["sizes"]["parts"].values())
    assert total == sum(tensor["bytes"] for tensor in small["tensors"]) < small["artifact"]["bytes"]


def test_the_worst_block_is_found_where_it_is(tmp_path: Path) -> None:
    write_bf16(Model(SPEC), tmp_path / "one", rope="parameters")
    two = Model(SPEC)
    two.tensors["block.1.attn.out.weight"][37, 100] += 3
    write_bf16(two, tmp_path / "two", rope="parameters")
    with open_source(tmp_path / "one") as a, open_source(tmp_path / "two") as b:
        tensors = {t["name"]: t for t in compare(a, b, None, threads=2, show=silent)["tensors"]}
    odd = [t for t in tensors.values() if not t["equal"]]
    assert [t["name"] for t in odd] == ["model.layers.1.self_attn.o_proj.weight"]
    assert {k: odd[0]["worst"][k] for k in ("expert", "row", "column", "columns")} == {
        "expert": 0, "row": 37, "column": 96, "columns": 32,
    }  # fmt: skip


def test_without_a_text_only_weights_are_compared(folder: Path) -> None:
    found = document(folder, "q4.gguf", text=False)
    assert found["text"] is found["experts"] is found["layers"] is found["coverage"] is None
    assert max(tensor["relative_rms"] for tensor in found["tensors"]) > 0.05


def test_scored_are_the_tokens_that_follow_the_second_halves() -> None:
    at, following = scored_positions([np.array([5, 6, 7, 8, 9, 10]), np.array([1, 2, 3])])
    assert at.tolist() == [3, 4, 7]
    assert following.tolist() == [9, 10, 3]


def test_a_divergence_is_never_below_zero_and_of_equals_is_none() -> None:
    scores = Scores()
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)) * 4
    scores.add(logits, logits + 3.0, torch.arange(5))
    assert scores.summary()["kld"]["max"] == pytest.approx(0, abs=1e-6)
    assert (np.concatenate(scores.kld) >= 0).all()


def test_two_different_models_are_refused(folder: Path, tmp_path: Path) -> None:
    write_hf(Model(replace(SPEC, intermediate=128)), tmp_path / "other")
    with open_source(folder / "source") as a, open_source(tmp_path / "other") as b:
        with pytest.raises(BadInput, match="not one model in two forms") as error:
            compare(a, b, None, show=silent)
        assert error.value.tensor is not None
        assert "gate_up_proj" in error.value.tensor


def test_gates_are_judged_by_the_documents_figures(folder: Path) -> None:
    found = document(folder, "q4.gguf")
    mean = found["text"]["kld"]["mean"]
    assert judge(found, [("kld", mean), ("top1_disagreement", 1.0)])
    assert not judge(found, [("kld", mean * 0.99)])
    assert [gate["passed"] for gate in found["gates"]] == [True, True, False]


def test_a_missed_gate_is_exit_11_after_the_document_and_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compare", str(folder / "q4.gguf"), str(folder / "source"), "--text", str(folder / "text.txt"), "--context", "64",
        "--json", "--fail-above", "kld=0.000001", "--report", str(tmp_path / "out.html"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 11
    out, err = capsys.readouterr()
    assert json.loads(out)["gates"][0]["passed"] is False
    assert "misses a quality gate" in err
    assert "<html" in (tmp_path / "out.html").read_text()


def test_the_table_tells_the_figures(folder: Path) -> None:
    arguments = [str(folder / "q4.gguf"), str(folder / "source"), "--text", str(folder / "text.txt"), "--context", "64"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    mean = document(folder, "q4.gguf")["text"]["kld"]["mean"]
    assert f"mean {mean:.6f} ±" in result.stdout
    assert "relative RMS" in result.stdout


# --- what is not finite ------------------------------------------------------------------------------------------------


def spoilt(folder: Path, name: str, stored: str, place: tuple[int, ...], value: float) -> Path:
    model = Model(SPEC)
    model.tensors[stored][place] = value
    write_bf16(model, folder / name, rope="parameters")
    return folder / name


@pytest.mark.parametrize("swapped", [False, True], ids=["artifact", "source"])
def test_one_weight_that_is_no_number_spoils_every_figure_it_takes_part_in(
    folder: Path, tmp_path: Path, swapped: bool
) -> None:
    odd = spoilt(tmp_path, "odd", "block.1.attn.out.weight", (3, 5), math.nan)
    found = document(folder, "source", str(odd)) if swapped else document(folder, str(odd))
    text = found["text"]
    for figure in (
        *(text["kld"][key] for key in ("mean", "median", "p99", "max")), text["top1"]["agreement"],
        text["perplexity"]["ratio"]["value"], found["layers"][1]["hidden_error"],
    ):  # fmt: skip
        assert math.isnan(figure)
    side, other = ("source", "artifact") if swapped else ("artifact", "source")
    assert math.isfinite(text["perplexity"][other]["value"])
    assert math.isnan(text["perplexity"][side]["value"])
    (tensor,) = (t for t in found["tensors"] if t["not_finite"])
    assert tensor["not_finite"] == {side: 1, other: 0, "expert": 0, "row": 3, "column": 5}
    limits = [(metric, 1e300) for metric in METRICS]
    assert not judge(found, limits)
    assert not any(gate["passed"] for gate in found["gates"])


def test_an_experts_weight_that_is_no_number_is_its_error(folder: Path, tmp_path: Path) -> None:
    odd = spoilt(tmp_path, "odd", "block.0.mlp.mlp2_bias", (1, 4), math.nan)
    found = document(folder, str(odd))
    errors, counts = found["experts"]["output_error"][0], found["experts"]["tokens"][0]
    assert counts[1]
    assert math.isnan(errors[1])
    assert math.isnan(found["layers"][0]["output_error"])
    assert all(error is None or math.isfinite(error) for e, error in enumerate(errors) if e != 1)


def test_likelihoods_that_are_no_numbers_agree_with_nothing() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    broken = logits.clone()
    broken[1] = math.nan
    for pair in ((logits, broken), (broken, logits), (broken, broken)):
        scores = Scores()
        scores.add(*pair, torch.arange(3))
        assert np.isnan(scores.same[0]).tolist() == [False, True, False]
        found = scores.summary()
        assert math.isnan(found["top1"]["agreement"])
        assert math.isnan(found["kld"]["p99"])


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    scores = Scores()
    logits = torch.zeros(2, 4)
    logits[:, 0] = 4000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores.add(torch.zeros(2, 4), logits, torch.tensor([1, 2]))
        assert scores.summary()["perplexity"]["artifact"]["value"] == math.inf


# --- few tokens, many tokens -------------------------------------------------------------------------------------------


def test_of_a_single_token_no_error_is_known() -> None:
    scores = Scores()
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    scores.add(logits, logits + torch.linspace(0, 1, 30), torch.arange(1))
    found = scores.summary()
    assert found["kld"]["se"] is found["top1"]["se"] is found["perplexity"]["ratio"]["se"] is None
    assert found["kld"]["mean"] > 0


def test_a_text_without_a_token_to_score_is_refused_before_any_work(folder: Path) -> None:
    texts = Texts([np.array([1, 2], np.int32)] * 3, "short.txt", "", 6, {})

    def never(label: str, total: int) -> AbstractContextManager[Advance]:
        raise AssertionError(label)

    with open_source(folder / "source") as a, pytest.raises(UsageError, match="no token to score") as error:
        compare(a, a, texts, show=never)
    assert error.value.found == "short.txt"
    assert error.value.remedy is not None


def test_the_streams_distance_is_summed_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(1000, 7, generator=generator) for _ in range(2))
    whole = float(((b - a).double().square().sum() / a.double().square().sum()).sqrt())
    for run in (1, 64, 999, 1000, 4096):
        monkeypatch.setattr(comparing, "TOKENS_AT_ONCE", run)
        assert comparing._distance(a, b) == pytest.approx(whole, rel=1e-12)


# --- what was compared -------------------------------------------------------------------------------------------------


def test_every_file_of_both_sides_is_told_with_its_digest(folder: Path) -> None:
    found = document(folder, "q4.gguf", text=False)
    for side, path in (("source", folder / "source"), ("artifact", folder / "q4.gguf")):
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        assert sorted(found[side]["files"], key=lambda file: str(file["name"])) == [
            {"name": f.name, "bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
            for f in files
        ]
        assert found[side]["bytes"] == sum(file["bytes"] for file in found[side]["files"])


def test_a_file_that_shrinks_while_it_is_read_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "q4.gguf", tmp_path / "q4.gguf")
    with open_source(folder / "source") as a, open_source(tmp_path / "q4.gguf") as b:
        os.truncate(tmp_path / "q4.gguf", 1 << 12)
        with pytest.raises(InputChanged):
            compare(a, b, None, show=silent)


def test_of_int8_it_is_said_that_activations_are_rounded_too(folder: Path) -> None:
    for to, noted in (("int8", True), ("int8-g32", False)):
        convert(folder / "source", folder / to, Options(to=to, proof=False), silent)
        notes = document(folder, to, text=False)["artifact"]["notes"]
        assert [("activations" in note and "W8A8" in note) for note in notes] == [True] * noted


def test_the_method_is_known_of_files_and_of_folders(folder: Path) -> None:
    wish = Wish("importance", str(folder / "text.txt"), context=64, tokens=256)
    convert(
        folder / "source", folder / "i.gguf", Options(to="gguf", type="q4_0", allow_larger=True, rounding=wish), silent
    )
    convert(folder / "source", folder / "int4", Options(to="int4", rounding=wish), silent)
    assert [document(folder, name, text=False)["artifact"]["method"] for name in ("i.gguf", "int4", "q4.gguf")] == [
        "importance", "importance", None,
    ]  # fmt: skip

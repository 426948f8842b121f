"""A conversion as a whole: codecs that lose nothing by default, progress that adds up, threads that fit the memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest

from gptoss_convert.convert import conversion
from gptoss_convert.convert.certificate import FOLDER_NAME, file_name
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.workers import cores
from gptoss_convert.formats.digests import CERTIFICATE_SCHEMA

DEFAULTS = {
    "hf": ("MXFP4", "BF16"),
    "bf16": ("BF16", "BF16"),
    "per expert": ("BF16", "BF16"),
    "gguf": ("MXFP4", "BF16"),
    "gguf, f16 and f32": ("F32", "F16"),
    "metal": ("MXFP4", "BF16"),
}


@pytest.mark.parametrize("layout", DEFAULTS)
def test_by_default_a_gguf_keeps_the_sources_encodings(
    layout: str, layouts: dict[str, Path], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(layouts[layout], tmp_path / "m.gguf", "gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.1.ffn_up_exps.weight"], kinds["output.weight"]) == DEFAULTS[layout]
    assert {
        kinds[f"blk.0.{name}"]
        for name in ("attn_norm.weight", "ffn_gate_inp.weight", "attn_q.bias", "attn_sinks.weight")
    } == {"F32"}
    assert outcome.document["lossless"] is True


@pytest.mark.parametrize(("to", "more"), [("gguf", {}), ("hf", {}), ("bf16", {}), ("gguf", {"split_bytes": 300_000})])
def test_progress_adds_up_to_what_was_announced(to: str, more: dict[str, Any], hf_folder: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[int, list[int]]] = {}

    @contextmanager
    def show(label: str, total: int) -> Iterator[Callable[[int], None]]:
        told[label] = (total, [])
        yield told[label][1].append

    target = tmp_path / ("m.gguf" if to == "gguf" and not more else "m")
    conversion.convert(hf_folder, target, Options(to, **more), show)
    assert list(told) == ["convert", "prove"]
    for total, parts in told.values():
        assert sum(parts) == total > 0
        assert len(parts) > 10


def test_as_many_threads_as_asked_for_and_no_more_than_fit(hf_folder: Path) -> None:
    options = Options("gguf")
    with conversion.open_for(hf_folder, options) as source:
        plan = conversion.make_plan(source, Path("/nowhere/m.gguf"), options)
        assert conversion.thread_count(plan, 3) == 3
        assert conversion.thread_count(plan, 0) == cores() >= 1
        assert conversion.thread_count(plan, 10**6) < 10**5


def test_the_certificate_says_what_by_what_and_how(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    outcome = convert(hf_folder, tmp_path / "m.gguf", "gguf", name="a/b-1B")
    document = json.loads((tmp_path / file_name("m.gguf")).read_text())
    assert document["schema"] == CERTIFICATE_SCHEMA
    assert document["tool"]["name"] == "gptoss-convert"
    assert document["target"] == "gguf"
    assert document["options"]["name"] == "a/b-1B"
    assert document["source"]["layout"] == "hf"
    assert document["source"]["revision"] is None
    assert {file["name"] for file in document["source"]["files"]} == {
        path.name for path in hf_folder.glob("*.safetensors")
    }
    assert len(document["proof"]["tensors"]) == len(outcome.plan.slots)
    assert [layer["layer"] for layer in document["proof"]["layers"]] == [0, 1, 2]
    assert document["proof"]["worst_expert_output_error"] == 0


def test_an_artifact_in_a_folder_holds_its_certificate_and_one_in_a_file_has_it_beside(
    hf_folder: Path, tmp_path: Path, convert: Any
) -> None:
    convert(hf_folder, tmp_path / "hf", "hf")
    convert(hf_folder, tmp_path / "m.gguf", "gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m.gguf", "m.gguf.certificate.json"}
    assert (tmp_path / "hf" / FOLDER_NAME).is_file()


def test_a_converted_artifact_is_itself_a_source_whose_values_have_the_same_digests(
    hf_folder: Path, tmp_path: Path, convert: Any
) -> None:
    """The values' digests name the values whatever the layout: a chain of conversions keeps them."""
    chain = [("m.gguf", "gguf"), ("bf16", "bf16"), ("hf", "hf"), ("original", "original")]
    place, seen = hf_folder, []
    for name, to in chain:
        outcome = convert(place, tmp_path / name, to)
        seen.append(
            {tensor.name: tensor.values_digest for tensor in outcome.proof.tensors if tensor.values_dtype == "bf16"}
        )
        place = tmp_path / name
    experts = [name for name in seen[0] if name.endswith((".gate_up_proj", ".down_proj"))]
    assert len(experts) == 6
    assert all(digests[name] == seen[0][name] for digests in seen for name in experts)


def test_one_source_may_be_converted_twice_at_once_to_two_places(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    from threading import Thread

    threads = [Thread(target=convert, args=(hf_folder, tmp_path / f"{i}.gguf", "gguf")) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [(tmp_path / f"{i}.gguf").read_bytes() for i in range(3)]
    assert made[0] == made[1] == made[2]

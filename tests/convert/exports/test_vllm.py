"""What vLLM is told of each kind, what is refused for it, and the vocabulary that its chat parser wants."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tokenizer as tk

from gptoss_convert.convert.exports import encodings, vllm
from gptoss_convert.convert.exports.artifact import Artifact, open_artifact
from gptoss_convert.convert.exports.package import Package
from gptoss_convert.errors import Refused, UsageError

ROOT = Path(__file__).parents[3]
Kinds = Callable[[str], Path]


def with_width(artifact: Artifact, kind: str, intermediate: int) -> Artifact:
    artifact.source.config = replace(artifact.config, intermediate=intermediate)
    return replace(artifact, kind=kind)


@pytest.mark.parametrize(
    ("kind", "gpus", "told"),
    [
        ("mxfp4", 1, []),
        ("mxfp4", 4, ["--tensor-parallel-size", "4"]),
        ("bf16", 2, ["--tensor-parallel-size", "2"]),
        ("int8", 1, []),
        ("int8", 2, ["--tensor-parallel-size", "2", "--enable-expert-parallel"]),
        ("int4", 1, ["--moe-backend", "humming"]),
        ("int4", 2, ["--moe-backend", "humming", "--tensor-parallel-size", "2"]),  # 1440 of 2880 rows: 45 groups
        ("int4", 4, ["--moe-backend", "humming", "--tensor-parallel-size", "4", "--enable-expert-parallel"]),
        ("int8-g32", 8, ["--moe-backend", "humming", "--tensor-parallel-size", "8", "--enable-expert-parallel"]),
    ],
)
def test_each_kind_gets_the_flags_that_it_needs_on_these_gpus(
    kinds: Kinds, kind: str, gpus: int, told: list[str]
) -> None:
    with open_artifact(kinds("mxfp4")) as artifact:
        found = vllm.arguments(with_width(artifact, kind, 2880), "me", gpus, None)
    assert found == [
        "--served-model-name", "me", "--host", "0.0.0.0", "--port", "8000",
        "--enable-auto-tool-choice", "--tool-call-parser", "openai", *told,
    ]  # fmt: skip


def test_the_context_is_passed_on(kinds: Kinds) -> None:
    with open_artifact(kinds("mxfp4")) as artifact:
        assert vllm.arguments(artifact, "me", 1, 8192)[-2:] == ["--max-model-len", "8192"]


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("docker.io/vllm/vllm-openai:v0.33.0", (0, 33)),
        ("vllm/vllm-openai:v0.9.2", (0, 9)),
        ("mine.azurecr.io/vllm-openai:0.31.0-cu130", (0, 31)),
        ("vllm/vllm-openai:latest", None),
        ("mine.azurecr.io/not-vllm-openai:v0.31.0", None),
        ("mine.azurecr.io/server:v1.2", None),
    ],
)
def test_the_version_is_told_by_the_projects_own_images_only(image: str, version: tuple[int, int] | None) -> None:
    assert vllm.version_of(image) == version


@pytest.mark.parametrize(
    ("kind", "oldest", "too_old"),
    [
        ("mxfp4", "v0.18.0", "v0.17.1"),
        ("bf16", "v0.21.0", "v0.20.0"),
        ("int8", "v0.29.0", "v0.28.0"),
        ("int4", "v0.31.0", "v0.30.0"),
        ("int8-g32", "v0.31.0", "v0.30.0"),
    ],
)
def test_an_image_whose_vllm_is_too_old_is_refused_with_both_remedies(
    kinds: Kinds, kind: str, oldest: str, too_old: str
) -> None:
    with open_artifact(kinds("mxfp4")) as opened:
        artifact, package = replace(opened, kind=kind), Package()
        vllm.require_served(artifact, f"vllm/vllm-openai:{oldest}", "here", package)
        assert package.notes == []
        with pytest.raises(Refused, match=f"does not load {kind}") as error:
            vllm.require_served(artifact, f"vllm/vllm-openai:{too_old}", "here", package)
        assert vllm.IMAGE in str(error.value.remedy)
        assert "--to hf" in str(error.value.remedy)
        vllm.require_served(artifact, "mine.io/own:1", "here", package)
        assert package.notes == [f"mine.io/own:1 does not tell its vLLM; {kind} needs {oldest[1:-2]} or newer"]


@pytest.mark.parametrize("kind", ["gguf", "onnx", "original"])
def test_what_vllm_reads_in_no_version_is_refused_with_what_to_convert_to(kinds: Kinds, kind: str) -> None:
    with open_artifact(kinds("mxfp4")) as artifact, pytest.raises(Refused, match="here cannot serve") as error:
        vllm.require_served(replace(artifact, kind=kind), vllm.IMAGE, "here", Package())
    assert "--to hf (MXFP4)" in str(error.value.remedy)


@pytest.mark.parametrize("image", ["", "a b", "a\nRUN x", "a'b", "$(x)", "${args.x}"])
def test_what_is_no_image_is_a_usage_error(kinds: Kinds, image: str) -> None:
    with open_artifact(kinds("mxfp4")) as artifact, pytest.raises(UsageError, match="not the name of an image"):
        vllm.require_served(artifact, image, "here", Package())


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_nothing_is_packed_with_which_nobody_could_chat(kinds: Kinds, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(kinds("int4"), tmp_path / "int4"))
    (folder / name).unlink()
    with open_artifact(folder) as artifact, pytest.raises(Refused, match=f"no chat without {re.escape(name)}"):
        vllm.require_chat(artifact, "here")


@pytest.mark.parametrize("spoil", [lambda ends: ends[:1], lambda ends: ends[0], lambda ends: None, lambda ends: []])
def test_nothing_is_packed_whose_generation_would_not_end(
    kinds: Kinds, tmp_path: Path, spoil: Callable[[list[int]], Any]
) -> None:
    folder = Path(shutil.copytree(kinds("int4"), tmp_path / "int4"))
    path = folder / "generation_config.json"
    document = json.loads(path.read_text())
    with open_artifact(folder) as artifact:
        vllm.require_chat(artifact, "here")
    path.write_text(json.dumps(document | {"eos_token_id": spoil(document["eos_token_id"])}))
    with open_artifact(folder) as artifact, pytest.raises(Refused, match="would not end") as error:
        vllm.require_chat(artifact, "here")
    assert "<|call|>" in str(error.value.expected)


@pytest.mark.parametrize(
    ("weights", "memory", "gpus"), [(13, 24, 1), (13, 16, 2), (65, 80, 1), (65, 40, 4), (234, 80, 4), (234, 24, 16)]
)
def test_as_many_gpus_as_the_weights_need(weights: float, memory: int, gpus: int) -> None:
    assert vllm.gpus_for(int(weights * 1e9), memory) == gpus


def test_a_downloaded_releases_other_layouts_are_not_packed(kinds: Kinds, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kinds("mxfp4"), tmp_path / "mxfp4"))
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("{}")
    (folder / "original" / "model.safetensors").write_bytes(bytes(1000))
    with open_artifact(folder) as artifact:
        assert vllm.other_layouts(artifact) == {"original/config.json", "original/model.safetensors"}
        assert vllm.weight_bytes(artifact) == artifact.weight_bytes - 1000


class Small:
    """As much of an artifact as the vocabulary is made from."""

    path = Path("nowhere")

    def __init__(self, data: bytes | None) -> None:
        self.data = data

    def small(self, name: str) -> bytes | None:
        return self.data


def test_the_releases_tokenizer_gives_the_published_vocabulary_and_another_one_none(tokenizer_folder: Path) -> None:
    assert encodings.o200k_file(Small((tokenizer_folder / "tokenizer.json").read_bytes())) is None  # type: ignore[arg-type]
    assert encodings.o200k_file(Small(None)) is None  # type: ignore[arg-type]
    for odd in ({"model": 1}, {"model": {"vocab": {"€": 0}}}, {"model": {"vocab": {"a": "x", "b": 1}}}, {}):
        assert encodings.o200k_file(Small(json.dumps(odd).encode())) is None  # type: ignore[arg-type]
    found = tk.true_tokenizer(ROOT / ".cache" / "tokenizer")
    if found is None:
        pytest.skip(tk.no_true_tokenizer)
    text = encodings.o200k_file(Small(found.read_bytes()))  # type: ignore[arg-type]
    assert text is not None
    assert text.startswith(b"IQ== 0\n")
    assert text.count(b"\n") == 199998
    assert hashlib.sha256(text).hexdigest() == tk.RANKS_SHA256

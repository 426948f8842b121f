"""What vLLM is told of each kind, what is refused for it, and the vocabulary that its chat parser wants."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import tokenizer as tk

from gptoss_convert.convert.exports import vllm
from gptoss_convert.convert.exports.artifact import Artifact, open_artifact
from gptoss_convert.convert.exports.chat_files import harmony_vocabulary
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


def test_the_context_is_passed_on_if_the_model_has_it(kinds: Kinds) -> None:
    with open_artifact(kinds("mxfp4")) as artifact:
        assert vllm.arguments(artifact, "me", 1, 8192)[-2:] == ["--max-model-len", "8192"]
        with pytest.raises(UsageError, match="no such context") as error:
            vllm.arguments(artifact, "me", 1, 8193)
    assert (error.value.found, error.value.expected) == ("8193", "at most 8192")


@pytest.mark.parametrize(
    "image",
    ["vllm/vllm-openai:latest", "localhost:5000/a/b:v1", "a@sha256:" + "0" * 64, "a.b.io/c_d/e:V_1.0-x", vllm.IMAGE],
)
def test_what_docker_calls_an_image_is_taken(kinds: Kinds, image: str) -> None:
    with open_artifact(kinds("mxfp4")) as artifact:
        vllm.require_served(artifact, image, "here", Package())


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("docker.io/vllm/vllm-openai:v0.33.0", (0, 33, 0)),
        ("vllm/vllm-openai:v0.9.2", (0, 9, 2)),
        ("mine.azurecr.io/vllm-openai:0.31.0-cu130", (0, 31, 0)),
        ("763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:0.29.0-gpu-py312-cu130-ubuntu24.04-sagemaker", (0, 29, 0)),
        ("a.example/huggingface-vllm:0.29.0-transformers5.15.0-gpu-py312", (0, 29, 0)),
        ("763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:server-sagemaker-cuda-v2", None),
        ("mine.azurecr.io/vllm:1.0.0", None),
        ("vllm/vllm-openai:latest", None),
        ("mine.azurecr.io/not-vllm-openai:v0.31.0", None),
        ("mine.azurecr.io/server:v1.2", None),
    ],
)
def test_the_version_is_told_by_the_projects_own_images_and_awss_only(
    image: str, version: tuple[int, ...] | None
) -> None:
    assert vllm.version_of(image) == version


@pytest.mark.parametrize(
    ("kind", "oldest", "too_old"),
    [
        ("mxfp4", "v0.10.2", "v0.10.1"),
        ("bf16", "v0.12.0", "v0.11.2"),
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
        assert package.notes == [f"mine.io/own:1 does not tell its vLLM; {kind} needs {oldest[1:]} or newer"]


@pytest.mark.parametrize("kind", ["gguf", "onnx", "original"])
def test_what_vllm_reads_in_no_version_is_refused_with_what_to_convert_to(kinds: Kinds, kind: str) -> None:
    with open_artifact(kinds("mxfp4")) as artifact, pytest.raises(Refused, match="here cannot serve") as error:
        vllm.require_served(replace(artifact, kind=kind), vllm.IMAGE, "here", Package())
    assert "--to hf (MXFP4)" in str(error.value.remedy)


@pytest.mark.parametrize(
    "image",
    [
        "",
        "a b",
        "a\nRUN x",
        "a'b",
        "$(x)",
        "${args.x}",
        "a",
        "a:",
        "-a:1",
        "--platform=a",
        "Ü:1",
        "a;b:1",
        "a@sha256:0",
    ],
)
def test_what_is_no_image_is_a_usage_error(kinds: Kinds, image: str) -> None:
    with open_artifact(kinds("mxfp4")) as artifact, pytest.raises(UsageError, match="not the name of an image"):
        vllm.require_served(artifact, image, "here", Package())


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


def test_another_tokenizer_than_the_releases_gives_no_vocabulary(tokenizer_folder: Path) -> None:
    assert harmony_vocabulary(json.loads((tokenizer_folder / "tokenizer.json").read_bytes())) is None
    for odd in ({"model": 1}, {"model": {"vocab": {"€": 0}}}, {"model": {"vocab": {"a": "x", "b": 1}}}, {}):
        assert harmony_vocabulary(odd) is None


def test_the_releases_tokenizer_gives_the_published_vocabulary(true_file: Path) -> None:
    text = harmony_vocabulary(json.loads(true_file.read_bytes()))
    assert text is not None
    assert text.startswith(b"IQ== 0\n")
    assert text.count(b"\n") == 199998
    assert hashlib.sha256(text).hexdigest() == tk.RANKS_SHA256

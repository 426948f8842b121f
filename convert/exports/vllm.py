"""What vLLM serves of what is converted, as data: from which version on, with which flags, on how many GPUs.

Read in the sources of vLLM 0.21, 0.27 to 0.33 and where each entry says; nothing here was measured on a GPU. Tool calls:
vllm-project/recipes, GPT-OSS.

    int8             the per-expert loader and expert biases since 0.29; its scales are sliced wrongly by tensor parallelism
    int4, int8-g32   since 0.31; the backend that is chosen by itself leaves expert biases out on some GPUs, humming reads them;
                     their groups of 32 must not be cut by tensor parallelism
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.package import Package, require_kind
from gptoss_convert.errors import Refused, UsageError

IMAGE = "docker.io/vllm/vllm-openai:v0.33.0"  # the newest release on PyPI and Docker Hub on 2026-11-22
PORT, HEALTH = 8000, "/health"
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "openai")
# The project's own images, and AWS's (image_uri_config of sagemaker-python-sdk): huggingface-vllm's tags begin alike.
_TAGGED = re.compile(
    r"(?:^|/)(?:vllm-openai:v?|(?:huggingface-)?vllm:(?=[\d.]+-(?:gpu|transformers)))(\d+)\.(\d+)(?:\.(\d+))?"
)
# Of what stands in a Dockerfile's FROM and in Northflank's imagePath, whose pattern wants a tag or a digest.
_IMAGE = re.compile(
    r"([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9][a-z0-9._/-]*(:[A-Za-z0-9_][A-Za-z0-9._-]*|@sha256:[0-9a-f]{64})"
)
_GROUP = 32


Version = tuple[int, ...]


@dataclass(frozen=True)
class Serving:
    """floor: the oldest version, and where that was read; flags: what it must be told."""

    floor: Version
    source: str
    flags: tuple[str, ...] = ()


SERVED = {
    "mxfp4": Serving(
        (0, 10, 2),
        "JumpStart serves openai-reasoning-gpt-oss-20b with djl-lmi 0.34.0, whose release notes give vLLM 0.10.2",
    ),
    "bf16": Serving((0, 12, 0), "gpt_oss.py; the loader of unpacked experts was repaired in November 2025 (vllm#28715)"),
    "int8": Serving(
        (0, 29, 0), "the wheels' gpt_oss.py and compressed-tensors MoE files: biases of int8 experts since 0.29"
    ),
    "int4": Serving(
        (0, 31, 0), "the wheels' gpt_oss.py: w13_weight_packed, and biases of packed experts, since 0.31",
        ("--moe-backend", "humming"),
    ),
    "int8-g32": Serving((0, 31, 0), "as int4", ("--moe-backend", "humming")),
}  # fmt: skip
REMEDY = "gptoss-convert convert SRC DIR --to hf (MXFP4), or --to int4, int8, bf16"


def text(version: Version) -> str:
    """0.29.0"""
    return ".".join(map(str, version))


def version_of(image: str) -> Version | None:
    """vLLM's version where an image's name tells it: the project's own images and AWS's."""
    found = _TAGGED.search(image)
    return tuple(int(part or 0) for part in found.groups()) if found else None


def experts_apart(kind: str, gpus: int, intermediate: int) -> bool:
    """Whether this many GPUs must share the experts out whole: int8's scales, and groups of 32, do not divide otherwise.

    gpus 0: as many as the machine has, which is not known here.
    """
    if kind == "int8":
        return gpus != 1
    return kind in ("int4", "int8-g32") and (gpus == 0 or intermediate % (_GROUP * gpus) != 0)


def require_served(artifact: Artifact, image: str, platform: str, package: Package) -> None:
    """Refuse what vLLM cannot load, in this image or at all; a note where the image does not tell its version."""
    if not _IMAGE.fullmatch(image):
        raise UsageError(
            "not the name of an image", found=image, expected="[HOST[:PORT]/]REPOSITORY with :TAG or @DIGEST"
        )
    why = {"gguf": "vLLM has no gpt-oss reader for GGUF", "onnx": "vLLM reads no ONNX"}.get(artifact.kind, "")
    require_kind(artifact, platform, tuple(SERVED), REMEDY, why)
    floor, version = SERVED[artifact.kind].floor, version_of(image)
    needed = text(floor)
    if version is None:
        package.notes.append(f"{image} does not tell its vLLM; {artifact.kind} needs {needed} or newer")
    elif version < floor:
        raise Refused(
            f"the vLLM of this image does not load {artifact.kind}", file=artifact.path, found=image,
            expected=f"vLLM {needed} or newer", remedy=f"--image {IMAGE}, or gptoss-convert convert SRC DIR --to hf (MXFP4)",
        )  # fmt: skip


def require_context(artifact: Artifact, context: int) -> int:
    """The context, or UsageError where the model has no such."""
    if context > artifact.config.max_positions:
        raise UsageError(
            "the model has no such context", found=context, expected=f"at most {artifact.config.max_positions}"
        )
    return context


def arguments(artifact: Artifact, name: str, gpus: int, context: int | None) -> list[str]:
    """What follows `vllm serve FOLDER` for an artifact on this many GPUs."""
    serving = SERVED[artifact.kind]
    found = ["--served-model-name", name, "--host", "0.0.0.0", "--port", str(PORT), *TOOLS, *serving.flags]
    if context is not None:
        found += ["--max-model-len", str(require_context(artifact, context))]
    if gpus > 1:
        found += ["--tensor-parallel-size", str(gpus)]
        if experts_apart(artifact.kind, gpus, artifact.config.intermediate):
            found.append("--enable-expert-parallel")
    return found


def other_layouts(artifact: Artifact) -> set[str]:
    """Files of a downloaded release that vLLM has no use for: the same weights again in two more layouts."""
    return {name for name in artifact.files if name.startswith(("original/", "metal/"))}


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of the weights that are served."""
    unused = other_layouts(artifact)
    return sum(artifact.files[name].stat().st_size for name in artifact.weights if name not in unused)


def gpus_for(weights: int, each_gb: int) -> int:
    """GPUs of this memory for weights: a tenth of each stays free, 6 GB are for activations and the cache."""
    room = each_gb * 0.9 - 6
    return next(n for n in (1, 2, 4, 8, 16, 1 << 20) if weights / 1e9 <= n * room)

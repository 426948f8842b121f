"""What vLLM serves of what is converted, as data: from which version on, with which flags, on how many GPUs.

Read in the sources of vLLM 0.21, 0.27 to 0.33; nothing here was measured on a GPU. MXFP4's floor is the oldest version that a
published deployment of the release names (SageMaker JumpStart's gpt-oss-20b: 0.18). Tool calls: vllm-project/recipes, GPT-OSS.

    int8             the per-expert loader and expert biases since 0.29; its scales are sliced wrongly by tensor parallelism
    int4, int8-g32   since 0.31; the backend that is chosen by itself leaves expert biases out on some GPUs, humming reads them;
                     their groups of 32 must not be cut by tensor parallelism
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.package import Package, require_kind
from gptoss_convert.errors import Refused, UsageError
from gptoss_convert.formats.files import parse_json

IMAGE = "docker.io/vllm/vllm-openai:v0.33.0"  # the newest release on PyPI and Docker Hub on 2026-11-22
PORT, HEALTH = 8000, "/health"
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "openai")
_TAGGED = re.compile(r"(?:^|/)vllm-openai:v?(\d+)\.(\d+)")
_GROUP = 32
_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")


@dataclass(frozen=True)
class Serving:
    """floor: the oldest version, flags: what it must be told, split: how its experts may lie on several GPUs."""

    floor: tuple[int, int]
    flags: tuple[str, ...] = ()
    split: str = "tensor"  # or "groups": tensor where 32 divides what a GPU gets; or "expert"


SERVED = {
    "mxfp4": Serving((0, 18)),
    "bf16": Serving((0, 21)),
    "int8": Serving((0, 29), split="expert"),
    "int4": Serving((0, 31), ("--moe-backend", "humming"), "groups"),
    "int8-g32": Serving((0, 31), ("--moe-backend", "humming"), "groups"),
}
REMEDY = "gptoss-convert convert SRC DIR --to hf (MXFP4), or --to int4, int8, bf16"


def version_of(image: str) -> tuple[int, int] | None:
    """vLLM's version where an image's name tells it: the project's own images only."""
    found = _TAGGED.search(image)
    return (int(found[1]), int(found[2])) if found else None


def require_served(artifact: Artifact, image: str, platform: str, package: Package) -> None:
    """Refuse what vLLM cannot load, in this image or at all; a note where the image does not tell its version."""
    if re.search(r"\s|['\"\\$`]", image) or not image:
        raise UsageError("not the name of an image", found=image)
    why = {"gguf": "vLLM has no gpt-oss reader for GGUF", "onnx": "vLLM reads no ONNX"}.get(artifact.kind, "")
    require_kind(artifact, platform, tuple(SERVED), REMEDY, why)
    floor, version = SERVED[artifact.kind].floor, version_of(image)
    needed = ".".join(map(str, floor))
    if version is None:
        package.notes.append(f"{image} does not tell its vLLM; {artifact.kind} needs {needed} or newer")
    elif version < floor:
        raise Refused(
            f"the vLLM of this image does not load {artifact.kind}", file=artifact.path, found=image,
            expected=f"vLLM {needed} or newer", remedy=f"--image {IMAGE}, or gptoss-convert convert SRC DIR --to hf (MXFP4)",
        )  # fmt: skip


def arguments(artifact: Artifact, name: str, gpus: int, context: int | None) -> list[str]:
    """What follows `vllm serve FOLDER` for an artifact on this many GPUs."""
    serving = SERVED[artifact.kind]
    found = ["--served-model-name", name, "--host", "0.0.0.0", "--port", str(PORT), *TOOLS, *serving.flags]
    if context is not None:
        found += ["--max-model-len", str(context)]
    if gpus > 1:
        found += ["--tensor-parallel-size", str(gpus)]
        whole = artifact.config.intermediate % (gpus * _GROUP) == 0
        if serving.split == "expert" or (serving.split == "groups" and not whole):
            found.append("--enable-expert-parallel")
    return found


def require_chat(artifact: Artifact, platform: str) -> None:
    """Refuse an artifact with which nobody could chat: without tokenizer or template, or whose end tokens are missing."""
    for name in (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "generation_config.json"):
        if artifact.small(name) is None:
            raise Refused(
                f"{platform} serves no chat without {name}", file=artifact.path, found="no such file",
                expected=name, remedy="put the release's beside the weights, or convert again with --tokenizer FOLDER",
            )  # fmt: skip
    ends, ids = _end_tokens(artifact)
    missing = [name for name, token in ids.items() if token not in ends]
    if missing:
        raise Refused(
            "generation would not end where it has to", file=artifact.path / "generation_config.json",
            found=f"eos_token_id {ends}", expected=", ".join(f"{name} ({ids[name]})" for name in missing),
            remedy="take the release's generation_config.json",
        )  # fmt: skip


def _end_tokens(artifact: Artifact) -> tuple[list[Any], dict[str, Any]]:
    generation = parse_json(artifact.small("generation_config.json") or b"", artifact.path / "generation_config.json")
    tokenizer = parse_json(artifact.small(TOKENIZER) or b"", artifact.path / TOKENIZER)
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    added = tokenizer.get("added_tokens")
    found = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids: dict[Any, Any] = {str(token.get("content")): token.get("id") for token in found}
    return ends, {name: ids.get(name, -1) for name in _ENDS}


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

"""SageMaker's containers and machines as data: what each image has within.

Every entry says where it was read and when. None was pulled or run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.exports.vllm import Version, experts_apart

READ = "2026-11-22"


@dataclass(frozen=True)
class Image:
    """A container. vllm: the version within, exact or the least that it can be; ami: the host image that its CUDA needs."""

    name: str
    vllm: Version
    exact: bool
    ami: str
    source: str


# The newest of each engine whose whole tag is known. ami: the one that has CUDA 13.0 in botocore 1.44.5's InferenceAmiVersion.
IMAGES = {
    "vllm": Image(
        "vllm:0.29.0-gpu-py312-cu130-ubuntu24.04-sagemaker", (0, 29, 0), True, "al2023-ami-sagemaker-inference-gpu-4-1",
        f"sagemaker-core 2.27.0, image_uris.retrieve('vllm'), {READ}",
    ),
    "lmi": Image(
        "djl-inference:0.38.0-lmi29.0.0-cu130", (0, 12, 0), False, "al2023-ami-sagemaker-inference-gpu-4-1",
        f"sagemaker-core 2.27.0, image_uris.retrieve('djl-lmi'), {READ}; its vLLM is not published there: it is later than "
        "LMI 18's, which djl-serving's release notes of v0.36.0 give as 0.12.0",
    ),
}  # fmt: skip
DEFAULT_ENGINE = "vllm"  # whose version is known, and whose environment JumpStart's own gpt-oss specification uses

# Machine → GPUs and the GB of each. The types are botocore 1.44.5's ProductionVariantInstanceType; counts and memory are general
# knowledge of EC2's families, not looked up on a page of AWS. Families without bfloat16 (g4dn, p3) are left out.
_GPUS = {
    1: "g5.xlarge g5.2xlarge g5.4xlarge g5.8xlarge g5.16xlarge g6.xlarge g6.2xlarge g6.4xlarge g6.8xlarge g6.16xlarge g6e.xlarge "
    "g6e.2xlarge g6e.4xlarge g6e.8xlarge g6e.16xlarge g7e.2xlarge g7e.4xlarge g7e.8xlarge p5.4xlarge",
    2: "g7e.12xlarge",
    4: "g5.12xlarge g5.24xlarge g6.12xlarge g6.24xlarge g6e.12xlarge g6e.24xlarge g7e.24xlarge",
    8: "g5.48xlarge g6.48xlarge g6e.48xlarge g7e.48xlarge p4d.24xlarge p4de.24xlarge p5.48xlarge p5e.48xlarge p5en.48xlarge",
}
_GB = {"g5": 24, "g6": 24, "g6e": 48, "g7e": 96, "p4d": 40, "p4de": 80, "p5": 80, "p5e": 141, "p5en": 141}
INSTANCES = {f"ml.{name}": count for count, names in _GPUS.items() for name in names.split()}

# JumpStart's default for gpt-oss-20b (specification of sagemaker-python-sdk v3.38.0), one GPU of 96 GB; what does not fit there
# with room for the cache goes to one of its larger types.
SMALL_INSTANCE, SMALL_BYTES, LARGE_INSTANCE = "ml.g7e.2xlarge", 76_000_000_000, "ml.p5.48xlarge"
CONTEXT = 8192  # JumpStart's SM_VLLM_MAX_MODEL_LEN for gpt-oss


def room(instance: str) -> int | None:
    """Bytes of weights at most, vLLM taking nine tenths of every GPU; None of a machine that is not listed."""
    if instance not in INSTANCES:
        return None
    return INSTANCES[instance] * _GB[instance.split(".")[1]] * 900_000_000


def arguments(kind: str, gpus: int, intermediate: int) -> dict[str, Any]:
    """vLLM's arguments for tool calls, and those that a kind cannot do without; True: a flag."""
    made: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "openai"}
    if kind in ("int4", "int8-g32"):
        made["moe_backend"] = "humming"  # what "auto" takes instead may leave the experts' biases out
    if experts_apart(kind, gpus, intermediate):
        made["enable_expert_parallel"] = True
    return made

"""The platforms by name: what each is asked for, and which kinds of artifact it takes at all."""

from __future__ import annotations

from gptoss_convert.convert.exports import (
    azureml,
    bedrock,
    foundry_local,
    huggingface,
    llama_cpp,
    lmstudio,
    northflank,
    ollama,
    sagemaker,
)
from gptoss_convert.convert.exports.package import Platform
from gptoss_convert.convert.exports.vllm import SERVED

_DEPLOYMENT = frozenset({"name", "instance", "image", "context"})
_AWS = frozenset({"name", "bucket", "role", "region"})
_LOCAL = frozenset({"name", "context"})

PLATFORMS: dict[str, Platform] = {
    "sagemaker": Platform(
        sagemaker.package, _DEPLOYMENT | _AWS | {"engine", "archive"}, tuple(SERVED), sagemaker.require_own_name,
        sagemaker.foresee,
    ),
    "bedrock": Platform(bedrock.package, _AWS, ("bf16",), bedrock.require_own_name, bedrock.foresee),
    "azureml": Platform(azureml.package, _DEPLOYMENT | {"engine"}, tuple(SERVED), azureml.require_own_name),
    "foundry-local": Platform(
        foundry_local.package, _LOCAL | {"engine"}, ("onnx",), foundry_local.require_own_name, foundry_local.foresee
    ),
    "llama.cpp": Platform(llama_cpp.package, _LOCAL, ("gguf",), llama_cpp.require_own_name),
    "ollama": Platform(ollama.package, _LOCAL, ("gguf",), ollama.require_own_name),
    "lmstudio": Platform(lmstudio.package, _LOCAL, ("gguf",), lmstudio.require_own_name),
    "northflank": Platform(northflank.package, _DEPLOYMENT, tuple(SERVED), northflank.require_own_name),
    "huggingface": Platform(
        huggingface.package, frozenset({"name", "base_model", "quality"}), huggingface.SERVED, huggingface.require_own_name
    ),
}  # fmt: skip

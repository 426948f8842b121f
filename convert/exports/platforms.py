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
    "sagemaker": Platform(sagemaker.package, _DEPLOYMENT | _AWS | {"engine", "archive"}, tuple(SERVED)),
    "bedrock": Platform(bedrock.package, _AWS, ("bf16",)),
    "azureml": Platform(azureml.package, _DEPLOYMENT | {"engine"}, tuple(SERVED)),
    "foundry-local": Platform(foundry_local.package, _LOCAL | {"engine"}, ("onnx",)),
    "llama.cpp": Platform(llama_cpp.package, _LOCAL, ("gguf",)),
    "ollama": Platform(ollama.package, _LOCAL, ("gguf",)),
    "lmstudio": Platform(lmstudio.package, _LOCAL, ("gguf",)),
    "northflank": Platform(northflank.package, _DEPLOYMENT, tuple(SERVED)),
    "huggingface": Platform(huggingface.package, frozenset({"name", "base_model", "quality"}), huggingface.SERVED),
}

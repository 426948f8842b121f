"""The platforms by name. A module's `package` turns an artifact and a request into what the platform deploys."""

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
from gptoss_convert.convert.exports.package import Export
from gptoss_convert.convert.exports.vllm import SERVED

PLATFORMS: dict[str, Export] = {
    "sagemaker": sagemaker.package,
    "bedrock": bedrock.package,
    "azureml": azureml.package,
    "foundry-local": foundry_local.package,
    "llama.cpp": llama_cpp.package,
    "ollama": ollama.package,
    "lmstudio": lmstudio.package,
    "northflank": northflank.package,
    "huggingface": huggingface.package,
}

# The kinds of artifact that a platform's `package` takes; what is not listed is known only when the artifact is there.
SERVES: dict[str, tuple[str, ...]] = {
    "sagemaker": tuple(SERVED),
    "bedrock": ("bf16",),
    "azureml": tuple(SERVED),
    "foundry-local": ("onnx",),
    "llama.cpp": ("gguf",),
    "ollama": ("gguf",),
    "lmstudio": ("gguf",),
    "northflank": tuple(SERVED),
    "huggingface": huggingface.SERVED,
}

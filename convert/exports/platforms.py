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

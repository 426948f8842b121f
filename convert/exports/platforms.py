"""The platforms by name. A module's `package` turns an artifact and a request into what the platform deploys."""

from __future__ import annotations

from gptoss_convert.convert.exports import azureml, bedrock, northflank, sagemaker
from gptoss_convert.convert.exports.package import Export

PLATFORMS: dict[str, Export] = {
    "sagemaker": sagemaker.package,
    "bedrock": bedrock.package,
    "azureml": azureml.package,
    "northflank": northflank.package,
}

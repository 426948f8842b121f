"""The platforms by name. A module's `package` turns an artifact and a request into what the platform deploys."""

from __future__ import annotations

from gptoss_convert.convert.exports import huggingface, llama_cpp, lmstudio, ollama
from gptoss_convert.convert.exports.package import Export

PLATFORMS: dict[str, Export] = {
    "huggingface": huggingface.package,
    "llama.cpp": llama_cpp.package,
    "lmstudio": lmstudio.package,
    "ollama": ollama.package,
}

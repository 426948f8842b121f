"""What the exports of a GGUF share: which artifacts they take, names of its files, and the sampling gpt-oss is meant to have."""

from __future__ import annotations

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.chat import Chat, require_chat
from gptoss_convert.convert.exports.memory import DEFAULT_CONTEXT
from gptoss_convert.convert.exports.package import Request, require_kind
from gptoss_convert.convert.exports.words import code
from gptoss_convert.errors import Refused, UsageError

TEMPERATURE, TOP_P, TOP_K, MIN_P = 1.0, 1.0, 0, 0.0
"""OpenAI's: the model's own distribution, nothing cut off. (llama.cpp and Ollama cut by default.)"""
REMEDY = "gptoss-convert convert SRC model.gguf --to gguf"


def require_gguf(artifact: Artifact, platform: str, *, whole: bool = False) -> Chat:
    """Its chat; Refused for anything but a GGUF that can hold one. whole: a split one is refused too."""
    require_kind(artifact, platform, ("gguf",), REMEDY, "it loads GGUF")
    if whole and len(artifact.weights) > 1:
        raise Refused(
            f"{platform} is given a GGUF in one file: not every version takes parts", file=artifact.path,
            found=f"{len(artifact.weights)} parts",
            expected="one file", remedy="gptoss-convert convert PART model.gguf --to gguf",
        )  # fmt: skip
    return require_chat(artifact, platform)


def served_context(config: ModelConfig, request: Request) -> int:
    """Tokens of context: what was asked for, if the model has as many."""
    most = config.max_positions
    if request.context is not None and request.context > most:
        raise UsageError("--context is more than the model has", found=request.context, expected=f"at most {most}")
    return request.context or min(DEFAULT_CONTEXT, most)


def licence(artifact: Artifact) -> str | None:
    """What the GGUF says of its licence: a name, and a link where it has one."""
    metadata = artifact.source.metadata
    found = [
        str(metadata[key].value)
        for key in ("general.license.name", "general.license", "general.license.link")
        if key in metadata
    ]
    return ", ".join(dict.fromkeys(text for text in found if text)) or None


def provenance(artifact: Artifact, folder: str = "") -> list[str]:
    """Lines for a README: what the certificate says that it was made from, and what was lost on the way.

    folder: where in the export the certificate lies, with its slash.
    """
    made = artifact.certificate
    if made is None:
        return ["There is no certificate with it: what it was made from, and what that cost, is not known."]
    weights = "OpenAI's, every file's digest known" if made["source"]["official_weights"] else "not OpenAI's own files"
    lost = made["lost"]
    cost = "was not proved" if lost is None else "lost nothing" if not lost else "lost: " + "; ".join(lost)
    account = code(f"{folder}{artifact.certificate_name}")
    return [f"The source's weights are {weights}. The conversion {cost}. The whole account: {account}."]

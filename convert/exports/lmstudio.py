"""LM Studio: model.yaml, by its draft specification, beside the GGUF.

A model.yaml is a model of its own that stands on a concrete one: the GGUF as it lies in LM Studio's folder, or on the hub, under
OWNER/NAME-GGUF. `lms import` puts it there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.chat import Chat
from gptoss_convert.convert.exports.gguf import (
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    provenance,
    require_gguf,
    served_context,
)
from gptoss_convert.convert.exports.memory import Forecast
from gptoss_convert.convert.exports.package import Package, Request, require_name
from gptoss_convert.convert.exports.words import paragraph, shell_word, size

PLATFORM = "lmstudio"
_NAME = r"[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9._-]*"
require_own_name = partial(require_name, pattern=_NAME, what="a model of LM Studio's, publisher/model", most=96)
_SIZES = {"gpt-oss-20b": "20B", "gpt-oss-120b": "120B"}
_EFFORT = {
    "key": "reasoningEffort",
    "displayName": "Reasoning effort",
    "description": "How long the model thinks before it answers.",
    "type": "select",
    "defaultValue": "medium",
    "options": [{"value": value, "label": value.capitalize()} for value in ("low", "medium", "high")],
    "effects": [{"type": "setJinjaVariable", "variable": "reasoning_effort"}],
}


def package(artifact: Artifact, request: Request) -> Package:
    """GGUF, certificate, model.yaml, README.md."""
    import yaml

    chat = require_gguf(artifact, PLATFORM)
    context = served_context(artifact.config, request)
    name = require_own_name(request.name or f"local/{artifact.model}")
    document = definition(artifact, chat, name, context)
    made = Package()
    made.copy(artifact)
    made.files["model.yaml"] = yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()
    made.files["README.md"] = _readme(artifact, chat, name)
    made.first_steps = _commands(artifact, name)
    return made


def _commands(artifact: Artifact, name: str) -> list[str]:
    """For a shell in the folder: every part of the GGUF, then the definition."""
    place = f"~/.lmstudio/hub/models/{name}"
    copies = [f"lms import {shell_word(weights)} --copy --user-repo {name}-GGUF" for weights in artifact.weights]
    return [*copies, f"mkdir -p {place} && cp model.yaml {place}/"]


def definition(artifact: Artifact, chat: Chat, name: str, context: int) -> dict[str, Any]:
    """model.yaml as a table."""
    owner, _, repo = name.partition("/")
    parameters = _SIZES.get(artifact.model)
    fields = {
        "llm.prediction.temperature": TEMPERATURE,
        "llm.prediction.topKSampling": TOP_K,
        "llm.prediction.topPSampling": {"checked": True, "value": TOP_P},
        "llm.prediction.minPSampling": {"checked": True, "value": MIN_P},
        "llm.prediction.repeatPenalty": {"checked": False, "value": 1.0},
    }
    return {
        "model": name,
        "base": [
            {
                "key": f"{name}-gguf".lower(),
                "sources": [{"type": "huggingface", "user": owner, "repo": f"{repo}-GGUF"}],
            }
        ],
        "metadataOverrides": {
            "domain": "llm",
            "architectures": ["gpt-oss"],
            "compatibilityTypes": ["gguf"],
            **({"paramsStrings": [parameters]} if parameters else {}),
            "minMemoryUsageBytes": Forecast.of(artifact).total(min(4096, artifact.config.max_positions)),
            "contextLengths": [artifact.config.max_positions],
            "trainedForToolUse": True,
            "vision": False,
            "reasoning": True,
        },
        "config": {
            "operation": {"fields": [{"key": key, "value": value} for key, value in fields.items()]},
            "load": {"fields": [{"key": "llm.load.contextLength", "value": context}]},
        },
        **({"customFields": [_EFFORT]} if chat.knows_effort else {}),
    }


def _readme(artifact: Artifact, chat: Chat, name: str) -> bytes:
    what = (
        f"`model.yaml` stands on the GGUF ({size(artifact.weight_bytes)}) as `{name}-GGUF`. `lms import` puts it there; uploaded "
        f"to the hub under that name, `model.yaml` alone is enough and LM Studio downloads it. `lms clone` and `lms push` of "
        "LM Studio's hub work on a folder with a `model.yaml`."
    )
    known = (
        "model.yaml is a draft specification; this one was checked with a JSON Schema made after LM Studio's type definitions, "
        "and not in LM Studio. Sampling is OpenAI's: temperature 1, nothing cut off. LM Studio renders the template in the GGUF. "
        + ("Reasoning effort is a field of its own, given to the template. " if chat.knows_effort else "")
        + chat.origin
    )
    blocks = [
        f"# {name} for LM Studio\n", *map(paragraph, provenance(artifact)),
        "".join(f"    {command}\n" for command in _commands(artifact, name)),
        paragraph(what), paragraph(known),
    ]  # fmt: skip
    return "\n".join(blocks).encode()

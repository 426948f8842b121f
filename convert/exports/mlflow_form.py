"""A model folder in MLflow's transformers flavor: MLmodel, the artifact below model/, its tokenizer, the environment.

Layout and keys as mlflow 3.17's mlflow/transformers writes and reads them. transformers reads two kinds without code of ours:
bf16 and MXFP4. The folder answers chats (`inference_task: llm/v1/chat`) through the artifact's own template.
"""

from __future__ import annotations

from typing import Any

import yaml

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.chat_files import ChatFiles
from gptoss_convert.convert.exports.package import Package, require_kind
from gptoss_convert.convert.exports.vllm import other_layouts

KINDS = ("bf16", "mxfp4")
REMEDY = "gptoss-convert convert SRC DIR --to bf16, or --to hf (MXFP4); or --engine vllm"
PYTHON = "3.12"
# What mlflow's flavor was read in and the small model loaded with; kernels: the range that transformers 5.23 declares.
PACKAGES = ("mlflow==3.17.2", "transformers==5.23.0", "torch==2.13.0", "accelerate==1.15.0", "kernels>=0.18.2,<0.19")
BELOW = "model/"  # of the package
TASK = "llm/v1/chat"
ALL_GPUS = {"MLFLOW_HUGGINGFACE_USE_DEVICE_MAP": "true"}  # without it mlflow 3.17.2 puts the whole model onto the first
_TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", TEMPLATE)


def require_mlflow(artifact: Artifact) -> None:
    """Refuse what transformers does not read without remote code, which MLflow would not let through."""
    require_kind(artifact, "azureml --engine mlflow", KINDS, REMEDY, "MLflow loads with stock transformers")


def add_mlflow(made: Package, artifact: Artifact, chat: ChatFiles) -> None:
    """The whole folder."""
    made.copy(artifact, f"{BELOW}model/", other_layouts(artifact))
    chat.put_into(made, f"{BELOW}model/")
    for name in _TOKENIZER_FILES:
        if name in artifact.files:
            made.files[f"{BELOW}components/tokenizer/{name}"] = artifact.files[name]
    made.files[f"{BELOW}MLmodel"] = _dump(_mlmodel(artifact))
    made.files[f"{BELOW}conda.yaml"] = _dump(
        {
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={PYTHON}", "pip", {"pip": list(PACKAGES)}],
        }
    )
    made.files[f"{BELOW}python_env.yaml"] = _dump(
        {"python": PYTHON, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    )
    made.files[f"{BELOW}requirements.txt"] = ("\n".join(PACKAGES) + "\n").encode()
    made.notes.append("MLflow's answer is one text in which harmony's channels follow each other; vLLM separates them")
    if artifact.kind == "mxfp4":
        made.notes.append(
            "transformers keeps MXFP4 packed on GPUs with the kernels package only; else it needs 4 × the memory"
        )


def _mlmodel(artifact: Artifact) -> dict[str, Any]:
    return {
        "artifact_path": "model",
        "flavors": {
            "python_function": {
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.transformers",
                "python_version": PYTHON,
            },
            "transformers": {
                "components": ["tokenizer"],
                "framework": "pt",
                "inference_task": TASK,
                "instance_type": "TextGenerationPipeline",
                "model_binary": "model",
                "pipeline_model_type": "GptOssForCausalLM",
                "source_model_name": artifact.model,
                "task": "text-generation",
                "tokenizer_type": "PreTrainedTokenizerFast",
                "torch_dtype": "torch.bfloat16",
                "transformers_version": _version("transformers"),
            },
        },
        "metadata": {"task": TASK},
        "mlflow_version": _version("mlflow"),
    }  # no signature: Azure's scoring script makes a sample of one when it starts, and knows no arrays, which messages are


def _version(package: str) -> str:
    return next(text.partition("==")[2] for text in PACKAGES if text.startswith(f"{package}=="))


def table_of(messages: list[dict[str, str]], **settings: int | float) -> dict[str, Any]:
    """A question as a table of one row: the form in which Azure's scoring script hands lists of messages on."""
    return {"columns": ["messages", *settings], "index": [0], "data": [[messages, *settings.values()]]}


def _dump(document: object) -> bytes:
    return str(yaml.safe_dump(document, sort_keys=False, width=1 << 20)).encode()

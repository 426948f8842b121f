"""Azure Machine Learning: a managed online endpoint that runs vLLM, or a model in MLflow's form.

    model/          the artifact as it is                environment/    Dockerfile, entry point, vocabulary of the chat parser
    model.yml  environment.yml  endpoint.yml  deployment.yml             deploy.sh      all four, in order, with az ml

`--engine mlflow` writes model/ in MLflow's transformers flavor (`mlflow_form.py`) and no environment: Azure makes one.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import yaml

from gptoss_convert.convert.exports import vllm
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.chat_files import (
    NO_VOCABULARY,
    VARIABLE,
    VOCABULARY,
    ChatFiles,
    harmony_vocabulary,
    require_chat_files,
)
from gptoss_convert.convert.exports.mlflow_form import ALL_GPUS, add_mlflow, require_mlflow, table_of
from gptoss_convert.convert.exports.package import Package, Request, require_name
from gptoss_convert.errors import Refused, UsageError

SCHEMAS = "https://azuremlschemas.azureedge.net/latest/"
MOUNT = "/var/azureml-app/model"  # the entry point looks for config.json below it: how deep differs between documents
VERSION = "1"
NAME = r"[a-z][a-z0-9-]+[a-z0-9]"  # of an endpoint, the strictest of the four
require_own_name = partial(require_name, pattern=NAME, what="an endpoint", most=32)
MAX_REQUEST_MS = 180_000  # the most that a managed endpoint waits


@dataclass(frozen=True)
class Machine:
    """GPUs of an instance type, and the memory of each in GB."""

    gpus: int
    memory: int


# huggingface.co/docs/microsoft-azure, "Supported Hardware", read 2026-11-22; smallest first: the first that fits is the default.
MACHINES = {
    "Standard_NC24ads_A100_v4": Machine(1, 80),
    "Standard_NC40ads_H100_v5": Machine(1, 80),
    "Standard_NC48ads_A100_v4": Machine(2, 80),
    "Standard_NC80adis_H100_v5": Machine(2, 80),
    "Standard_NC96ads_A100_v4": Machine(4, 80),
    "Standard_ND96asr_v4": Machine(8, 40),
    "Standard_ND96amsr_A100_v4": Machine(8, 80),
}
_NO_BFLOAT16 = re.compile(r"Standard_(NC\d+as_T4_v3|NC\d+r?s_v3|ND40rs_v2)")  # T4 and V100, as EC2's are left out
TAGS = {"content": "set by deploy.sh"}


def package(artifact: Artifact, request: Request) -> Package:
    """What `az ml` registers and deploys."""
    engine = request.engine or "vllm"
    if engine not in ("vllm", "mlflow"):
        raise UsageError("azureml knows no such engine", found=engine, expected="vllm or mlflow")
    known = {"name", "instance", "engine", *(("image", "context") if engine == "vllm" else ())}
    request.only(f"azureml --engine {engine}" if engine == "mlflow" else "azureml", known)
    made = Package(executable={"deploy.sh"})
    name = require_own_name(request.name or artifact.model)
    if engine == "mlflow":
        require_mlflow(artifact)
    else:
        vllm.require_served(artifact, request.image or vllm.IMAGE, "azureml", made)
    chat = require_chat_files(artifact, "azureml")
    instance, machine = _machine(artifact, request.instance, made)
    if engine == "mlflow":
        add_mlflow(made, artifact, chat)
    else:
        made.copy(artifact, "model/", vllm.other_layouts(artifact))
        chat.put_into(made, "model/")
        _add_environment(made, chat, name, request.image or vllm.IMAGE)
    made.files["model.yml"] = _model(artifact, name, engine)
    made.files["endpoint.yml"] = _yaml("managedOnlineEndpoint", {"name": name, "auth_mode": "key"})
    serve = vllm.arguments(artifact, name, machine.gpus, request.context) if engine == "vllm" else None
    made.files["deployment.yml"] = _deployment(artifact, name, instance, serve)
    made.files["deploy.sh"] = _deploy(name, engine)
    made.files["request.json"] = _request(name, engine)
    _first_steps(made, name, instance, engine)
    return made


def _machine(artifact: Artifact, wish: str | None, made: Package) -> tuple[str, Machine]:
    size = vllm.weight_bytes(artifact)
    enough = [name for name, m in MACHINES.items() if vllm.gpus_for(size, m.memory) <= m.gpus]
    if not enough:
        raise Refused(
            "no machine of Azure's holds these weights",
            file=artifact.path,
            found=f"{size / 1e9:.0f} GB",
            remedy=vllm.REMEDY,
        )
    name = wish or enough[0]
    if name not in MACHINES:
        require_name(name, r"Standard_[A-Za-z0-9_]+", "an instance type", 63)
        if _NO_BFLOAT16.fullmatch(name):
            raise Refused(
                "the GPUs of this machine have no bfloat16", file=artifact.path, found=name,
                expected="an A100 or later", remedy=f"--instance {enough[0]}",
            )  # fmt: skip
        made.notes.append(f"{name} is not in the table of machines: one GPU is assumed; else edit deployment.yml")
        return name, Machine(1, 0)
    if name not in enough:
        machine = MACHINES[name]
        raise Refused(
            f"{name} has too little memory for these weights", file=artifact.path, found=f"{size / 1e9:.1f} GB of weights",
            expected=f"{machine.gpus} × {machine.memory} GB with room for the cache", remedy=f"--instance {enough[0]}",
        )  # fmt: skip
    return name, MACHINES[name]


def _yaml(schema: str, document: dict[str, Any]) -> bytes:
    head = {"$schema": f"{SCHEMAS}{schema}.schema.json"}
    return str(yaml.safe_dump(head | document, sort_keys=False, allow_unicode=True, width=120)).encode()


def _model(artifact: Artifact, name: str, engine: str) -> bytes:
    made = artifact.certificate
    official = "unknown" if made is None else str(bool(made["source"]["official_weights"])).lower()
    return _yaml(
        "model",
        {
            "name": name, "version": VERSION, "path": "model",
            "type": "mlflow_model" if engine == "mlflow" else "custom_model",
            "description": f"{artifact.model}, weights as {artifact.kind}",
            "tags": TAGS | {"kind": artifact.kind, "model": artifact.model, "official_weights": official},
        },
    )  # fmt: skip


def _add_environment(made: Package, chat: ChatFiles, name: str, image: str) -> None:
    vocabulary = harmony_vocabulary(chat.table)
    lines = [f"FROM {image}"]
    if vocabulary is None:
        made.notes.append(NO_VOCABULARY)
    else:
        made.files[f"environment/{VOCABULARY}"] = vocabulary
        lines += [f"COPY {VOCABULARY} /opt/encodings/{VOCABULARY}", f"ENV {VARIABLE}=/opt/encodings"]
    lines += [
        "COPY serve.sh /opt/serve.sh",
        "RUN chmod 755 /opt/serve.sh",
        f"EXPOSE {vllm.PORT}",
        'ENTRYPOINT ["/opt/serve.sh"]',
        "CMD []",
    ]
    made.files["environment/Dockerfile"] = ("\n".join(lines) + "\n").encode()
    made.files["environment/serve.sh"] = _script("azureml_serve.sh")
    made.executable.add("environment/serve.sh")
    route = {"port": vllm.PORT, "path": vllm.HEALTH}
    made.files["environment.yml"] = _yaml(
        "environment",
        {
            "name": f"{name}-vllm", "version": VERSION, "description": f"vLLM: {image}", "tags": dict(TAGS),
            "build": {"path": "environment", "dockerfile_path": "Dockerfile"},
            "inference_config": {
                "liveness_route": route.copy(), "readiness_route": route.copy(),
                "scoring_route": {"port": vllm.PORT, "path": "/"},
            },
        },
    )  # fmt: skip


def _deployment(artifact: Artifact, name: str, instance: str, serve: list[str] | None) -> bytes:
    document: dict[str, Any] = {
        "name": "blue", "endpoint_name": name, "model": f"azureml:{name}:{VERSION}", "tags": dict(TAGS),
    }  # fmt: skip
    if serve is None:
        document["environment_variables"] = dict(ALL_GPUS)
    else:
        document |= {
            "model_mount_path": MOUNT,
            "environment": f"azureml:{name}-vllm:{VERSION}",
            "environment_variables": {"MODEL_ROOT": MOUNT, "SERVE_ARGUMENTS": shlex.join(serve)},
        }
    slow = int(
        vllm.weight_bytes(artifact) / 100e6
    )  # seconds at 100 MB/s from the mount, to which ten minutes are added
    probe = {"initial_delay": 60, "period": 10, "timeout": 5, "success_threshold": 1}
    document |= {
        "instance_type": instance,
        "instance_count": 1,
        "request_settings": {"request_timeout_ms": MAX_REQUEST_MS, "max_concurrent_requests_per_instance": 64},
        "liveness_probe": probe | {"failure_threshold": 60 + slow // 10},
        "readiness_probe": probe | {"failure_threshold": 60 + slow // 10},
    }
    return _yaml("managedOnlineDeployment", document)


def _script(name: str) -> bytes:
    return (files("gptoss_convert") / "data" / name).read_bytes()


def _deploy(name: str, engine: str) -> bytes:
    """deploy.sh: the data file's text with what is this package's own put in."""
    values = {"@NAME@": name, "@ENVIRONMENT@": f"{name}-vllm" if engine == "vllm" else "", "@VERSION@": VERSION}
    text = _script("azureml_deploy.sh").decode()
    for key, value in values.items():
        text = text.replace(key, value)
    return text.encode()


def _request(name: str, engine: str) -> bytes:
    messages = [{"role": "user", "content": "Say hello."}]
    if engine == "mlflow":
        return as_json({"input_data": table_of(messages, max_tokens=64)})
    return as_json({"model": name, "messages": messages, "max_tokens": 256})


def _first_steps(made: Package, name: str, instance: str, engine: str) -> None:
    made.first_steps += [
        "az extension add -n ml; az login",
        "./deploy.sh SUBSCRIPTION RESOURCE_GROUP WORKSPACE",
        f"az ml online-endpoint get-credentials -n {name} -g RESOURCE_GROUP -w WORKSPACE",
    ]
    made.notes.append(f"{instance} needs quota in the workspace's region; it is billed from deployment to deletion")
    made.notes.append(f"an endpoint's name is unique in its region: if {name} is taken, export again with --name")
    if engine == "vllm":
        made.first_steps.append(
            f"curl -H 'Authorization: Bearer KEY' -H 'Content-Type: application/json' -d @request.json "
            f"https://{name}.REGION.inference.ml.azure.com/v1/chat/completions"
        )
    else:
        made.first_steps.append(
            f"az ml online-endpoint invoke -n {name} -g RESOURCE_GROUP -w WORKSPACE -r request.json"
        )

"""SageMaker: a model prefix (or model.tar.gz), the three requests of an endpoint, a CloudFormation template, and deploy.py.

    model/                        what SageMaker lays at /opt/ml/model: flat, regular files only
    create_model.json, create_endpoint_config.json, create_endpoint.json      boto3's arguments
    template.json                 the same for CloudFormation
    deploy.py                     uploads model/ and makes the endpoint; may be run again

Two containers: AWS's own vLLM, configured by SM_VLLM_* in the environment, and LMI (djl-serving), by model/serving.properties.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.exports import sagemaker_images as known
from gptoss_convert.convert.exports.archive import Archive
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.aws import (
    deep_learning_image,
    is_placeholder,
    model_uri,
    region_of,
    region_of_image,
    role_arn,
    to_do,
)
from gptoss_convert.convert.exports.chat_files import (
    VOCABULARY,
    VOCABULARY_SHA256,
    harmony_vocabulary,
    require_chat_files,
)
from gptoss_convert.convert.exports.package import Package, Request, require_kind, require_name
from gptoss_convert.convert.exports.vllm import SERVED, require_context, text, version_of, weight_bytes
from gptoss_convert.convert.source import Source
from gptoss_convert.errors import Refused, UsageError

ENGINES = ("vllm", "lmi")
WHERE = "/opt/ml/model"
_NAME = "[a-zA-Z0-9](-*[a-zA-Z0-9])*"  # botocore's ModelName, EndpointConfigName, EndpointName; at most 63 characters
require_own_name = partial(require_name, pattern=_NAME, what="a SageMaker endpoint", most=63)
_WAIT = 3600  # seconds, the most that SageMaker allows for the download and for the start


@dataclass(frozen=True)
class _Plan:
    name: str
    engine: str
    image: str
    instance: str
    gpus: int  # 0: as many as there are
    context: int
    uri: str
    role: str
    ami: str | None
    region: str


def package(artifact: Artifact, request: Request) -> Package:
    """The folder, or Refused with what to convert to."""
    require_kind(
        artifact, "sagemaker", tuple(SERVED), "gptoss-convert convert SRC DIR --to hf",
        "its vLLM and LMI containers read safetensors under the names that vLLM's gpt-oss class knows",
    )  # fmt: skip
    plan = _plan(artifact, request)
    chat = require_chat_files(artifact, "sagemaker")
    vocabulary = harmony_vocabulary(chat.table)
    inside: dict[str, Any] = {name: path for name, path in artifact.files.items() if "/" not in name} | chat.replaced
    if vocabulary is not None:
        inside[VOCABULARY] = vocabulary
    if plan.engine == "lmi":
        inside["serving.properties"] = _properties(artifact, plan).encode()
    environment = _environment(artifact, plan, isolated=vocabulary is not None)
    requests = _requests(plan, environment, archive=request.archive, isolated=vocabulary is not None)

    made = Package(executable={"deploy.py"})
    made.files = {"model.tar.gz": Archive(inside)} if request.archive else {f"model/{n}": d for n, d in inside.items()}
    made.files |= {f"{name}.json": as_json(document) for name, document in requests.items()}
    made.files["template.json"] = as_json(_template(plan, requests))
    made.files["deploy.py"] = resources.files("gptoss_convert").joinpath("data/sagemaker_deploy.py").read_bytes()
    made.notes = [*chat.notes, *_notes(artifact, plan, request, isolated=vocabulary is not None)]
    made.first_steps = _first_steps(plan)
    return made


def foresee(kind: str, source: Source, _: Options, request: Request) -> None:
    """Refuse, before the conversion, what package() would refuse of its result: a kind that the image does not load."""
    _image(kind, source.path, request, _engine(request))


def _plan(artifact: Artifact, request: Request) -> _Plan:
    engine = _engine(request)
    name = require_own_name(request.name or f"{artifact.model}-{artifact.kind}")
    image, region = _image(artifact.kind, artifact.path, request, engine)
    fits = weight_bytes(artifact) <= known.SMALL_BYTES
    instance = request.instance or (known.SMALL_INSTANCE if fits else known.LARGE_INSTANCE)
    _require_room(artifact, instance)
    context = require_context(artifact, request.context or min(known.CONTEXT, artifact.config.max_positions))
    return _Plan(
        name, engine, image, instance, 0 if engine == "lmi" else _gpus(instance), context, model_uri(request, name),
        role_arn(request), None if request.image else known.IMAGES[engine].ami, region,
    )  # fmt: skip


def _engine(request: Request) -> str:
    engine = request.engine or known.DEFAULT_ENGINE
    if engine not in ENGINES:
        raise UsageError("no such container", found=engine, expected=" or ".join(ENGINES))
    return engine


def _image(kind: str, path: Path, request: Request, engine: str) -> tuple[str, str]:
    """The container and the region of the endpoint, which is the image's."""
    region, image = region_of(request), request.image
    if image is None:
        _require_served(kind, path, engine)
        return deep_learning_image(region, known.IMAGES[engine].name), region
    if len(image) > 255 or any(character.isspace() for character in image):
        raise UsageError("not the address of an image", found=image, expected="at most 255 characters, no spaces")
    floor, version = SERVED[kind].floor, version_of(image)
    if version is not None and version < floor:
        raise Refused(
            f"the vLLM of this image does not load {kind}", file=path, found=image,
            expected=f"vLLM {text(floor)} or later",
            remedy="an image with that vLLM, or MXFP4: gptoss-convert convert SRC DIR --to hf",
        )  # fmt: skip
    within = region_of_image(image)
    if request.region is not None and within not in (None, region):
        raise UsageError("SageMaker takes images of the endpoint's own region", found=f"{image}, --region {region}")
    return image, within or region


def _require_served(kind: str, path: Path, engine: str) -> None:
    """Refuse a kind that needs a later vLLM than the listed image of the engine surely has."""
    floor, image = SERVED[kind], known.IMAGES[engine]
    if image.vllm >= floor.floor:
        return
    within = f"vLLM {text(image.vllm)}" + ("" if image.exact else " or later, not published")
    other = engine == "lmi" and known.IMAGES["vllm"].vllm >= floor.floor
    raise Refused(
        f"no listed image of --engine {engine} surely serves {kind}", file=path,
        found=f"{image.name}: {within}", expected=f"vLLM {text(floor.floor)} or later",
        remedy="choose --engine vllm" if other else "give an image of your own with that vLLM: --image URI; or take MXFP4, which "
        "every listed image serves: gptoss-convert convert SRC DIR --to hf",
    )  # fmt: skip


def _require_room(artifact: Artifact, instance: str) -> None:
    room, size = known.room(instance), weight_bytes(artifact)
    if room is not None and size > room:
        raise Refused(
            "the weights do not fit on this machine's GPUs", file=artifact.path, found=f"{size} bytes",
            expected=f"at most {room} on {instance}, and less with a long context",
            remedy="choose a larger --instance, or a smaller form of the model: --to hf (MXFP4)",
        )  # fmt: skip


def _gpus(instance: str) -> int:
    if instance not in known.INSTANCES:
        raise UsageError(
            "how many GPUs this machine has is not listed here", found=instance, expected=", ".join(sorted(known.INSTANCES)),
            remedy="choose one of these, or --engine lmi, which takes all that it finds",
        )  # fmt: skip
    return known.INSTANCES[instance]


def _arguments(artifact: Artifact, plan: _Plan) -> dict[str, Any]:
    return known.arguments(artifact.kind, plan.gpus, artifact.config.intermediate)


def _properties(artifact: Artifact, plan: _Plan) -> str:
    """serving.properties. The weights lie beside it and say how they are packed, so neither is named."""
    options = {"tensor_parallel_degree": "max", "max_model_len": plan.context, **_arguments(artifact, plan)}
    lines = [f"option.{key}={'true' if value is True else value}" for key, value in options.items()]
    return "\n".join(["engine=Python", *lines]) + "\n"


def _environment(artifact: Artifact, plan: _Plan, *, isolated: bool) -> dict[str, str]:
    made = {"TIKTOKEN_ENCODINGS_BASE": WHERE} if isolated else {}
    if plan.engine == "lmi":
        return made
    options = {
        "model": WHERE, "served_model_name": plan.name, "tensor_parallel_size": plan.gpus, "max_model_len": plan.context,
        **_arguments(artifact, plan),
    }  # fmt: skip
    # An empty value is a bare flag: sagemaker_entrypoint.sh of aws/deep-learning-containers, read 2026-11-22.
    return made | {f"SM_VLLM_{key.upper()}": "" if value is True else str(value) for key, value in options.items()}


def _requests(plan: _Plan, environment: dict[str, str], *, archive: bool, isolated: bool) -> dict[str, dict[str, Any]]:
    data = {
        "S3Uri": plan.uri + ("model.tar.gz" if archive else ""), "S3DataType": "S3Object" if archive else "S3Prefix",
        "CompressionType": "Gzip" if archive else "None",
    }  # fmt: skip
    container = {"Image": plan.image, "ModelDataSource": {"S3DataSource": data}, "Environment": environment}
    variant: dict[str, Any] = {
        "VariantName": "AllTraffic", "ModelName": plan.name, "InstanceType": plan.instance, "InitialInstanceCount": 1,
        "InitialVariantWeight": 1.0, "ModelDataDownloadTimeoutInSeconds": _WAIT,
        "ContainerStartupHealthCheckTimeoutInSeconds": _WAIT,
        **({"InferenceAmiVersion": plan.ami} if plan.ami else {}),
    }  # fmt: skip
    return {
        "create_model": {
            "ModelName": plan.name, "PrimaryContainer": container, "ExecutionRoleArn": plan.role,
            "EnableNetworkIsolation": isolated,
        },
        "create_endpoint_config": {"EndpointConfigName": plan.name, "ProductionVariants": [variant]},
        "create_endpoint": {"EndpointName": plan.name, "EndpointConfigName": plan.name},
    }  # fmt: skip


def _template(plan: _Plan, requests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same three things for CloudFormation, which names model and configuration itself, so that it may replace them."""
    model = {key: value for key, value in requests["create_model"].items() if key != "ModelName"}
    source = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    container = {
        **model["PrimaryContainer"],
        "ModelDataSource": {"S3DataSource": {**source, "S3Uri": {"Ref": "ModelData"}}},
    }
    variant = requests["create_endpoint_config"]["ProductionVariants"][0]
    parameters = {
        "ExecutionRoleArn": (plan.role, "The role that SageMaker takes on"),
        "ModelData": (source["S3Uri"], "Where the model lies in S3"),
        "InstanceType": (plan.instance, "Machine type"),
        "EndpointName": (plan.name, "What clients call"),
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"{plan.name} on a SageMaker endpoint",
        "Parameters": {n: _parameter(default, what) for n, (default, what) in parameters.items()},
        "Resources": {
            "Model": {
                "Type": "AWS::SageMaker::Model",
                "Properties": {**model, "PrimaryContainer": container, "ExecutionRoleArn": {"Ref": "ExecutionRoleArn"}},
            },
            "EndpointConfig": {
                "Type": "AWS::SageMaker::EndpointConfig",
                "Properties": {
                    "ProductionVariants": [
                        {
                            **variant, "ModelName": {"Fn::GetAtt": ["Model", "ModelName"]},
                            "InstanceType": {"Ref": "InstanceType"},
                        }
                    ]
                },
            },
            "Endpoint": {
                "Type": "AWS::SageMaker::Endpoint",
                "Properties": {
                    "EndpointName": {"Ref": "EndpointName"},
                    "EndpointConfigName": {"Fn::GetAtt": ["EndpointConfig", "EndpointConfigName"]},
                },
            },
        },
        "Outputs": {"EndpointName": {"Value": {"Fn::GetAtt": ["Endpoint", "EndpointName"]}}},
    }  # fmt: skip


def _parameter(default: str, what: str) -> dict[str, str]:
    """Without a default where that would be a placeholder: CloudFormation then asks for the value."""
    made = {"Type": "String", "Description": what}
    return made if is_placeholder(default) else made | {"Default": default}


def _notes(artifact: Artifact, plan: _Plan, request: Request, *, isolated: bool) -> list[str]:
    floor = SERVED[artifact.kind]
    notes = [f"{artifact.kind} needs vLLM {text(floor.floor)} or later ({floor.source})"]
    if request.image is None:
        image = known.IMAGES[plan.engine]
        notes.append(f"{image.name} has vLLM {text(image.vllm)}{'' if image.exact else ' or later'} ({image.source})")
    else:
        starts = f"starts as --engine {plan.engine} expects"
        has = "" if version_of(plan.image) else "has it, and "
        notes.append(f"that {plan.image} {has}{starts}, is not checked")
    if isolated:
        notes.append(
            f"no network: {VOCABULARY}, which harmony would download, is made from tokenizer.json and lies beside it"
        )
    else:
        notes.append(
            f"network isolation is off: the text tokens are not o200k_base, so harmony's {VOCABULARY} (SHA-256 "
            f"{VOCABULARY_SHA256}) is downloaded at the start. Without a network put it beside the weights, set "
            f"TIKTOKEN_ENCODINGS_BASE={WHERE} and EnableNetworkIsolation; harmony then still counts o200k_base's tokens"
        )
    if left := sorted(name for name in artifact.files if "/" in name):
        notes.append(f"left out, because the model's folder must be flat: {', '.join(left)}")
    if todo := to_do(plan.uri, plan.role):
        notes.append(todo + " here, or as options of deploy.py")
    return notes


def _first_steps(plan: _Plan) -> list[str]:
    body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 256}'
    return [
        f"python deploy.py --bucket s3://BUCKET/PREFIX --role ARN --region {plan.region} (needs boto3 and credentials; "
        "endpoints cost by the hour)",
        f"aws sagemaker-runtime invoke-endpoint --region {plan.region} --endpoint-name {plan.name} "
        "--content-type application/json "
        f"--cli-binary-format raw-in-base64-out --body '{body}' answer.json",
        f"aws sagemaker delete-endpoint --region {plan.region} --endpoint-name {plan.name} when it is no longer needed",
    ]

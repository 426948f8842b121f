"""Amazon Bedrock, Custom Model Import: a prefix of bf16 safetensors with its index, and the request of the import job.

    model/                              what is uploaded, and nothing else: Bedrock reads the whole prefix
    create_model_import_job.json        boto3's arguments

Read 2026-11-22: AWS's blog "Deploy GPT-OSS models with Amazon Bedrock Custom Model Import" (2025-11-25), the user guide's
custom-model-import-code-samples and invoke-imported-model, botocore 1.44.5. What these do not say, the notes of an export say.
"""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from gptoss_convert.config import to_hf
from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.aws import DEFAULT_REGION, model_uri, region_of, role_arn, to_do
from gptoss_convert.convert.exports.chat import GENERATION
from gptoss_convert.convert.exports.chat_files import SPECIALS, require_chat_files
from gptoss_convert.convert.exports.package import Package, Request, require_kind, require_name
from gptoss_convert.convert.source import Source
from gptoss_convert.errors import Refused, UsageError
from gptoss_convert.formats.files import read_json

MAX_BYTES = 200_000_000_000  # of a text model's weights, as the blog has it; read as decimal, the stricter
REGION = DEFAULT_REGION  # "required for GPT-OSS"
INDEX = "model.safetensors.index.json"
CARRIED = ("config.json", GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIALS, TEMPLATE)
_SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_NAME = "[0-9a-zA-Z]([_-]?[0-9a-zA-Z])*"  # what both ImportedModelName and JobName take, but "_" in the second
require_own_name = partial(require_name, pattern=_NAME, what="an imported model", most=63)
_TO_BF16 = "gptoss-convert convert SRC DIR --to bf16"


def package(artifact: Artifact, request: Request) -> Package:
    """The folder, or Refused with what to convert to."""
    require_kind(
        artifact,
        "bedrock",
        ("bf16",),
        _TO_BF16,
        "that it imports a quantized gpt-oss is not documented, bf16 is its example",
    )
    if (region := region_of(request)) != REGION:
        raise UsageError("Bedrock imports gpt-oss in one region only", found=region, expected=REGION)
    name = require_own_name(request.name or f"{artifact.model}-{artifact.kind}")
    _require_weights(artifact)
    chat = require_chat_files(artifact, "bedrock")
    made = Package(notes=[*chat.notes])
    for file in (*_weights(artifact), INDEX, *CARRIED):
        if file in artifact.files:
            made.files[f"model/{file}"] = artifact.files[file]
    made.files |= {
        f"model/{file}": data
        for file, data in (_index(artifact, made) | chat.replaced).items()
        if file in (INDEX, *CARRIED)
    }
    made.files |= {f"model/{file}": data for file, data in _config(artifact, made).items()}
    uri, role = model_uri(request, name), role_arn(request)
    made.files["create_model_import_job.json"] = as_json(_request(name, uri, role))
    made.notes += [
        "not established: which dtypes and quantizations beside bf16 Bedrock imports, whether other regions have followed, and "
        "whether an import job accepts this folder: none was ever submitted",
        "an imported gpt-oss answers InvokeModel with OpenAI's completion and chat schemas; Converse does not know it",
        *([todo] if (todo := to_do(uri, role)) else []),
    ]
    made.first_steps = [
        "sha256sum --quiet -c SHA256SUMS",
        f"aws s3 ls {shlex.quote(uri)} --recursive --region {REGION} (nothing but what is in model/: Bedrock reads all)",
        f"aws s3 sync model {shlex.quote(uri)} --region {REGION}",
        f"aws bedrock create-model-import-job --region {REGION} --cli-input-json file://create_model_import_job.json",
        f"aws bedrock get-model-import-job --region {REGION} --job-identifier {_job(name)}",
    ]
    return made


def foresee(_: str, source: Source, options: Options, __: Request) -> None:
    """Refuse, before the conversion, a model in one file, which package() would refuse."""
    if options.split_bytes is None:
        raise _no_shards(source.path, "no split_size")


def _no_shards(path: Path, found: str) -> Refused:
    return Refused(
        "bedrock wants numbered shards and their index", file=path, found=found,
        expected=f"model-00001-of-0000N.safetensors and {INDEX}",
        remedy=f"{_TO_BF16} --split-size 5GB, or a smaller size where all of it fits in one file",
    )  # fmt: skip


def _require_weights(artifact: Artifact) -> None:
    """bfloat16 throughout, in numbered shards with an index, and not too large."""
    others = sorted({tensor.dtype for tensor in artifact.source.stored} - {"BF16"})
    if others:
        raise Refused(
            "bedrock's export is bfloat16 throughout",
            file=artifact.path,
            found=", ".join(others),
            expected="BF16",
            remedy=_TO_BF16,
        )
    weights = _weights(artifact)
    odd = [name for name in weights if not _SHARD.fullmatch(name)]
    if odd or INDEX not in artifact.files:
        raise _no_shards(artifact.path, ", ".join(odd) or f"no {INDEX}")
    size = sum(artifact.files[name].stat().st_size for name in weights)
    if size >= MAX_BYTES:
        raise Refused(
            "the weights are larger than what bedrock imports", file=artifact.path, found=f"{size} bytes",
            expected=f"less than {MAX_BYTES}",
            remedy="sagemaker serves this model as MXFP4: convert --to hf, export --for sagemaker",
        )  # fmt: skip


def _weights(artifact: Artifact) -> list[str]:
    """The files of weights at the top of the folder: below it a download may hold the same model in other layouts."""
    return [name for name in artifact.weights if "/" not in name]


def _index(artifact: Artifact, made: Package) -> dict[str, bytes]:
    """The index, with nothing in its metadata but the total size: other keys, total_parameters above all, fail an import."""
    table = read_json(artifact.files[INDEX])
    found = table.get("metadata")
    wanted = {"total_size": sum(tensor.nbytes for tensor in artifact.source.stored)}
    if found == wanted and set(table) == {"metadata", "weight_map"}:
        return {}
    made.notes.append(f"{INDEX}: metadata is total_size alone; the artifact's own was {found}")
    return {INDEX: as_json({"metadata": wanted, "weight_map": table["weight_map"]})}


def _config(artifact: Artifact, made: Package) -> dict[str, bytes]:
    """config.json, with the rope in the spelling that every transformers reads: 4 does not know version 5's rope_parameters."""
    table = dict(artifact.source.config_table or {})
    if "rope_scaling" in table or "rope_parameters" not in table:
        return {}
    spelled = to_hf(artifact.config, mxfp4=False)
    table |= {key: spelled[key] for key in ("rope_scaling", "rope_theta")}
    made.notes.append(
        "config.json has the rope as rope_scaling too: the artifact's rope_parameters are of transformers 5 alone"
    )
    return {"config.json": as_json(table)}


def _job(name: str) -> str:
    return f"import-{name.replace('_', '-')}"[:63].rstrip("-")


def _request(name: str, uri: str, role: str) -> dict[str, Any]:
    return {
        "jobName": _job(name),
        "importedModelName": name,
        "roleArn": role,
        "modelDataSource": {"s3DataSource": {"s3Uri": uri}},
    }

"""SageMaker: what is written, judged by botocore, cfn-lint and moto, and deploy.py really run against moto's S3 and SageMaker."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import tokenizer as tk
from support.aws_requests import problems
from support.checkpoints import SMALL, Model, write_hf
from tokenizers import Tokenizer

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.exports import chat_files, sagemaker, sagemaker_images, vllm, write
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import BadInput, DigestMismatch, Refused, UsageError

pytest.importorskip("boto3", reason="boto3 is not installed")
pytest.importorskip("jsonschema", reason="jsonschema is not installed")

ROOT = Path(__file__).parents[3]
ROLE = "arn:aws:iam::123456789012:role/service-role/SageMaker"
OPERATIONS = {
    "create_model": "CreateModel",
    "create_endpoint_config": "CreateEndpointConfig",
    "create_endpoint": "CreateEndpoint",
}
KINDS = {"int4": "int4", "int8": "int8", "int8-g32": "int8-g32", "bf16": "bf16", "hf": "mxfp4"}
OWN = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/vllm:0.33.0"


@pytest.fixture(scope="module")
def artifacts(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for to, name in KINDS.items():
        convert(hf_folder, folder / name, Options(to), silent)
    convert(hf_folder, folder / "m.gguf", Options("gguf"), silent)
    return folder


@pytest.fixture(scope="module")
def true_artifact(true_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the release's own tokenizer."""
    spec = replace(SMALL, layers=1, experts=2, hidden=32, intermediate=32, heads=1, kv_heads=1, vocab=201088)
    spec = replace(spec, spare_rows=spec.vocab - tk.TRUE_TEXT_TOKENS - 21)
    folder = tmp_path_factory.mktemp("true") / "hf"
    write_hf(Model(spec), folder, tokenizer=Tokenizer.from_file(str(true_file)))
    return folder


def export(path: Path, target: Path, **wishes: Any) -> write.Exported:
    return write.export(path, target, "sagemaker", Request(**wishes), show=silent)


def requests_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in OPERATIONS}


def settings(folder: Path) -> dict[str, str]:
    """The container's environment, and what serving.properties says."""
    found: dict[str, str] = requests_of(folder)["create_model"]["PrimaryContainer"]["Environment"]
    properties = folder / "model" / "serving.properties"
    lines = properties.read_text().splitlines() if properties.exists() else []
    return found | dict(line.split("=", 1) for line in lines)


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("mxfp4", {}),
    ("mxfp4", {"engine": "lmi"}),
    ("mxfp4", {"archive": True, "region": "ap-east-1"}),
    ("bf16", {"engine": "lmi", "archive": True, "bucket": "s3://my.bucket"}),
    ("int8", {"instance": "ml.p5.48xlarge", "role": ROLE, "context": 4096}),
    ("int4", {"image": OWN, "name": "Mine-4", "bucket": "s3://my-bucket/some/where/"}),
    ("int8-g32", {"image": OWN, "engine": "lmi", "instance": "ml.g6e.12xlarge"}),
]


@pytest.mark.parametrize(("name", "wishes"), CHOICES, ids=str)
def test_aws_finds_nothing_wrong_with_any_request(
    artifacts: Path, tmp_path: Path, name: str, wishes: dict[str, Any]
) -> None:
    export(artifacts / name, tmp_path / "out", **wishes)
    for file, request in requests_of(tmp_path / "out").items():
        assert problems("sagemaker", OPERATIONS[file], request) == []


def put(request: Any, keys: list[Any], value: Any) -> None:
    for key in keys[:-1]:
        request = request[key]
    request[keys[-1]] = value


CONTAINER = ["PrimaryContainer", "ModelDataSource", "S3DataSource"]
PLANTED: list[tuple[str, list[Any], Any]] = [
    ("create_model", [*CONTAINER, "CompressionType"], "Zip"),
    ("create_model", [*CONTAINER, "S3Uri"], "/local/folder"),
    ("create_model", [*CONTAINER, "Colour"], "red"),
    ("create_model", ["ModelName"], "a_name"),
    ("create_model", ["ModelName"], "a" * 64),
    ("create_model", ["ExecutionRoleArn"], "a-role"),
    ("create_model", ["EnableNetworkIsolation"], "yes"),
    ("create_model", ["PrimaryContainer", "Environment", "KEY"], "x" * 1025),
    ("create_model", ["PrimaryContainer", "Image"], "two words"),
    ("create_endpoint_config", ["ProductionVariants", 0, "InstanceType"], "ml.nope"),
    ("create_endpoint_config", ["ProductionVariants", 0, "InitialInstanceCount"], 0),
    ("create_endpoint_config", ["ProductionVariants", 0, "ModelDataDownloadTimeoutInSeconds"], 7200),
    ("create_endpoint_config", ["ProductionVariants"], []),
    ("create_endpoint", ["EndpointConfigName"], None),
]


@pytest.mark.parametrize(("file", "keys", "value"), PLANTED, ids=str)
def test_a_planted_error_is_found(artifacts: Path, tmp_path: Path, file: str, keys: list[Any], value: Any) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    request = requests_of(tmp_path / "out")[file]
    put(request, keys, value)
    assert problems("sagemaker", OPERATIONS[file], request)


def test_the_machines_that_are_listed_are_machines() -> None:
    import botocore.session

    shape = botocore.session.get_session().get_service_model("sagemaker").shape_for("ProductionVariantInstanceType")
    assert set(sagemaker_images.INSTANCES) <= set(shape.enum)
    assert {sagemaker_images.SMALL_INSTANCE, sagemaker_images.LARGE_INSTANCE} <= set(sagemaker_images.INSTANCES)


def test_the_model_folder_is_flat_and_carries_the_chat_files_as_they_are(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    (tmp_path / "mxfp4" / "metal").mkdir()
    (tmp_path / "mxfp4" / "metal" / "notes.txt").write_text("not for SageMaker")
    found = export(tmp_path / "mxfp4", tmp_path / "out")
    model = tmp_path / "out" / "model"
    assert all(path.is_file() for path in model.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (model / name).read_bytes() == (artifacts / "mxfp4" / name).read_bytes()
    assert {path.name for path in model.iterdir()} == {path.name for path in (artifacts / "mxfp4").iterdir()}
    assert any("metal/notes.txt" in note for note in found.document["notes"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_an_artifact_that_could_not_chat_is_refused(artifacts: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    (tmp_path / "mxfp4" / name).unlink()
    with pytest.raises(Refused, match=f"cannot hold a conversation.*it lacks {re.escape(name)}") as error:
        export(tmp_path / "mxfp4", tmp_path / "out")
    assert "--tokenizer" in str(error.value.remedy)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_token_is_refused(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|call|>", "<|cull|>"))
    (tmp_path / "mxfp4" / "gptoss-certificate.json").unlink()
    with pytest.raises(Refused, match=r"it lacks <\|call\|>"):
        export(tmp_path / "mxfp4", tmp_path / "out")


@pytest.mark.parametrize("spoil", ["missing", "two", "one", "none"])
def test_generation_stops_at_all_three_end_tokens(artifacts: Path, tmp_path: Path, spoil: str) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "generation_config.json"
    table = json.loads(path.read_text())
    ends = table["eos_token_id"]
    if spoil == "missing":
        path.unlink()
    else:
        table |= {"eos_token_id": {"two": ends[:2], "one": ends[0], "none": None}[spoil], "temperature": 0.7}
        path.write_text(json.dumps(table))
    found = export(tmp_path / "mxfp4", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert made["eos_token_id"] == ends
    assert made.get("temperature") == (None if spoil == "missing" else 0.7)
    assert any("generation_config.json stops at" in note for note in found.document["notes"])


@pytest.mark.parametrize("ends", [[[1]], {"a": 1}, [{}], "200002"], ids=str)
def test_end_tokens_that_are_no_numbers_are_replaced(artifacts: Path, tmp_path: Path, ends: Any) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    (tmp_path / "mxfp4" / "gptoss-certificate.json").unlink()
    path = tmp_path / "mxfp4" / "generation_config.json"
    wanted = json.loads(path.read_text())["eos_token_id"]
    path.write_text(json.dumps({"eos_token_id": ends}))
    export(tmp_path / "mxfp4", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model" / path.name).read_text())["eos_token_id"] == wanted


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"temperature": NaN}', "[]", "", '{"a": 1, "a": 2}'], ids=lambda t: t[:20]
)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_small_file_that_is_no_json_is_bad_input(artifacts: Path, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    (tmp_path / "mxfp4" / "gptoss-certificate.json").unlink()
    (tmp_path / "mxfp4" / name).write_text(text)
    with pytest.raises(BadInput) as error:
        export(tmp_path / "mxfp4", tmp_path / "out")
    assert error.value.file == name


def test_the_vllm_container_is_told_all_by_its_environment(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", instance="ml.g6e.12xlarge", context=4096, name="mine")
    assert settings(tmp_path / "out") == {
        "SM_VLLM_MODEL": "/opt/ml/model",
        "SM_VLLM_SERVED_MODEL_NAME": "mine",
        "SM_VLLM_TENSOR_PARALLEL_SIZE": "4",
        "SM_VLLM_MAX_MODEL_LEN": "4096",
        "SM_VLLM_ENABLE_AUTO_TOOL_CHOICE": "",
        "SM_VLLM_TOOL_CALL_PARSER": "openai",
    }
    assert not (tmp_path / "out" / "model" / "serving.properties").exists()


def test_lmi_is_told_by_serving_properties_neither_where_nor_how_packed(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", engine="lmi")
    assert (tmp_path / "out" / "model" / "serving.properties").read_text() == (
        "engine=Python\noption.tensor_parallel_degree=max\noption.max_model_len=8192\n"
        "option.enable_auto_tool_choice=true\noption.tool_call_parser=openai\n"
    )
    assert "djl-inference:" in requests_of(tmp_path / "out")["create_model"]["PrimaryContainer"]["Image"]


ARGUMENTS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("int8", {"instance": "ml.g6e.2xlarge"}, set()),
    ("int8", {"instance": "ml.g6e.12xlarge"}, {"SM_VLLM_ENABLE_EXPERT_PARALLEL="}),
    ("int4", {"image": OWN, "instance": "ml.g6e.2xlarge"}, {"SM_VLLM_MOE_BACKEND=humming"}),
    # 96 columns are three groups of 32: four GPUs cannot share them
    (
        "int4",
        {"image": OWN, "instance": "ml.g6e.12xlarge"},
        {"SM_VLLM_MOE_BACKEND=humming", "SM_VLLM_ENABLE_EXPERT_PARALLEL="},
    ),
    (
        "int8-g32",
        {"image": OWN, "engine": "lmi"},
        {"option.moe_backend=humming", "option.enable_expert_parallel=true"},
    ),
    ("bf16", {"instance": "ml.p5.48xlarge"}, set()),
]


@pytest.mark.parametrize(("name", "wishes", "expected"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_integer_experts_get_the_kernels_and_the_sharing_that_compute_rightly(
    artifacts: Path, tmp_path: Path, name: str, wishes: dict[str, Any], expected: set[str]
) -> None:
    export(artifacts / name, tmp_path / "out", **wishes)
    found = {f"{key}={value}" for key, value in settings(tmp_path / "out").items()}
    assert {item for item in found if "MOE" in item.upper() or "EXPERT" in item.upper()} == expected


@pytest.mark.parametrize("name", ["int4", "int8-g32"])
def test_a_kind_that_no_listed_image_serves_needs_an_image_of_ones_own(
    artifacts: Path, tmp_path: Path, name: str
) -> None:
    for engine in ("vllm", "lmi"):
        with pytest.raises(Refused, match="surely serves") as error:
            export(artifacts / name, tmp_path / "out", engine=engine)
        assert error.value.expected == "vLLM 0.31.0 or later"
        assert "--image" in str(error.value.remedy)
        assert "--to hf" in str(error.value.remedy)
    found = export(artifacts / name, tmp_path / "out", image=OWN)
    assert any("is not checked" in note for note in found.document["notes"])
    assert "InferenceAmiVersion" not in json.dumps(requests_of(tmp_path / "out"))


def test_int8_is_served_by_the_vllm_container_and_not_surely_by_lmi(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as error:
        export(artifacts / "int8", tmp_path / "out", engine="lmi")
    assert error.value.remedy == "choose --engine vllm"
    export(artifacts / "int8", tmp_path / "out")


AWS_IMAGES = "763104351884.dkr.ecr.us-east-1.amazonaws.com"


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("int4", f"{AWS_IMAGES}/vllm:0.29.0-gpu-py312-cu130-ubuntu24.04-sagemaker"),
        ("int8-g32", f"{AWS_IMAGES}/huggingface-vllm:0.29.0-transformers5.15.0-gpu-py312-cu130-ubuntu24.04-v1.0"),
        ("int8", "123456789012.dkr.ecr.us-east-1.amazonaws.com/vllm-openai:v0.28.0"),
        ("bf16", f"{AWS_IMAGES}/vllm:0.11.2-gpu-py312-cu129-ubuntu22.04-sagemaker"),
    ],
)
def test_an_image_whose_tag_tells_a_vllm_that_is_too_old_is_refused(
    artifacts: Path, tmp_path: Path, name: str, image: str
) -> None:
    with pytest.raises(Refused, match=f"vLLM of this image does not load {name}") as error:
        export(artifacts / name, tmp_path / "out", image=image)
    assert "--to hf" in str(error.value.remedy)
    export(artifacts / "mxfp4", tmp_path / "out", image=image)


def test_the_endpoint_lies_in_the_region_of_its_image(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images of the endpoint's own region"):
        export(artifacts / "mxfp4", tmp_path / "out", image=OWN, region="us-east-1")
    for number, (wishes, region) in enumerate(
        [
            ({"image": OWN}, "eu-west-1"),
            ({"image": OWN, "region": "eu-west-1"}, "eu-west-1"),
            ({"image": "registry.example/vllm:1", "region": "eu-north-1"}, "eu-north-1"),
            ({}, "us-east-1"),
        ]
    ):
        steps = export(artifacts / "mxfp4", tmp_path / str(number), **wishes).first_steps
        assert [f"--region {region} " in step for step in steps] == [True] * 3


def test_a_downloaded_releases_other_layouts_need_no_room(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original")
    monkeypatch.setattr(sagemaker_images, "SMALL_BYTES", size)
    export(folder, tmp_path / "out")
    (variant,) = requests_of(tmp_path / "out")["create_endpoint_config"]["ProductionVariants"]
    assert variant["InstanceType"] == sagemaker_images.SMALL_INSTANCE
    monkeypatch.setattr(sagemaker_images, "room", lambda instance: size)
    export(folder, tmp_path / "fits")


def test_a_gguf_is_refused_with_what_to_convert_to(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="sagemaker cannot serve") as error:
        export(artifacts / "m.gguf", tmp_path / "out")
    assert "--to hf" in str(error.value.remedy)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"engine": "tgi"}, "no such container"),
    ({"name": "under_score"}, "not a name"),
    ({"name": "a" * 64}, "not a name"),
    ({"bucket": "my-bucket"}, "not a place in S3"),
    ({"bucket": "s3://Upper/x"}, "not a place in S3"),
    ({"role": "role/x"}, "not an IAM role"),
    ({"region": "mars"}, "not a region"),
    ({"region": "cn-north-1"}, "not listed here"),
    ({"instance": "ml.new.4xlarge"}, "how many GPUs"),
    ({"context": 131072}, "no such context"),
    ({"image": "two words"}, "not the address"),
    ({"base_model": "openai/gpt-oss-20b"}, "means nothing"),
]


@pytest.mark.parametrize(("wishes", "message"), WRONG, ids=str)
def test_a_wish_that_makes_no_sense_is_a_usage_error(
    artifacts: Path, tmp_path: Path, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(artifacts / "mxfp4", tmp_path / "out", **wishes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", sagemaker.ENGINES)
def test_a_listed_image_gets_the_host_that_its_cuda_needs(artifacts: Path, tmp_path: Path, engine: str) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", engine=engine)
    (variant,) = requests_of(tmp_path / "out")["create_endpoint_config"]["ProductionVariants"]
    assert (
        variant["InferenceAmiVersion"]
        == sagemaker_images.IMAGES[engine].ami
        == "al2023-ami-sagemaker-inference-gpu-4-1"
    )


def test_the_images_of_a_region_are_its_own(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", region="eu-south-2")
    image = requests_of(tmp_path / "out")["create_model"]["PrimaryContainer"]["Image"]
    assert image.startswith("503227376785.dkr.ecr.eu-south-2.amazonaws.com/vllm:0.29.0-")


def test_the_archive_holds_what_the_prefix_would_and_is_the_same_every_time(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "prefix", engine="lmi")
    for name in "ab":
        export(artifacts / "mxfp4", tmp_path / name, engine="lmi", archive=True)
    assert (tmp_path / "a" / "model.tar.gz").read_bytes() == (tmp_path / "b" / "model.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a" / "model.tar.gz") as tar:
        assert all(member.isreg() for member in tar)
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = {path.name: path.read_bytes() for path in (tmp_path / "unpacked").iterdir()}
    assert unpacked == {path.name: path.read_bytes() for path in (tmp_path / "prefix" / "model").iterdir()}
    source = requests_of(tmp_path / "a")["create_model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"].endswith("/model.tar.gz")
    assert (source["S3DataType"], source["CompressionType"]) == ("S3Object", "Gzip")
    sums = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "a", check=False)
    assert sums.returncode == 0


def test_a_file_within_the_archive_is_checked_against_the_certificate(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "mxfp4", tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DigestMismatch):
        export(tmp_path / "mxfp4", tmp_path / "out", archive=True)
    assert not (tmp_path / "out").exists()


def test_a_killed_archive_is_written_again_and_a_whole_one_is_not(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, read = write._blocks, []

    def blocks(path: Path, size: int) -> Any:
        read.append(path.name)
        if len(read) == 4:
            raise KeyboardInterrupt
        return real(path, size)

    monkeypatch.setattr(write, "_blocks", blocks)
    with pytest.raises(KeyboardInterrupt):
        export(artifacts / "mxfp4", tmp_path / "out", archive=True)
    export(artifacts / "mxfp4", tmp_path / "out", archive=True)
    monkeypatch.undo()
    export(artifacts / "mxfp4", tmp_path / "whole", archive=True)
    assert (tmp_path / "out" / "model.tar.gz").read_bytes() == (tmp_path / "whole" / "model.tar.gz").read_bytes()


def test_another_tokenizer_leaves_the_network_open_and_says_what_to_place(artifacts: Path, tmp_path: Path) -> None:
    found = export(artifacts / "mxfp4", tmp_path / "out")
    assert requests_of(tmp_path / "out")["create_model"]["EnableNetworkIsolation"] is False
    (note,) = [note for note in found.document["notes"] if "network isolation is off" in note]
    assert "o200k_base.tiktoken" in note
    assert chat_files.VOCABULARY_SHA256 in note


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "lmi"])
def test_the_releases_tokenizer_gives_harmony_its_vocabulary_and_needs_no_network(
    true_artifact: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export(true_artifact, tmp_path / "out", engine=engine)
    model = requests_of(tmp_path / "out")["create_model"]
    assert model["EnableNetworkIsolation"] is True
    assert model["PrimaryContainer"]["Environment"]["TIKTOKEN_ENCODINGS_BASE"] == "/opt/ml/model"
    assert any("no network" in note for note in found.document["notes"])
    library = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")
    code = (
        "import openai_harmony as h\n"
        "e = h.load_harmony_encoding(h.HarmonyEncodingName.HARMONY_GPT_OSS)\n"
        "print(e.encode('<|start|>Grüße, 世界<|call|>', allowed_special='all'))\n"
    )
    assert library
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path / "out" / "model"))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: a download would fail
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    own = Tokenizer.from_file(str(tmp_path / "out" / "model" / "tokenizer.json"))
    assert json.loads(told.stdout) == own.encode("<|start|>Grüße, 世界<|call|>").ids


def linted(path: Path) -> tuple[int, str]:
    pytest.importorskip("cfnlint", reason="cfn-lint is not installed")
    # importable, so also startable: beside the interpreter, or as a module
    code = "import sys; from cfnlint.runner import main; sys.argv = ['cfn-lint', *sys.argv[1:]]; sys.exit(main())"
    told = subprocess.run(
        [sys.executable, "-P", "-c", code, "--regions", "us-east-1", "--", str(path)], capture_output=True, text=True, check=False
    )  # fmt: skip
    return told.returncode, told.stdout + told.stderr


@pytest.mark.parametrize("wishes", [{}, {"engine": "lmi", "archive": True}], ids=str)
def test_cfn_lint_finds_nothing_wrong_with_the_template(
    artifacts: Path, tmp_path: Path, wishes: dict[str, Any]
) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", **wishes)
    assert linted(tmp_path / "out" / "template.json") == (0, "")


SPOILT: list[Callable[[dict[str, Any]], None]] = [
    lambda t: t["Model"]["Properties"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"].update(
        CompressionType="Zip"
    ),
    lambda t: t["Model"]["Properties"].update(Colour="red"),
    lambda t: t["EndpointConfig"]["Properties"]["ProductionVariants"][0].update(InitialInstanceCount="many"),
    lambda t: t["Endpoint"]["Properties"].update(EndpointConfigName={"Ref": "Nothing"}),
]


@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_cfn_lint_finds_a_planted_error(artifacts: Path, tmp_path: Path, number: int) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    template = json.loads((tmp_path / "out" / "template.json").read_text())
    SPOILT[number](template["Resources"])
    (tmp_path / "spoilt.json").write_text(json.dumps(template))
    assert linted(tmp_path / "spoilt.json")[0] != 0


def test_the_template_has_no_default_where_that_would_be_a_placeholder(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    parameters = json.loads((tmp_path / "out" / "template.json").read_text())["Parameters"]
    assert {name for name, value in parameters.items() if "Default" not in value} == {"ExecutionRoleArn", "ModelData"}
    assert "replace-this" not in json.dumps(parameters)


def test_the_template_asks_for_what_the_requests_ask_for(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out", bucket="s3://my-bucket/mine", role=ROLE)
    template = json.loads((tmp_path / "out" / "template.json").read_text())
    defaults = {name: value["Default"] for name, value in template["Parameters"].items()}
    model = deepcopy(template["Resources"]["Model"]["Properties"])
    model["ExecutionRoleArn"] = defaults["ExecutionRoleArn"]
    model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] = defaults["ModelData"]
    requests = requests_of(tmp_path / "out")
    assert {**model, "ModelName": requests["create_model"]["ModelName"]} == requests["create_model"]
    (variant,) = template["Resources"]["EndpointConfig"]["Properties"]["ProductionVariants"]
    (asked,) = requests["create_endpoint_config"]["ProductionVariants"]
    assert {**variant, "ModelName": asked["ModelName"], "InstanceType": defaults["InstanceType"]} == asked


def old_machine(folder: Path) -> None:
    """moto's list of machines is old: it knows none that is exported for."""
    path = folder / "create_endpoint_config.json"
    request = json.loads(path.read_text())
    request["ProductionVariants"][0]["InstanceType"] = "ml.g4dn.12xlarge"
    path.write_text(json.dumps(request))


def deploy_of(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy", folder / "deploy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """moto's S3 with an empty bucket, and its SageMaker."""
    moto = pytest.importorskip("moto", reason="moto is not installed")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with moto.mock_aws():
        s3 = boto3.client("s3", region_name="us-east-1")
        s3.create_bucket(Bucket="my-bucket")
        yield s3, boto3.client("sagemaker", region_name="us-east-1")


GIVEN = ["--bucket", "s3://my-bucket/models/mine", "--role", ROLE]


@pytest.mark.parametrize("archive", [False, True])
def test_deploy_uploads_the_model_and_makes_the_endpoint(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], archive: bool
) -> None:
    s3, api = cloud
    export(artifacts / "mxfp4", tmp_path / "out", name="mine", archive=archive)
    old_machine(tmp_path / "out")
    assert deploy_of(tmp_path / "out").main(GIVEN) == 0
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket="my-bucket")["Contents"]]
    local = {f"models/mine/{p.name}": p for p in (tmp_path / "out" / "model").glob("*")}
    local = {"models/mine/model.tar.gz": tmp_path / "out" / "model.tar.gz"} if archive else local
    assert keys == sorted(local)
    for key, path in local.items():
        assert s3.get_object(Bucket="my-bucket", Key=key)["Body"].read() == path.read_bytes()
    endpoint = api.describe_endpoint(EndpointName="mine")
    assert endpoint["EndpointStatus"] == "InService"
    config = api.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    model = api.describe_model(ModelName=config["ProductionVariants"][0]["ModelName"])
    assert model["ExecutionRoleArn"] == ROLE
    source = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"] == "s3://my-bucket/models/mine/" + ("model.tar.gz" if archive else "")


def deployed(artifact: Path, out: Path) -> Any:
    """deploy.py of an export, run once."""
    export(artifact, out, name="mine")
    old_machine(out)
    module = deploy_of(out)
    assert module.main(GIVEN) == 0
    return module


def test_deploy_run_again_uploads_and_creates_nothing(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    s3, _ = cloud
    module = deployed(artifacts / "mxfp4", tmp_path / "out")
    capsys.readouterr()
    assert module.main(GIVEN) == 0
    out = capsys.readouterr().out
    assert "uploading" not in out
    assert "created" not in out
    assert "InService" in out
    s3.put_object(Bucket="my-bucket", Key="models/mine/config.json", Body=b"half")  # as a broken upload leaves it
    assert module.main(GIVEN) == 0
    assert capsys.readouterr().out.count("uploading") == 1


def test_deploy_says_what_stands_in_its_way(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    s3, api = cloud
    export(artifacts / "mxfp4", tmp_path / "out", name="mine")
    old_machine(tmp_path / "out")
    module = deploy_of(tmp_path / "out")

    def fails(given: list[str], message: str) -> None:
        assert module.main(given) == 1
        assert message in capsys.readouterr().err

    fails([], "give --bucket")
    fails(GIVEN[:2], "give --role")
    fails(["--bucket", "my-bucket", *GIVEN[2:]], "expected s3://BUCKET/PREFIX")
    fails([*GIVEN, "--region", "eu-west-1"], "export again with --region eu-west-1")
    fails(["--bucket", "s3://not-there/x", *GIVEN[2:]], "NoSuchBucket")
    assert module.main([*GIVEN, "--dry-run"]) == 0
    assert "Contents" not in s3.list_objects_v2(Bucket="my-bucket")
    s3.put_object(Bucket="my-bucket", Key="models/mine/other.safetensors", Body=b"x")
    fails(GIVEN, "other.safetensors")
    s3.delete_object(Bucket="my-bucket", Key="models/mine/other.safetensors")
    api.create_model(ModelName="mine", PrimaryContainer={"Image": "another"}, ExecutionRoleArn=ROLE)
    fails(GIVEN, "another model is called mine")


def test_deploy_uploads_nothing_that_is_damaged(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    s3, api = cloud
    export(artifacts / "mxfp4", tmp_path / "out", name="mine")
    path = tmp_path / "out" / "model" / "chat_template.jinja"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert deploy_of(tmp_path / "out").main(GIVEN) == 1
    assert "model/chat_template.jinja is not as it was exported" in capsys.readouterr().err
    assert s3.list_objects_v2(Bucket="my-bucket")["KeyCount"] == 0
    assert api.list_models()["Models"] == []


def test_deploy_leaves_the_files_of_another_export_as_they_are(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    s3, _ = cloud
    for name, context in (("first", 4096), ("second", 2048)):  # of LMI's settings only a file in the prefix tells
        export(artifacts / "mxfp4", tmp_path / name, name="mine", engine="lmi", context=context)
        old_machine(tmp_path / name)
    assert deploy_of(tmp_path / "first").main(GIVEN) == 0
    assert deploy_of(tmp_path / "second").main(GIVEN) == 1
    assert "serving.properties is of another export" in capsys.readouterr().err
    there = s3.get_object(Bucket="my-bucket", Key="models/mine/serving.properties")["Body"].read()
    assert there == (tmp_path / "first" / "model" / "serving.properties").read_bytes()


def test_deploy_tells_another_configuration_of_the_name(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, api = cloud
    module = deployed(artifacts / "mxfp4", tmp_path / "out")
    (variant,) = requests_of(tmp_path / "out")["create_endpoint_config"]["ProductionVariants"]
    second = {**variant, "VariantName": "Second"}
    for variants, difference in (
        ([{**variant, "InitialInstanceCount": 2}], "ProductionVariants[0].InitialInstanceCount is 2, not 1"),
        ([variant, second], "ProductionVariants is "),
    ):
        api.delete_endpoint_config(EndpointConfigName="mine")
        api.create_endpoint_config(EndpointConfigName="mine", ProductionVariants=variants)
        assert module.main(GIVEN) == 1
        assert f"another endpoint_config is called mine: its {difference}" in capsys.readouterr().err


def test_deploy_tells_why_an_upload_failed(
    artifacts: Path, tmp_path: Path, cloud: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from boto3.exceptions import S3UploadFailedError

    export(artifacts / "mxfp4", tmp_path / "out", archive=True)
    module = deploy_of(tmp_path / "out")
    assert module.main(["--bucket", "s3://not-there/x", *GIVEN[2:]]) == 1
    assert "NoSuchBucket" in capsys.readouterr().err

    def refuses(*_: object) -> None:
        raise S3UploadFailedError("AccessDenied")  # as boto3 wraps what PutObject answers

    module.upload = refuses
    assert module.main(GIVEN) == 1
    assert capsys.readouterr().err == "deploy.py: AccessDenied\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "create_model.json is not JSON"),
        ("[]", "create_model.json lacks"),
        ('{"ModelName": "x"}', "PrimaryContainer"),
        (
            '{"ModelName": 1, "PrimaryContainer": {"Image": "i", "ModelDataSource": {"S3DataSource": {"S3Uri": "s3://a/b/", '
            '"CompressionType": "None"}}}, "ExecutionRoleArn": "r"}',
            "must be text",
        ),
    ],
)
def test_deploy_tells_which_request_was_spoilt(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, what: str
) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    (tmp_path / "out" / "create_model.json").write_text(text)
    assert deploy_of(tmp_path / "out").main([*GIVEN, "--dry-run"]) == 1
    assert what in capsys.readouterr().err


def test_deploy_tells_why_an_endpoint_failed(artifacts: Path, tmp_path: Path) -> None:
    from botocore.exceptions import WaiterError

    class Failing:
        """SageMaker as it answers when a container does not start."""

        def describe_endpoint(self, EndpointName: str) -> dict[str, str]:
            return {
                "EndpointName": EndpointName,
                "EndpointConfigName": EndpointName,
                "EndpointStatus": "Failed",
                "FailureReason": "no capacity",
            }

        def get_waiter(self, _: str) -> Failing:
            return self

        def wait(self, EndpointName: str) -> None:
            raise WaiterError(name=EndpointName, reason="terminal failure", last_response={})

    export(artifacts / "mxfp4", tmp_path / "out", name="mine")
    module = deploy_of(tmp_path / "out")
    requests = {name.removeprefix("create_"): request for name, request in requests_of(tmp_path / "out").items()}
    api: Any = Failing()
    api.describe_model = lambda ModelName: requests["model"]
    api.describe_endpoint_config = lambda EndpointConfigName: requests["endpoint_config"]
    with pytest.raises(module.Problem, match="no capacity"):
        module.create(api, requests, wait=True)


def test_deploy_runs_as_a_program_of_its_own(artifacts: Path, tmp_path: Path) -> None:
    export(artifacts / "mxfp4", tmp_path / "out")
    command = [sys.executable, "-P", "-I", str(tmp_path / "out" / "deploy.py")]
    assert (tmp_path / "out" / "deploy.py").stat().st_mode & 0o111
    told = subprocess.run([*command, *GIVEN, "--dry-run"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "Traceback" not in told.stderr


def test_weights_that_do_not_fit_on_the_machine_are_refused_and_larger_ones_get_a_larger_machine(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in (artifacts / "int8").glob("*.safetensors"))
    monkeypatch.setattr(sagemaker_images, "SMALL_BYTES", size - 1)
    export(artifacts / "int8", tmp_path / "large")
    (variant,) = requests_of(tmp_path / "large")["create_endpoint_config"]["ProductionVariants"]
    assert variant["InstanceType"] == sagemaker_images.LARGE_INSTANCE
    assert settings(tmp_path / "large")["SM_VLLM_TENSOR_PARALLEL_SIZE"] == "8"
    monkeypatch.setitem(sagemaker_images._GB, "g5", 0)
    with pytest.raises(Refused, match="do not fit") as error:
        export(artifacts / "int8", tmp_path / "out", instance="ml.g5.xlarge")
    assert "larger --instance" in str(error.value.remedy)


@pytest.mark.parametrize(
    ("gb", "instance", "fits"),
    [
        (13.8, "ml.g5.xlarge", True),
        (22.2, "ml.g5.xlarge", False),
        (65.3, "ml.g6e.xlarge", False),
        (65.3, "ml.g6e.12xlarge", True),
        (118.2, "ml.g7e.2xlarge", False),
        (233.7, "ml.p4d.24xlarge", True),
    ],
)
def test_a_machine_is_refused_where_the_weights_exceed_nine_tenths_of_its_memory(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb: float, instance: str, fits: bool
) -> None:
    monkeypatch.setattr(sagemaker, "weight_bytes", lambda artifact: int(gb * 1e9))
    if fits:
        export(artifacts / "mxfp4", tmp_path / "out", instance=instance)
    else:
        with pytest.raises(Refused, match="do not fit"):
            export(artifacts / "mxfp4", tmp_path / "out", instance=instance)


def test_the_releases_fit_where_they_are_put() -> None:
    for size in (13_761_264_768, 22_110_000_000, 41_829_514_368, 65_248_815_744, 118_200_000_000, 233_658_313_344):
        small = size <= sagemaker_images.SMALL_BYTES
        room = sagemaker_images.room(sagemaker_images.SMALL_INSTANCE if small else sagemaker_images.LARGE_INSTANCE)
        assert room is not None
        assert size < room


def test_every_image_and_floor_says_where_it_was_read() -> None:
    for image in sagemaker_images.IMAGES.values():
        assert "2026-11-22" in image.source
    assert all(floor.source for floor in vllm.SERVED.values())
    assert set(sagemaker_images.IMAGES) == set(sagemaker.ENGINES)

"""Bedrock's Custom Model Import: the files of its prefix, the index as it wants it, and the request judged by botocore."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.aws_requests import problems
from support.checkpoints import Model, write_bf16

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.exports import bedrock, write
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import Refused, UsageError

ROLE = "arn:aws:iam::123456789012:role/Bedrock"
SHARDS = 300_000


@pytest.fixture(scope="module")
def sharded(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "bf16"
    convert(hf_folder, folder, Options("bf16", split_bytes=SHARDS), silent)
    return folder


def export(path: Path, target: Path, **wishes: Any) -> write.Exported:
    return write.export(path, target, "bedrock", Request(**wishes), show=silent)


def request_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "create_model_import_job.json").read_text())
    return found


def test_the_prefix_holds_the_documented_files_and_no_others(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "bf16")
    (tmp_path / "bf16" / "metal").mkdir()
    (tmp_path / "bf16" / "metal" / "model.txt").write_text("not for Bedrock")
    (tmp_path / "bf16" / "original").mkdir()
    shutil.copy(next(sharded.glob("*.safetensors")), tmp_path / "bf16" / "original" / "model.safetensors")
    export(tmp_path / "bf16", tmp_path / "out")
    model = tmp_path / "out" / "model"
    found = {path.relative_to(model).as_posix() for path in model.rglob("*")}
    shards = {path.name for path in sharded.glob("*.safetensors")}
    assert len(shards) > 1
    assert found == shards | {*bedrock.CARRIED, bedrock.INDEX}
    for name in found:
        assert (model / name).read_bytes() == (sharded / name).read_bytes()


def test_the_index_names_every_tensor_and_its_metadata_is_the_total_size_alone(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "bf16")
    path = tmp_path / "bf16" / bedrock.INDEX
    index = json.loads(path.read_text())
    total = index["metadata"]["total_size"]
    for metadata in ({"total_parameters": 5, "total_size": total}, {"total_size": 1}, None):
        path.write_text(
            json.dumps({**index, "metadata": metadata} if metadata else {"weight_map": index["weight_map"]})
        )
        (tmp_path / "bf16" / "gptoss-certificate.json").unlink(missing_ok=True)
        found = export(tmp_path / "bf16", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "model" / bedrock.INDEX).read_text()) == index
        assert any("total_size alone" in note for note in found.document["notes"])
        shutil.rmtree(tmp_path / "out")


def test_transformers_loads_what_is_uploaded(sharded: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    export(sharded, tmp_path / "out")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True, dtype="bfloat16"
    )
    assert not any(loading.values())
    assert model.dtype.is_floating_point


@pytest.mark.parametrize(
    "wishes",
    [{}, {"bucket": "s3://my-bucket", "role": ROLE}, {"bucket": "s3://b.b/a/c", "name": "x_1", "region": "us-east-1"}],
    ids=str,
)
def test_aws_finds_nothing_wrong_with_the_request(sharded: Path, tmp_path: Path, wishes: dict[str, Any]) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    pytest.importorskip("botocore", reason="botocore is not installed")
    found = export(sharded, tmp_path / "out", **wishes)
    assert problems("bedrock", "CreateModelImportJob", request_of(tmp_path / "out")) == []
    assert any("must be replaced" in note for note in found.document["notes"]) == ("role" not in wishes)
    assert any("not established" in note for note in found.document["notes"])


def test_no_step_deletes_what_lies_in_the_bucket_already(sharded: Path, tmp_path: Path) -> None:
    steps = export(sharded, tmp_path / "out", bucket="s3://my-bucket/shared", role=ROLE).first_steps
    assert not any("delete" in step for step in steps)
    assert [step.partition(" (")[0] for step in steps[:3]] == [
        "sha256sum --quiet -c SHA256SUMS",
        "aws s3 ls s3://my-bucket/shared/ --recursive --region us-east-1",
        "aws s3 sync model s3://my-bucket/shared/ --region us-east-1",
    ]


def test_a_prefix_with_signs_of_the_shell_reaches_the_commands_whole(sharded: Path, tmp_path: Path) -> None:
    place = "s3://my-bucket/a'b(c)*!/"
    found = export(sharded, tmp_path / "out", bucket=place)
    assert request_of(tmp_path / "out")["modelDataSource"]["s3DataSource"]["s3Uri"] == place
    commands = [step.partition(" (")[0] if " (" in step else step for step in found.first_steps]
    assert [place in shlex.split(command) for command in commands] == [False, True, True, False, False]


@pytest.mark.parametrize("name", ["a" * 63, "a" * 55 + "_" + "b" * 7])
def test_the_name_of_the_job_is_cut_to_what_aws_takes(sharded: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    pytest.importorskip("botocore", reason="botocore is not installed")
    export(sharded, tmp_path / "out", name=name)
    assert problems("bedrock", "CreateModelImportJob", request_of(tmp_path / "out")) == []


PLANTED: list[tuple[str, Any]] = [
    ("jobName", "a_job"),
    ("importedModelName", "a" * 64),
    ("importedModelName", "a--b"),
    ("roleArn", "a-role"),
    ("modelDataSource", {}),
    ("modelDataSource", {"s3DataSource": {"s3Uri": "s3://Upper/x"}}),
    ("modelDataSource", {"s3DataSource": {"uri": "s3://bucket/x"}}),
    ("extra", "x"),
]


@pytest.mark.parametrize(("key", "value"), PLANTED, ids=str)
def test_a_planted_error_is_found(sharded: Path, tmp_path: Path, key: str, value: Any) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    pytest.importorskip("botocore", reason="botocore is not installed")
    export(sharded, tmp_path / "out")
    assert problems("bedrock", "CreateModelImportJob", {**request_of(tmp_path / "out"), key: value})


def test_a_model_in_one_file_is_refused_with_the_option_that_divides_it(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "one", Options("bf16"), silent)
    with pytest.raises(Refused, match="numbered shards") as error:
        export(tmp_path / "one", tmp_path / "out")
    assert "--to bf16 --split-size" in str(error.value.remedy)


@pytest.mark.parametrize("to", ["hf", "int4", "int8", "gguf"])
def test_anything_but_bf16_is_refused_with_what_to_convert_to(hf_folder: Path, tmp_path: Path, to: str) -> None:
    artifact = tmp_path / ("m.gguf" if to == "gguf" else "m")
    convert(hf_folder, artifact, Options(to), silent)
    with pytest.raises(Refused, match="not documented") as error:
        export(artifact, tmp_path / "out")
    assert "--to bf16" in str(error.value.remedy)


def test_weights_over_the_limit_are_refused(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    monkeypatch.setattr(bedrock, "MAX_BYTES", size + 1)
    export(sharded, tmp_path / "fits")
    monkeypatch.setattr(bedrock, "MAX_BYTES", size)
    with pytest.raises(Refused, match="larger than what bedrock imports") as error:
        export(sharded, tmp_path / "out")
    assert "sagemaker" in str(error.value.remedy)


def test_the_released_120b_in_bf16_is_over_the_limit_and_20b_is_not() -> None:
    assert 41_829_514_368 < bedrock.MAX_BYTES < 233_658_313_344


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_model_that_could_not_chat_is_refused(sharded: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(sharded, tmp_path / "bf16")
    (tmp_path / "bf16" / name).unlink()
    with pytest.raises(Refused, match="cannot hold a conversation"):
        export(tmp_path / "bf16", tmp_path / "out")


def test_a_special_tokens_map_is_made_where_there_is_none(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "bf16")
    path = tmp_path / "bf16" / "special_tokens_map.json"
    table = json.loads(path.read_text())
    path.unlink()
    found = export(tmp_path / "bf16", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model" / path.name).read_text()) == table
    assert any("special_tokens_map.json is made" in note for note in found.document["notes"])


def test_a_rope_in_transformers_5s_spelling_is_spelled_for_4_too(
    small_model: Model, tmp_path: Path, sharded: Path
) -> None:
    write_bf16(small_model, tmp_path / "theirs", "parameters")
    shutil.copytree(sharded, tmp_path / "bf16")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_scaling" not in theirs
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "bf16" / "config.json")
    (tmp_path / "bf16" / "gptoss-certificate.json").unlink()
    export(tmp_path / "bf16", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert {key: made[key] for key in theirs} == theirs
    rope = dict(theirs["rope_parameters"])
    assert made["rope_theta"] == rope.pop("rope_theta")
    assert {key: made["rope_scaling"][key] for key in rope} == rope


def test_another_region_and_strange_names_are_usage_errors(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one region only"):
        export(sharded, tmp_path / "out", region="eu-west-1")
    with pytest.raises(UsageError, match="not a name"):
        export(sharded, tmp_path / "out", name="a b")
    with pytest.raises(UsageError, match="means nothing"):
        export(sharded, tmp_path / "out", instance="ml.p5.48xlarge")

"""The Azure ML package: judged by azure-ai-ml's loaders, by mlflow, by shellcheck, and its scripts really run beside stubs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.other_python import NoOtherPython, other_python, run_there
from support.shell import require_sound, shellcheck
from transformers import AutoTokenizer

from gptoss_convert.convert.exports import azureml, vllm, write
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import Refused, UsageError

ROOT = Path(__file__).parents[3]
Kinds = Callable[[str], Path]
CHAT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

LOAD = """
import json, sys
from azure.ai.ml import load_environment, load_model, load_online_deployment, load_online_endpoint
loaders = {"model": load_model, "environment": load_environment, "endpoint": load_online_endpoint,
           "deployment": load_online_deployment}
answers = []
for kind, path in json.loads(sys.argv[1]):
    try:
        found = loaders[kind](path)
        answers.append([None, found._to_dict()])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""
MLFLOW = """
import json, sys
paths, packages, question = json.loads(sys.argv[1])
sys.path.append(packages)  # torch and transformers, which the other interpreter does not have
from mlflow.models import Model
import mlflow.pyfunc
import io
import pandas
answers = []
for path in paths:
    try:
        model = Model.load(path)
        table = pandas.read_json(io.StringIO(json.dumps(question)), orient="split", dtype=False)  # as Azure's script does
        answer = mlflow.pyfunc.load_model(path).predict(table)
        answers.append([sorted(model.flavors), model.signature, answer])
    except Exception as error:
        answers.append(repr(error))
print(json.dumps(answers))
"""


def export(path: Path, target: Path, **wishes: Any) -> write.Exported:
    return write.export(path, target, "azureml", Request(**wishes), show=silent)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def packed(kinds: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("azureml") / "int4"
    export(kinds("int4"), folder)
    return folder


@pytest.fixture(scope="module")
def mlflow_form(kinds: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("azureml") / "mlflow"
    export(kinds("bf16"), folder, engine="mlflow")
    return folder


def python_with(modules: str) -> Path:
    try:
        return other_python(ROOT, modules)
    except NoOtherPython as reason:
        pytest.skip(str(reason))


def stub(folder: Path, name: str, text: str) -> dict[str, str]:
    """A program put first on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + text)
    (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_azures_own_loaders_accept_every_file_of_every_kind(kinds: Kinds, tmp_path: Path) -> None:
    python = python_with("azure.ai.ml")
    names, files = ("model", "environment", "endpoint", "deployment"), []
    for kind in vllm.SERVED:
        export(kinds(kind), tmp_path / kind, name="my-model", context=4096)
        files += [(name, str(tmp_path / kind / f"{name}.yml")) for name in names]
    answers = run_there(python, LOAD, files)
    assert len(answers) == 20
    assert [answer for answer in answers if answer[0] is not None] == []
    for kind, loaded in zip(vllm.SERVED, (answers[i : i + 4] for i in range(0, 20, 4)), strict=True):
        model, environment, endpoint, deployment = (found for _, found in loaded)
        assert (model["type"], model["name"], model["tags"]["kind"]) == ("custom_model", "my-model", kind)
        assert environment["inference_config"]["liveness_route"] == {"port": vllm.PORT, "path": "/health"}
        assert (endpoint["name"], endpoint["auth_mode"]) == ("my-model", "key")
        assert "--max-model-len 4096" in deployment["environment_variables"]["SERVE_ARGUMENTS"]


def test_azures_own_loaders_accept_the_mlflow_form(mlflow_form: Path) -> None:
    python = python_with("azure.ai.ml")
    assert not (mlflow_form / "environment.yml").exists()
    files = [(name, str(mlflow_form / f"{name}.yml")) for name in ("model", "endpoint", "deployment")]
    answers = run_there(python, LOAD, files)
    assert [error for error, _ in answers] == [None] * 3, answers
    assert answers[0][1]["type"] == "mlflow_model"


PLANTED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("model", lambda d: d.update(type="vllm_model")),
    ("model", lambda d: d.update(folder="model")),
    ("environment", lambda d: d["inference_config"]["liveness_route"].pop("path")),
    ("environment", lambda d: d["inference_config"].update(health_route={"port": 1, "path": "/"})),
    ("environment", lambda d: d["inference_config"]["scoring_route"].update(port="vllm")),
    ("environment", lambda d: d["build"].update(file="Dockerfile")),
    ("endpoint", lambda d: d.update(auth_mode="password")),
    ("endpoint", lambda d: d.pop("name")),
    ("deployment", lambda d: d.update(gpus=2)),
    ("deployment", lambda d: d.update(instance_count="many")),
    ("deployment", lambda d: d["request_settings"].update(timeout=5)),
    ("deployment", lambda d: d["liveness_probe"].update(period="often")),
    ("deployment", lambda d: d.pop("name")),
]


def test_azures_own_loaders_report_every_planted_error(packed: Path, tmp_path: Path) -> None:
    python = python_with("azure.ai.ml")
    files = []
    for number, (name, spoil) in enumerate(PLANTED):
        folder = tmp_path / str(number)
        folder.mkdir()
        for beside in ("model", "environment"):
            (folder / beside).symlink_to(packed / beside)
        document = read(packed / f"{name}.yml")
        spoil(document)
        (folder / f"{name}.yml").write_text(yaml.safe_dump(document))
        files.append((name, str(folder / f"{name}.yml")))
    answers = run_there(python, LOAD, files)
    missed = [number for number, (error, _) in enumerate(answers) if error is None]
    assert missed == [], [files[number] for number in missed]


def test_the_files_name_each_other(packed: Path) -> None:
    model, environment, endpoint, deployment = (
        read(packed / f"{name}.yml") for name in ("model", "environment", "endpoint", "deployment")
    )
    assert deployment["model"] == f"azureml:{model['name']}:{model['version']}"
    assert deployment["environment"] == f"azureml:{environment['name']}:{environment['version']}"
    assert deployment["endpoint_name"] == endpoint["name"]
    assert deployment["environment_variables"]["MODEL_ROOT"] == deployment["model_mount_path"]
    assert (packed / model["path"]).is_dir()
    assert (packed / environment["build"]["path"] / environment["build"]["dockerfile_path"]).is_file()
    assert json.loads((packed / "request.json").read_text())["model"] == endpoint["name"]
    routes = environment["inference_config"]
    assert {route["port"] for route in routes.values()} == {vllm.PORT}
    assert (routes["liveness_route"]["path"], routes["scoring_route"]["path"]) == ("/health", "/")


def test_the_tokenizer_the_template_and_the_end_tokens_are_the_artifacts_own(
    kinds: Kinds, packed: Path, mlflow_form: Path
) -> None:
    for name in CHAT:
        assert (packed / "model" / name).read_bytes() == (kinds("int4") / name).read_bytes()
        assert (mlflow_form / "model/model" / name).read_bytes() == (kinds("bf16") / name).read_bytes()
    for name in CHAT[:3]:
        assert (mlflow_form / "model/components/tokenizer" / name).read_bytes() == (kinds("bf16") / name).read_bytes()


def test_the_dockerfile_starts_the_entry_point_and_copies_only_what_is_there(packed: Path) -> None:
    lines = (packed / "environment/Dockerfile").read_text().splitlines()
    assert lines[0] == f"FROM {vllm.IMAGE}"
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert copied == ["serve.sh"]
    assert all((packed / "environment" / name).is_file() for name in copied)
    assert lines[-2:] == ['ENTRYPOINT ["/opt/serve.sh"]', "CMD []"]
    assert os.access(packed / "environment/serve.sh", os.X_OK)


def test_the_vocabulary_of_the_chat_parser_goes_into_the_image(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azureml, "harmony_vocabulary", lambda table: b"IQ== 0\n")
    found = export(kinds("int4"), tmp_path / "out")
    text = (tmp_path / "out/environment/Dockerfile").read_text()
    assert (tmp_path / "out/environment/o200k_base.tiktoken").read_bytes() == b"IQ== 0\n"
    assert (
        "COPY o200k_base.tiktoken /opt/encodings/o200k_base.tiktoken\nENV TIKTOKEN_ENCODINGS_BASE=/opt/encodings"
        in text
    )
    assert not any("internet" in note for note in found.document["notes"])


@pytest.mark.parametrize("below", [".", "gpt-oss/1", "gpt-oss/1/model"])
def test_the_entry_point_really_starts_vllm_on_the_mounted_model(packed: Path, tmp_path: Path, below: str) -> None:
    environment = stub(tmp_path / "bin", "vllm", 'printf "%s\\n" "$@"\n')
    mounted = tmp_path / "mount" / below
    mounted.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(packed / "model", mounted, dirs_exist_ok=True)
    deployment = read(packed / "deployment.yml")["environment_variables"]
    environment |= deployment | {"MODEL_ROOT": str(tmp_path / "mount")}
    found = subprocess.run(
        [packed / "environment/serve.sh"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found[0] == "serve"
    assert Path(found[1]).resolve() == mounted.resolve()
    assert found[2:] == shlex.split(deployment["SERVE_ARGUMENTS"])
    assert found[2:6] == ["--served-model-name", "gpt-oss", "--host", "0.0.0.0"]
    assert found[-2:] == ["--moe-backend", "humming"]


def test_the_entry_point_takes_the_topmost_config_for_the_models(packed: Path, tmp_path: Path) -> None:
    environment = stub(tmp_path / "bin", "vllm", 'printf "%s\\n" "$@"\n') | {"MODEL_ROOT": str(tmp_path / "mount")}
    shutil.copytree(packed / "model", tmp_path / "mount/gpt-oss/1/model")
    for name in ("assets", "assets/deep"):
        (tmp_path / "mount/gpt-oss/1/model" / name).mkdir()
        (tmp_path / "mount/gpt-oss/1/model" / name / "config.json").write_text("{}")
    found = subprocess.run(
        [packed / "environment/serve.sh"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == ["serve", str(tmp_path / "mount/gpt-oss/1/model")]


@pytest.mark.parametrize("configs", [[], ["a/config.json", "b/config.json"]])
def test_the_entry_point_says_why_it_cannot_start(packed: Path, tmp_path: Path, configs: list[str]) -> None:
    environment = stub(tmp_path / "bin", "vllm", "exit 0\n") | {"MODEL_ROOT": str(tmp_path / "mount")}
    (tmp_path / "mount").mkdir()
    for name in configs:
        (tmp_path / "mount" / name).parent.mkdir()
        (tmp_path / "mount" / name).write_text("{}")
    found = subprocess.run(
        [packed / "environment/serve.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert f"{len(configs)} files config.json" in found.stderr


# Remembers what was created, with its tag; a file `state` or `traffic` in its folder says otherwise than Succeeded and 100.
AZ = """
printf '%s\\n' "$*" >> "$LOG"
read -r _ what verb _ <<<"$*"
told() { if [ -f "$AZURE/$1" ]; then cat "$AZURE/$1"; else echo "$2"; fi; }
case "$verb" in
  create)
    content=$(grep -o 'tags.content=[0-9a-f]*' <<<"$*") || true
    echo "${content#tags.content=}" > "$AZURE/$what" ;;
  update) rm "$AZURE/traffic" ;;
  show)
    if ! [ -f "$AZURE/$what" ]; then echo "no such $what" >&2; exit 3; fi
    case "$*" in
      *tags.content*) cat "$AZURE/$what" ;;
      *provisioning_state*) told state Succeeded ;;
      *traffic.blue*) told traffic 100 ;;
      *scoring_uri*) echo https://address ;;
    esac ;;
esac
"""


def deploy(folder: Path, tmp_path: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The exit status of deploy.sh, what it told az, and what it printed; what az has made lies in tmp_path/azure."""
    log, azure = tmp_path / "log", tmp_path / "azure"
    log.unlink(missing_ok=True)
    azure.mkdir(exist_ok=True)
    environment = stub(tmp_path / "bin", "az", AZ) | {"LOG": str(log), "AZURE": str(azure)}
    found = subprocess.run(
        [folder / "deploy.sh", *(arguments or "sgw")], env=environment, check=False, capture_output=True, text=True
    )
    return found.returncode, log.read_text().splitlines() if log.exists() else [], found.stdout + found.stderr


WHERE = "--subscription s --resource-group g --workspace-name w"


def test_deploy_makes_what_is_missing_in_order_and_leaves_what_is_there(packed: Path, tmp_path: Path) -> None:
    status, said, printed = deploy(packed, tmp_path)
    assert (status, printed) == (0, "https://address\n")
    assert all(line.startswith("ml ") and WHERE in line for line in said)
    made = [line.replace(f" {WHERE}", "") for line in said if " create " in line]
    assert [re.sub("[0-9a-f]{32}", "…", line) for line in made] == [
        "ml model create --file model.yml --set tags.content=…",
        "ml environment create --file environment.yml --set tags.content=…",
        "ml online-endpoint create --file endpoint.yml",
        "ml online-deployment create --file deployment.yml --set tags.content=… --all-traffic",
    ]
    status, said, printed = deploy(packed, tmp_path)
    assert (status, printed) == (0, "https://address\n")
    assert not [line for line in said if " create " in line or " update " in line]
    (tmp_path / "azure" / "environment").unlink()
    assert [line.split()[1] for line in deploy(packed, tmp_path)[1] if " create " in line] == ["environment"]


def test_the_tag_that_deploy_sets_is_in_every_asset_that_has_one(packed: Path) -> None:
    for name in ("model", "environment", "deployment"):
        assert "content" in read(packed / f"{name}.yml")["tags"]


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("model", "model/chat_template.jinja"),
        ("environment", "environment/Dockerfile"),
        ("environment", "environment.yml"),
        ("online-deployment", "deployment.yml"),
    ],
)
def test_deploy_says_no_to_another_thing_of_the_same_name(packed: Path, tmp_path: Path, what: str, file: str) -> None:
    assert deploy(packed, tmp_path)[0] == 0
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    sums = (other / "SHA256SUMS").read_text()
    before = hashlib.sha256((other / file).read_bytes()).hexdigest()
    (other / file).write_text((other / file).read_text() + "\n# another\n")
    after = hashlib.sha256((other / file).read_bytes()).hexdigest()
    (other / "SHA256SUMS").write_text(sums.replace(before, after))
    status, said, printed = deploy(other, tmp_path)
    assert status == 1
    assert f"another {what} is called so" in printed
    assert "https://address" not in printed
    assert not [line for line in said if " create " in line or " update " in line]


def test_deploy_does_not_take_a_failed_or_unfinished_deployment_for_done(packed: Path, tmp_path: Path) -> None:
    assert deploy(packed, tmp_path)[0] == 0
    for state in ("Failed", "Creating"):
        (tmp_path / "azure" / "state").write_text(f"{state}\n")
        status, _, printed = deploy(packed, tmp_path)
        assert status == 1
        assert f"the deployment blue is {state}" in printed
        assert "https://address" not in printed


@pytest.mark.parametrize("traffic", ["0", "", "None"])
def test_deploy_gives_a_deployment_that_was_left_without_traffic_all_of_it(
    packed: Path, tmp_path: Path, traffic: str
) -> None:
    assert deploy(packed, tmp_path)[0] == 0
    (tmp_path / "azure" / "traffic").write_text(f"{traffic}\n")
    status, said, _ = deploy(packed, tmp_path)
    assert status == 0
    assert [line for line in said if " update " in line] == [
        f"ml online-endpoint update --name gpt-oss --traffic blue=100 {WHERE}"
    ]
    (tmp_path / "azure" / "traffic").write_text("50\n")  # a person's own division stays
    assert not [line for line in deploy(packed, tmp_path)[1] if " update " in line]


def test_the_mlflow_form_is_deployed_without_an_environment(mlflow_form: Path, tmp_path: Path) -> None:
    status, said, _ = deploy(mlflow_form, tmp_path)
    assert status == 0
    assert [line.split()[1] for line in said if " create " in line] == ["model", "online-endpoint", "online-deployment"]
    assert not any("environment" in line for line in said)


def test_deploy_uploads_nothing_that_is_damaged_and_wants_three_arguments(packed: Path, tmp_path: Path) -> None:
    assert deploy(packed, tmp_path, "s", "g")[:2] == (64, [])
    spoiled = Path(shutil.copytree(packed, tmp_path / "spoiled"))
    (spoiled / "deployment.yml").write_text((packed / "deployment.yml").read_text() + "# mine\n")
    assert deploy(spoiled, tmp_path)[0] == 0  # the settings are the person's to change
    (spoiled / "model/chat_template.jinja").write_text("another")
    assert deploy(spoiled, tmp_path)[:2] == (1, [])


def test_the_scripts_are_sound_shell(packed: Path, mlflow_form: Path, tmp_path: Path) -> None:
    for script in (packed / "deploy.sh", packed / "environment/serve.sh", mlflow_form / "deploy.sh"):
        require_sound(script)
        assert "@" not in script.read_text().replace("$@", "").replace("[@]", "")
        assert "set -euo pipefail" in script.read_text()
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1/x\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh")


def test_mlflow_loads_the_folder_and_chats_through_the_template(mlflow_form: Path, kinds: Kinds) -> None:
    python = python_with("mlflow, pandas")
    packages = sysconfig.get_path("purelib")
    question = json.loads((mlflow_form / "request.json").read_text())["input_data"]
    question["data"][0][1] = 4  # of max_tokens
    ((flavors, signature, answer),) = run_there(python, MLFLOW, [[str(mlflow_form / "model")], packages, question])
    assert flavors == ["python_function", "transformers"]
    assert signature is None  # Azure's scoring script would make a sample of it, and knows no arrays
    (answer,) = answer
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 4
    tokenizer = AutoTokenizer.from_pretrained(kinds("bf16"))
    asked = tokenizer.apply_chat_template(question["data"][0][0], add_generation_prompt=True, tokenize=False)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(asked)["input_ids"])


SPOILED: list[Callable[[dict[str, Any]], Any]] = [
    lambda d: d.update(signature={"inputs": '[{"name": "messages"}]', "outputs": None, "params": None}),
    lambda d: d["flavors"]["transformers"].update(model_binary="weights"),
    lambda d: d["flavors"]["transformers"].update(components=["tokeniser"]),
    lambda d: d["flavors"]["transformers"].update(task="chat"),
    lambda d: d["flavors"]["transformers"].update(inference_task="llm/v1/talk"),
    lambda d: d["flavors"]["python_function"].update(loader_module="mlflow.transformer"),
]


def test_mlflow_reports_what_is_wrong_in_an_mlmodel(mlflow_form: Path, tmp_path: Path) -> None:
    python = python_with("mlflow, pandas")
    folders = []
    for number, spoil in enumerate([lambda d: None, *SPOILED]):
        folder = tmp_path / str(number)
        shutil.copytree(mlflow_form / "model", folder)
        document = read(folder / "MLmodel")
        spoil(document)
        (folder / "MLmodel").write_text(yaml.safe_dump(document))
        folders.append(str(folder))
    question = {"columns": ["messages", "max_tokens"], "index": [0], "data": [[[{"role": "user", "content": "Hi"}], 4]]}
    answers = run_there(python, MLFLOW, [folders, sysconfig.get_path("purelib"), question])
    assert [isinstance(answer, str) for answer in answers] == [False] + [True] * len(SPOILED), answers


def test_mlflow_is_told_to_use_all_gpus_of_the_machine(mlflow_form: Path) -> None:
    assert read(mlflow_form / "deployment.yml")["environment_variables"] == {
        "MLFLOW_HUGGINGFACE_USE_DEVICE_MAP": "true"
    }
    code = (
        "from mlflow.environment_variables import MLFLOW_HUGGINGFACE_USE_DEVICE_MAP as variable\n"
        "import json, os\n"
        "os.environ['MLFLOW_HUGGINGFACE_USE_DEVICE_MAP'] = 'true'\n"
        "print(json.dumps(variable.get()))\n"
    )
    assert run_there(python_with("mlflow, pandas"), code, None) is True


def test_the_mlflow_form_lists_what_it_needs(mlflow_form: Path) -> None:
    packages = (mlflow_form / "model/requirements.txt").read_text().split()
    conda = read(mlflow_form / "model/conda.yaml")
    assert conda["dependencies"][-1] == {"pip": packages}
    flavor = read(mlflow_form / "model/MLmodel")["flavors"]["transformers"]
    assert f"transformers=={flavor['transformers_version']}" in packages


@pytest.mark.parametrize(
    ("kind", "wishes", "words", "remedy"),
    [
        ("gguf", {}, "azureml cannot serve this artifact: vLLM has no", "--to hf"),
        ("int4", {"image": "vllm/vllm-openai:v0.30.0"}, "does not load int4", vllm.IMAGE),
        ("int8", {"image": "vllm/vllm-openai:v0.28.0"}, "does not load int8", vllm.IMAGE),
        ("int4", {"engine": "mlflow"}, "stock transformers", "--to bf16"),
        ("gguf", {"engine": "mlflow"}, "stock transformers", "--engine vllm"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(
    kinds: Kinds, tmp_path: Path, kind: str, wishes: dict[str, str], words: str, remedy: str
) -> None:
    with pytest.raises(Refused, match=words) as error:
        export(kinds(kind), tmp_path / "out", **wishes)
    assert remedy in str(error.value.remedy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wishes",
    [
        {"engine": "lmi"},
        {"name": "My_Model"},
        {"name": "a" * 33},
        {"name": "ab"},
        {"name": "a-model-"},
        {"instance": "ml.g5.xlarge"},
        {"instance": "Standard_Ünï"},
        {"context": 131072},
        {"image": "--platform=linux/arm64"},
        {"image": "vllm/vllm-openai"},
        {"role": "arn"},
        {"engine": "mlflow", "image": "vllm/vllm-openai:v0.33.0"},
        {"engine": "mlflow", "context": 4096},
    ],
)
def test_what_means_nothing_here_is_a_usage_error(kinds: Kinds, tmp_path: Path, wishes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        export(kinds("int4"), tmp_path / "out", **wishes)


@pytest.mark.parametrize(
    ("gb", "wish", "instance", "gpus"),
    [
        (13, None, "Standard_NC24ads_A100_v4", 1),
        (65, None, "Standard_NC24ads_A100_v4", 1),
        (75, None, "Standard_NC48ads_A100_v4", 2),
        (234, None, "Standard_NC96ads_A100_v4", 4),
        (13, "Standard_NC80adis_H100_v5", "Standard_NC80adis_H100_v5", 2),
        (13, "Standard_ND96isr_H200_v5", "Standard_ND96isr_H200_v5", 1),
    ],
)
def test_the_machine_holds_the_weights_and_vllm_uses_all_its_gpus(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb: int, wish: str | None, instance: str, gpus: int
) -> None:
    monkeypatch.setattr(vllm, "weight_bytes", lambda artifact: gb * 10**9)
    found = export(kinds("mxfp4"), tmp_path / "out", instance=wish)
    deployment = read(tmp_path / "out/deployment.yml")
    assert deployment["instance_type"] == instance
    assert ("--tensor-parallel-size" in deployment["environment_variables"]["SERVE_ARGUMENTS"]) == (gpus > 1)
    assert any("one GPU is assumed" in note for note in found.document["notes"]) == (instance not in azureml.MACHINES)


def test_the_probes_give_the_weights_time_to_arrive(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "weight_bytes", lambda artifact: 60 * 10**9)
    export(kinds("mxfp4"), tmp_path / "out")
    for name in ("liveness_probe", "readiness_probe"):
        probe = read(tmp_path / "out/deployment.yml")[name]
        assert probe["period"] * probe["failure_threshold"] == 600 + 600  # ten minutes, and 60 GB at 100 MB a second


@pytest.mark.parametrize(
    ("gb", "wish"), [(75, "Standard_NC24ads_A100_v4"), (75, "Standard_NC40ads_H100_v5"), (900, None)]
)
def test_a_machine_that_is_too_small_is_refused(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb: int, wish: str | None
) -> None:
    monkeypatch.setattr(vllm, "weight_bytes", lambda artifact: gb * 10**9)
    with pytest.raises(Refused, match=r"too little memory|no machine") as error:
        export(kinds("mxfp4"), tmp_path / "out", instance=wish)
    assert "--instance" in str(error.value.remedy) if wish else "--to" in str(error.value.remedy)


@pytest.mark.parametrize(
    "wish", ["Standard_NC4as_T4_v3", "Standard_NC64as_T4_v3", "Standard_NC24s_v3", "Standard_ND40rs_v2"]
)
def test_a_machine_without_bfloat16_is_refused(kinds: Kinds, tmp_path: Path, wish: str) -> None:
    with pytest.raises(Refused, match="no bfloat16") as error:
        export(kinds("mxfp4"), tmp_path / "out", instance=wish)
    assert error.value.remedy == "--instance Standard_NC24ads_A100_v4"

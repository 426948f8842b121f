"""The Northflank package: judged by the npm client's types and a JSON Schema; its commands really run beside stubs."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.npm import NoNpm, npm_package
from support.shell import require_sound

from gptoss_convert.convert.exports import northflank, vllm, write
from gptoss_convert.convert.exports.package import Request
from gptoss_convert.convert.progress import silent
from gptoss_convert.errors import Refused, UsageError

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "tests/data/northflank_template.schema.json").read_text())
CLIENT = (
    "@northflank/js-client", "0.9.5",
    "sha512-yo8DvsuZnsQLczccYJJtQQ3KNjKeCUaQLNBIKgjDbYcRfz9qTt5E6Nb3SDvC6x0T3SsB6RZKliTjQ6iGJ/ST/g==",
)  # fmt: skip
TYPESCRIPT = (
    "typescript", "5.9.3",
    "sha512-jl1vZzPDinLr9eUt3J/t7V6FgNEw9QjvBPdysz9KfQDD41fQrC2Y4vKQdiaUpFT4bXlb1RHhLpp8wtm6M5TgSw==",
)  # fmt: skip
Kinds = Callable[[str], Path]
Spoil = Callable[[dict[str, Any]], Any]


def export(path: Path, target: Path, **wishes: Any) -> write.Exported:
    return write.export(path, target, "northflank", Request(**wishes), show=silent)


def template(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "template.json").read_text())
    return found


def nodes(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    service, volume = document["spec"]["spec"]["steps"]
    return service["spec"], volume["spec"]


@pytest.fixture(scope="module")
def packed(kinds: Kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("northflank") / "int4"
    export(kinds("int4"), folder)
    return folder


def problems(documents: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    """What TypeScript says of each template, its nodes typed as the client's request bodies."""
    try:
        client, compiler = (npm_package(ROOT / ".cache/northflank", *pinned) for pinned in (CLIENT, TYPESCRIPT))
    except NoNpm as reason:
        pytest.skip(str(reason))
    types = client / "dist/esm/api-client"
    for number, document in enumerate(documents):
        service, volume = nodes(document)
        (folder / f"t{number}.ts").write_text(
            "import type { CreateServiceDeploymentData, CreateVolumeData, CreateTemplateData } "
            f"from {json.dumps(str(types))};\n"
            f"export const service: CreateServiceDeploymentData = {json.dumps(service)};\n"
            f"export const volume: CreateVolumeData = {json.dumps(volume)};\n"
            f"export const template: CreateTemplateData = {json.dumps(document)};\n"
        )
    command = [
        "node", compiler / "lib/tsc.js", "--noEmit", "--strict", "--skipLibCheck", "--module", "esnext",
        "--moduleResolution", "bundler", "--target", "es2022", "--typeRoots", "none", "--pretty", "false",
        *(f"t{number}.ts" for number in range(len(documents))),
    ]  # fmt: skip
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    said = [[line for line in lines if line.startswith(f"t{number}.ts(")] for number in range(len(documents))]
    assert [line for line in lines if not line.startswith((" ", *(f"t{n}.ts(" for n in range(len(documents)))))] == []
    assert found.returncode == (2 if any(said) else 0)
    return said


def test_the_clients_types_accept_the_template_of_every_kind(kinds: Kinds, tmp_path: Path) -> None:
    documents = []
    for kind in vllm.SERVED:
        export(kinds(kind), tmp_path / kind, name="my-model", context=4096)
        documents.append(template(tmp_path / kind))
    assert problems(documents, tmp_path) == [[]] * len(documents)


TYPED: list[Spoil] = [
    lambda d: nodes(d)[0]["ports"][0].update(protocol="HTTPS"),
    lambda d: nodes(d)[0]["billing"].pop("deploymentPlan"),
    lambda d: nodes(d)[0]["deployment"].pop("instances"),
    lambda d: nodes(d)[0]["deployment"].update(gpus=1),
    lambda d: nodes(d)[0]["deployment"]["gpu"].update(gpuType="h100-80"),
    lambda d: nodes(d)[0]["deployment"]["docker"].update(configType="custom"),
    lambda d: nodes(d)[0]["deployment"]["storage"].update(shmSize="16G"),
    lambda d: nodes(d)[0]["healthChecks"][0].update(type="startup"),
    lambda d: nodes(d)[0]["healthChecks"][0].pop("failureThreshold"),
    lambda d: nodes(d)[0].update(volumes=[]),
    lambda d: nodes(d)[1]["spec"].update(accessMode="ReadOnlyMany"),
    lambda d: nodes(d)[1]["mounts"][0].pop("containerMountPath"),
    lambda d: nodes(d)[1]["attachedObjects"][0].update(type="services"),
    lambda d: d.update(apiVersion="v2"),
    lambda d: d["options"].update(concurrencyPolicy="wait"),
]


def test_the_clients_types_report_every_planted_error(packed: Path, tmp_path: Path) -> None:
    documents = []
    for spoil in TYPED:
        document = copy.deepcopy(template(packed))
        spoil(document)
        documents.append(document)
    said = problems([template(packed), *documents], tmp_path)
    assert [bool(lines) for lines in said] == [False] + [True] * len(TYPED), said


BOUNDED: list[Spoil] = [
    *TYPED,
    lambda d: nodes(d)[0].update(name="my_model"),
    lambda d: nodes(d)[0]["ports"][0].update(name="inference"),
    lambda d: nodes(d)[0]["deployment"]["external"].update(imagePath="vllm/vllm-openai"),
    lambda d: nodes(d)[0]["deployment"]["docker"].pop("customEntrypoint"),
    lambda d: nodes(d)[0]["deployment"]["gpu"]["configuration"].update(gpuType="h200-141"),
    lambda d: nodes(d)[0]["billing"].update(deploymentPlan="nf-compute-50"),
    lambda d: nodes(d)[1].update(name="a" * 40),
    lambda d: nodes(d)[1]["attachedObjects"][0].update(id="${refs.service}}"),
    lambda d: d["spec"]["spec"]["steps"][0].update(kind="Service"),
    lambda d: d["spec"]["spec"]["steps"][0].pop("ref"),
    lambda d: d["spec"]["spec"].update(type="serial"),
]


def test_the_schema_accepts_the_template_and_reports_every_planted_error(packed: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert list(validator.iter_errors(template(packed))) == []
    for number, spoil in enumerate(BOUNDED):
        document = template(packed)
        spoil(document)
        assert list(validator.iter_errors(document)), number


def test_the_templates_references_lead_somewhere_and_nothing_else_is_filled_in(packed: Path) -> None:
    document = template(packed)
    refs = {f"refs.{step['ref']}.id" for step in document["spec"]["spec"]["steps"]}
    args = {f"args.{name}" for name in document["arguments"]}
    found = {part.partition("}")[0] for part in (packed / "template.json").read_text().split("${")[1:]}
    assert found == {"refs.service.id", "args.projectId"} <= refs | args
    kinds = [step["kind"] for step in document["spec"]["spec"]["steps"]]
    assert kinds == ["DeploymentService", "Volume"]  # in order: the volume refers to the service


def test_the_service_asks_for_the_gpus_of_its_plan_and_checks_vllms_own_route(packed: Path) -> None:
    service, volume = nodes(template(packed))
    gpu = service["deployment"]["gpu"]["configuration"]
    assert service["billing"]["deploymentPlan"] == f"nf-gpu-{gpu['gpuType']}-{gpu['gpuCount']}g" == "nf-gpu-h100-80-1g"
    assert {check["type"] for check in service["healthChecks"]} == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {(check["path"], check["port"]) for check in service["healthChecks"]} == {("/health", 8000)}
    assert (service["ports"][0]["internalPort"], service["ports"][0]["public"]) == (8000, False)
    startup = next(check for check in service["healthChecks"] if check["type"] == "startupProbe")
    assert startup["periodSeconds"] * startup["failureThreshold"] == 6 * 3600
    assert service["deployment"]["storage"]["shmSize"] == 16384  # MB: what the processes of several GPUs share
    command = shlex.split(service["deployment"]["docker"]["customCommand"])
    assert volume["mounts"][0]["containerMountPath"] == command[3] == "/models"
    assert volume["spec"]["storageSize"] % 10240 == 0


def test_the_volume_has_room_for_the_weights(kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(northflank, "STEP_MB", 1)
    export(kinds("bf16"), tmp_path / "out")
    total = sum(path.stat().st_size for path in (tmp_path / "out/model").rglob("*"))
    assert 1.1 * total <= nodes(template(tmp_path / "out"))[1]["spec"]["storageSize"] * 2**20 <= 1.1 * total + 2**20


def stubs(folder: Path, **programs: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def container(packed: Path, volume: Path) -> list[str]:
    """What the service starts, with the volume elsewhere."""
    docker = nodes(template(packed))[0]["deployment"]["docker"]
    return [
        docker["customEntrypoint"],
        *(str(volume) if w == "/models" else w for w in shlex.split(docker["customCommand"])),
    ]


VLLM = 'printf "%s\\n" "$@"\n'
UPLOAD = """
printf '%s\\n' "$*" >> "$LOG"
while [ "$#" -gt 0 ]; do
  case "$1" in --localPath) from=$2;; --remotePath) to=$2;; esac
  shift
done
cp -rT "$from" "$VOLUME${to#/models}"
case "$to" in */"$STOP") exit 1;; esac
"""


def test_the_service_waits_for_the_upload_checks_it_and_really_starts_vllm(packed: Path, tmp_path: Path) -> None:
    volume, log = tmp_path / "volume", tmp_path / "log"
    volume.mkdir()
    environment = stubs(tmp_path / "bin", vllm=VLLM, northflank=UPLOAD, sleep="exec /bin/sleep 0.05\n")
    environment |= {"LOG": str(log), "VOLUME": str(volume), "STOP": "-"}
    with subprocess.Popen(container(packed, volume), env=environment, stdout=subprocess.PIPE, text=True) as service:
        time.sleep(0.5)
        assert service.poll() is None
        subprocess.run([packed / "upload.sh", "my-project"], env=environment, check=True)
        said, _ = service.communicate(timeout=60)
    lines = said.splitlines()
    assert lines[0] == "waiting for upload.sh"
    started = lines[lines.index("serve") :]
    assert Path(started[1]).resolve() == (volume / "model").resolve()
    assert started[2:4] == ["--served-model-name", "gpt-oss"]
    assert started[-2:] == ["--moe-backend", "humming"]
    assert service.returncode == 0
    told = log.read_text().splitlines()
    start = "upload service file --projectId my-project --serviceId gpt-oss --localPath"
    assert re.fullmatch(f"{start} /[^ ]+ --remotePath /models/SHA256SUMS", told[0])
    assert told[1:] == [
        f"{start} model --remotePath /models/model",
        f"{start} SHA256SUMS --remotePath /models/SHA256SUMS",
    ]
    assert not Path(told[0].split()[-3]).exists()
    for path in (packed / "model").iterdir():
        assert (volume / "model" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("spoil", ["cut", "missing"])
def test_the_service_starts_nothing_on_a_model_that_did_not_arrive_whole(
    packed: Path, tmp_path: Path, spoil: str
) -> None:
    volume = Path(shutil.copytree(packed, tmp_path / "volume"))
    environment = stubs(tmp_path / "bin", vllm=VLLM)
    whole = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=True)
    assert whole.stdout.startswith("serve\n")
    (volume / ".checked").unlink()
    path = volume / "model/tokenizer.json"
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    found = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "serve" not in found.stdout
    assert "tokenizer.json" in found.stdout + found.stderr
    assert not (volume / ".checked").exists()


def test_a_container_that_starts_while_another_model_is_uploaded_waits(
    kinds: Kinds, packed: Path, tmp_path: Path
) -> None:
    volume = Path(shutil.copytree(packed, tmp_path / "volume"))
    environment = stubs(tmp_path / "bin", vllm=VLLM, northflank=UPLOAD, sleep="echo waited; kill $PPID\n")
    environment |= {"LOG": str(tmp_path / "log"), "VOLUME": str(volume), "STOP": "model"}
    subprocess.run(container(packed, volume), env=environment, capture_output=True, check=True)  # the first model runs
    export(kinds("mxfp4"), tmp_path / "other")
    assert subprocess.run([tmp_path / "other/upload.sh", "p"], env=environment, check=False).returncode == 1
    found = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=False)
    assert "serve" not in found.stdout
    assert found.stdout.splitlines() == ["waiting for upload.sh", "waited"]


def test_files_of_an_earlier_model_on_the_volume_are_named_and_nothing_starts(packed: Path, tmp_path: Path) -> None:
    volume = Path(shutil.copytree(packed, tmp_path / "volume"))
    (volume / "model/model-00003-of-00003.safetensors").write_text("of the model before")
    environment = stubs(tmp_path / "bin", vllm=VLLM)
    found = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "> model/model-00003-of-00003.safetensors" in found.stdout
    assert "serve" not in found.stdout
    (volume / "model/model-00003-of-00003.safetensors").unlink()
    found = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("serve\n")


def test_digests_that_arrived_in_part_start_nothing(packed: Path, tmp_path: Path) -> None:
    volume = Path(shutil.copytree(packed, tmp_path / "volume"))
    lines = (volume / "SHA256SUMS").read_text().splitlines(keepends=True)
    assert lines[-1].endswith("  upload.sh\n")
    environment = stubs(tmp_path / "bin", vllm=VLLM, sleep="echo waited; kill $PPID\n")
    for count in (0, 1, len(lines) - 1):
        (volume / "SHA256SUMS").write_text("".join(lines[:count]))
        found = subprocess.run(container(packed, volume), env=environment, capture_output=True, text=True, check=False)
        assert found.stdout.splitlines() == ["waiting for upload.sh", "waited"]


def test_upload_sends_nothing_that_is_damaged_and_wants_a_project(packed: Path, tmp_path: Path) -> None:
    environment = stubs(tmp_path / "bin", northflank=UPLOAD) | {"LOG": str(tmp_path / "log"), "STOP": "-"}
    assert subprocess.run([packed / "upload.sh"], env=environment, capture_output=True, check=False).returncode == 64
    spoiled = Path(shutil.copytree(packed, tmp_path / "spoiled"))
    (spoiled / "model/chat_template.jinja").write_text("another")
    found = subprocess.run([spoiled / "upload.sh", "p"], env=environment, capture_output=True, check=False)
    assert found.returncode == 1
    assert not (tmp_path / "log").exists()


def test_the_scripts_are_sound_shell(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text(f"#!/bin/bash\n{northflank.START}\n")
    for script in (packed / "upload.sh", tmp_path / "start.sh"):
        require_sound(script)


def test_the_vocabulary_of_the_chat_parser_goes_onto_the_volume(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(northflank, "harmony_vocabulary", lambda table: b"IQ== 0\n")
    export(kinds("int4"), tmp_path / "out")
    volume, log = tmp_path / "volume", tmp_path / "log"
    volume.mkdir()
    environment = stubs(tmp_path / "bin", northflank=UPLOAD) | {"LOG": str(log), "VOLUME": str(volume), "STOP": "-"}
    subprocess.run([tmp_path / "out/upload.sh", "p"], env=environment, check=True)
    assert (volume / "encodings/o200k_base.tiktoken").read_bytes() == b"IQ== 0\n"
    assert log.read_text().splitlines()[-1].endswith("/models/SHA256SUMS")
    service, _ = nodes(template(tmp_path / "out"))
    assert service["runtimeEnvironment"] == {"TIKTOKEN_ENCODINGS_BASE": "/models/encodings"}


def test_the_tokenizer_the_template_and_the_end_tokens_are_the_artifacts_own(kinds: Kinds, packed: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (packed / "model" / name).read_bytes() == (kinds("int4") / name).read_bytes()


@pytest.mark.parametrize(
    ("gb", "wish", "plan"),
    [
        (13, None, "nf-gpu-h100-80-1g"),
        (13, "nf-gpu-l4-24-1g", "nf-gpu-l4-24-1g"),
        (65, None, "nf-gpu-h100-80-1g"),
        (65, "nf-gpu-a100-40-4g", "nf-gpu-a100-40-4g"),
        (234, None, "nf-gpu-h100-80-4g"),
        (600, None, "nf-gpu-h200-141-8g"),
    ],
)
def test_the_plan_holds_the_weights_and_vllm_uses_all_its_gpus(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb: int, wish: str | None, plan: str
) -> None:
    monkeypatch.setattr(vllm, "weight_bytes", lambda artifact: gb * 10**9)
    export(kinds("mxfp4"), tmp_path / "out", instance=wish)
    service, _ = nodes(template(tmp_path / "out"))
    count = int(plan[-2])
    assert service["billing"]["deploymentPlan"] == plan
    assert service["deployment"]["gpu"]["configuration"]["gpuCount"] == count
    command = service["deployment"]["docker"]["customCommand"]
    assert (f"--tensor-parallel-size {count}" in command) == (count > 1)


@pytest.mark.parametrize(("gb", "wish"), [(65, "nf-gpu-l4-24-2g"), (234, "nf-gpu-h100-80-2g"), (9000, None)])
def test_a_plan_that_is_too_small_is_refused(
    kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb: int, wish: str | None
) -> None:
    monkeypatch.setattr(vllm, "weight_bytes", lambda artifact: gb * 10**9)
    with pytest.raises(Refused, match=r"too little memory|no plan") as error:
        export(kinds("mxfp4"), tmp_path / "out", instance=wish)
    assert "nf-gpu-h100-80" in str(error.value.remedy) if wish else "--to" in str(error.value.remedy)


@pytest.mark.parametrize(
    "wishes",
    [
        {"instance": "nf-compute-50"},
        {"instance": "nf-gpu-h200-141-1g"},
        {"instance": "nf-gpu-h100-80-3g"},
        {"instance": "nf-gpu-t4-16-1g"},
        {"context": 131072},
        {"image": "vllm/vllm-openai"},
        {"image": "repo/Ü:1"},
        {"name": "My Model"},
        {"name": "a" * 31},
        {"name": "ab"},
        {"name": "a--model"},
        {"name": "a" * 29 + "!"},
        {"base_model": "openai/gpt-oss-20b"},
        {"engine": "vllm"},
    ],
)
def test_what_means_nothing_here_is_a_usage_error(kinds: Kinds, tmp_path: Path, wishes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        export(kinds("int4"), tmp_path / "out", **wishes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "image", "words"),
    [
        ("gguf", None, "northflank cannot serve this artifact: vLLM has no"),
        ("int4", "vllm/vllm-openai:v0.30.0", "does not load int4"),
        ("int8", "vllm/vllm-openai:v0.28.0", "does not load int8"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(
    kinds: Kinds, tmp_path: Path, kind: str, image: str | None, words: str
) -> None:
    with pytest.raises(Refused, match=words) as error:
        export(kinds(kind), tmp_path / "out", image=image)
    assert "--to hf" in str(error.value.remedy)
    assert not list(tmp_path.iterdir())

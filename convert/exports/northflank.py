"""Northflank: a template that makes a GPU service with vLLM and a volume, and the files that go onto the volume.

    template.json   workflow: the service, then the volume attached to it      model/       the artifact as it is
    upload.sh       the files onto the volume, the digests last                encodings/   vocabulary of the chat parser

The service waits for the digests, checks every file against them once, and starts vLLM. Shapes as @northflank/js-client 0.9.5 has
them; template nodes, plans and patterns as northflank/skills (c0da467d) has them.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from gptoss_convert.convert.exports import vllm
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.chat_files import (
    NO_VOCABULARY,
    VARIABLE,
    VOCABULARY,
    harmony_vocabulary,
    require_chat_files,
)
from gptoss_convert.convert.exports.package import Package, Request, require_name
from gptoss_convert.errors import Refused, UsageError

NAME = r"(?=.{3})[a-z][a-z0-9]*(-[a-z0-9]+)*"  # of a service, whose id is its name in small letters
MOST = 30  # a volume's name has 39 characters at most, and ours ends in "-model"
require_own_name = partial(require_name, pattern=NAME, what="a service", most=MOST)
MOUNT = "/models"
START_HOURS = 6  # that the first start may take: the upload runs meanwhile
SHM_MB = 16384
STORAGE_CLASS = "ssd"
STEP_MB = 10240  # volumes are made in tens of GiB
# One line, and without the ${…} that a template fills in: what the container's shell does before it becomes vLLM.
START = "; ".join(
    (
        "set -euo pipefail",
        'cd "$1"',
        "shift",
        # Its last line, without which it has not arrived whole; upload.sh puts another text there while it is at work.
        'until tail -n 1 SHA256SUMS 2>/dev/null | grep -q "  upload.sh"; do echo waiting for upload.sh; sleep 10; done',
        'cmp -s SHA256SUMS .checked || { grep -E "  (model|encodings)/" SHA256SUMS | sha256sum --quiet --strict -c -; '
        "diff <(cut -c67- SHA256SUMS | grep ^model/ | LC_ALL=C sort) <(find model -type f | LC_ALL=C sort) || "
        "{ echo files of another model: remove what has the mark above; exit 1; }; "
        "cp SHA256SUMS .checked; }",  # not &&, of whose left side the shell's -e takes no notice
        'exec vllm serve "$PWD/model" "$@"',
    )
)
_PLAN = re.compile(r"nf-gpu-([a-z0-9]+-\d+)-(\d+)g")


@dataclass(frozen=True)
class Gpu:
    """How many of a model a plan may have, and the memory of each in GB."""

    counts: tuple[int, ...]
    memory: int


# northflank/skills references/plans.md (from GET /v1/plans and /v1/regions), read 2026-11-22; cheapest first. Without
# rtx_pro_6000-96, whose underscore the request's own pattern for plans does not allow.
GPUS = {
    "l4-24": Gpu((1, 2, 4, 8), 24),
    "a100-40": Gpu((1, 2, 4, 8), 40),
    "a100-80": Gpu((1, 2, 4, 8), 80),
    "h100-80": Gpu((1, 2, 4, 8), 80),
    "h200-141": Gpu((8,), 141),
    "b200-180": Gpu((8,), 180),
}
DEFAULTS = ("h100-80", "h200-141", "b200-180")  # where --instance is not given: what vLLM's recipe for gpt-oss names


def package(artifact: Artifact, request: Request) -> Package:
    """Template, upload script and files."""
    made = Package(executable={"upload.sh"})
    image = request.image or vllm.IMAGE
    name = require_own_name(request.name or artifact.model)
    vllm.require_served(artifact, image, "northflank", made)
    chat = require_chat_files(artifact, "northflank")
    plan, model, count = _plan(artifact, request.instance)
    made.copy(artifact, "model/", vllm.other_layouts(artifact))
    chat.put_into(made, "model/")
    vocabulary = harmony_vocabulary(chat.table)
    if vocabulary is None:
        made.notes.append(NO_VOCABULARY)
    else:
        made.files[f"encodings/{VOCABULARY}"] = vocabulary
    serve = vllm.arguments(artifact, name, count, request.context)
    service = _service(name, plan, model, count, image, serve, vocabulary is not None)
    made.files["template.json"] = as_json(_template(name, service, _volume(name, artifact)))
    script = (files("gptoss_convert") / "data" / "northflank_upload.sh").read_bytes()
    made.files["upload.sh"] = script.replace(b"@NAME@", name.encode())
    made.notes += [
        "the GPU is billed from the template's run on, the upload included",
        "the port is not public: a public one needs a password first (ports.security, or VLLM_API_KEY of vLLM)",
        "the volume is ReadWriteOnce: one instance; a second one needs a volume of its own",
    ]
    made.first_steps += [
        "northflank login (npm install -g @northflank/cli; the upload needs 0.10.8 or newer)",
        "northflank create template -f template.json",
        f'northflank run template --templateId {name} -i \'{{"arguments": {{"projectId": "PROJECT"}}}}\'',
        "./upload.sh PROJECT",
        f"northflank forward service --projectId PROJECT --serviceId {name}",
    ]
    return made


def _plan(artifact: Artifact, wish: str | None) -> tuple[str, str, int]:
    size = vllm.weight_bytes(artifact)
    fits = [
        (f"nf-gpu-{name}-{count}g", name, count)
        for name in (*DEFAULTS, *(name for name in GPUS if name not in DEFAULTS))
        for count in GPUS[name].counts
        if vllm.gpus_for(size, GPUS[name].memory) <= count
    ]
    if not fits:
        raise Refused(
            "no plan holds these weights", file=artifact.path, found=f"{size / 1e9:.0f} GB", remedy=vllm.REMEDY
        )
    if wish is None:
        return fits[0]
    found = _PLAN.fullmatch(wish)
    if not found or found[1] not in GPUS or int(found[2]) not in GPUS[found[1]].counts:
        names = ", ".join(f"nf-gpu-{name}-{'/'.join(map(str, gpu.counts))}g" for name, gpu in GPUS.items())
        raise UsageError("not a GPU plan of Northflank's", found=wish, expected=names)
    if wish not in [plan for plan, _, _ in fits]:
        raise Refused(
            f"{wish} has too little memory for these weights", file=artifact.path, found=f"{size / 1e9:.1f} GB of weights",
            expected="room for them and the cache", remedy=f"--instance {fits[0][0]}",
        )  # fmt: skip
    return wish, found[1], int(found[2])


def _service(
    name: str, plan: str, model: str, count: int, image: str, serve: list[str], offline: bool
) -> dict[str, Any]:
    """The body of a deployment service."""
    start = shlex.join(["-c", START, "start", MOUNT, *serve])
    probe = {"protocol": "HTTP", "path": vllm.HEALTH, "port": vllm.PORT, "timeoutSeconds": 5}
    return {
        "name": name,
        "billing": {"deploymentPlan": plan},
        "deployment": {
            "instances": 1,
            "external": {"imagePath": image},
            "docker": {
                "configType": "customEntrypointCustomCommand",
                "customEntrypoint": "/bin/bash",
                "customCommand": start,
            },
            "storage": {"ephemeralStorage": {"storageSize": 20480}, "shmSize": SHM_MB},
            "gpu": {"enabled": True, "configuration": {"gpuType": model, "gpuCount": count, "timesliced": False}},
        },
        "runtimeEnvironment": {VARIABLE: f"{MOUNT}/encodings"} if offline else {},
        "ports": [{"name": "vllm", "internalPort": vllm.PORT, "public": False, "protocol": "HTTP"}],
        "healthChecks": [
            probe | {"type": "startupProbe", "initialDelaySeconds": 30, "periodSeconds": 30,
                     "failureThreshold": START_HOURS * 120},
            probe | {"type": "readinessProbe", "initialDelaySeconds": 0, "periodSeconds": 10, "failureThreshold": 3},
            probe | {"type": "livenessProbe", "initialDelaySeconds": 0, "periodSeconds": 30, "failureThreshold": 6},
        ],
    }  # fmt: skip


def _volume(name: str, artifact: Artifact) -> dict[str, Any]:
    unused = vllm.other_layouts(artifact)
    total = sum(path.stat().st_size for file, path in artifact.files.items() if file not in unused)
    return {
        "name": f"{name}-model",
        "mounts": [{"volumeMountPath": "", "containerMountPath": MOUNT}],
        "spec": {
            "accessMode": "ReadWriteOnce",
            "storageClassName": STORAGE_CLASS,
            "storageSize": math.ceil(total * 1.1 / 2**20 / STEP_MB) * STEP_MB,
        },
        "attachedObjects": [{"id": "${refs.service.id}", "type": "service"}],
    }


def _template(name: str, service: dict[str, Any], volume: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1.2",
        "name": name,
        "description": "gpt-oss on vLLM with its weights on a volume",
        "arguments": {"projectId": ""},
        "options": {"autorun": False, "concurrencyPolicy": "queue"},
        "spec": {
            "kind": "Workflow",
            "spec": {
                "type": "sequential",
                "context": {"projectId": "${args.projectId}"},
                "steps": [
                    {"kind": "DeploymentService", "ref": "service", "spec": service},
                    {"kind": "Volume", "ref": "volume", "spec": volume},
                ],
            },
        },
    }

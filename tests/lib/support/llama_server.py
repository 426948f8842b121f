"""An exported server.sh, run: its command line as a shell really makes it, given to llama.cpp's own server through xllamacpp.

xllamacpp's server takes parameters, no command line; every option that the script gives must have its parameter here, so that
a script with another one fails the test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import xllamacpp

SetParameter = Callable[[Any, str], None]


def _sampling(name: str, kind: Callable[[str], Any]) -> SetParameter:
    return lambda params, value: setattr(params.sampling, name, kind(value))


def _plain(name: str, kind: Callable[[str], Any] = int) -> SetParameter:
    return lambda params, value: setattr(params, name, kind(value))


def _model(params: Any, value: str) -> None:
    params.model.path = value


def _reasoning(params: Any, value: str) -> None:
    assert value == "auto"
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_AUTO


OPTIONS: dict[str, SetParameter] = {
    "--model": _model,
    "--alias": lambda params, value: setattr(params, "model_alias", {value}),
    "--host": lambda params, value: setattr(params, "hostnames", [value]),
    "--port": _plain("port"),
    "--ctx-size": _plain("n_ctx"),
    "--parallel": _plain("n_parallel"),
    "--cache-ram": _plain("cache_ram_mib"),
    "--reasoning-format": _reasoning,
    "--temp": _sampling("temp", float),
    "--top-p": _sampling("top_p", float),
    "--top-k": _sampling("top_k", int),
    "--min-p": _sampling("min_p", float),
    "--n-gpu-layers": _plain("n_gpu_layers"),
}
FLAGS: dict[str, SetParameter] = {"--jinja": lambda params, _: setattr(params, "use_jinja", True)}


def command_line(script: Path, workplace: Path, *more: str, **environment: str) -> list[str]:
    """What server.sh gives to llama-server, run from another folder."""
    stub, told = workplace / "llama-server", workplace / "told.json"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nopen({str(told)!r}, 'w').write(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    given = {**os.environ, **environment, "PATH": f"{workplace}:{os.environ['PATH']}"}
    subprocess.run([str(script), *more], check=True, env=given, cwd="/")
    found: list[str] = json.loads(told.read_text())
    return found


def options(arguments: Sequence[str]) -> dict[str, str]:
    """Options by name; a flag's value is empty."""
    found: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        assert argument in OPTIONS or argument in FLAGS, f"llama-server's {argument} has no parameter here"
        assert argument not in found
        found[argument] = next(rest) if argument in OPTIONS else ""
    return found


def parameters(arguments: Sequence[str]) -> Any:
    """xllamacpp's for a command line."""
    params = xllamacpp.CommonParams()
    for name, value in options(arguments).items():
        (OPTIONS.get(name) or FLAGS[name])(params, value)
    params.fit_params = False
    params.warmup = False
    params.check_tensors = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    return params


@contextmanager
def serve(arguments: Sequence[str]) -> Iterator[str]:
    """The server's address on loopback."""
    params = parameters(arguments)
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address
    finally:
        del server


def post(address: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST as JSON over HTTP."""
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=600) as reply:
            found: dict[str, Any] = json.load(reply)
    except HTTPError as error:
        raise RuntimeError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')}") from error
    return found


def get(address: str, path: str) -> dict[str, Any]:
    """GET, of JSON."""
    with urlopen(address + path, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found

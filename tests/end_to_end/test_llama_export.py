"""The llama.cpp export in llama.cpp: served over HTTP from its folder by its own command line, channels and forecast checked.

A model this small says nothing sensible, so a grammar makes it say a harmony answer, token for token; what is judged is that the
exported file's tokens and template have llama.cpp put each channel where it belongs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.judges import convert
from support.llama_server import command_line, get, options, parameters, post, serve
from tokenizers import Tokenizer

from gptoss_convert.cli import cli
from gptoss_convert.convert.exports.artifact import open_artifact
from gptoss_convert.convert.exports.memory import buffers, kv_cache

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "tests/data/trained"
KV_BUFFER = re.compile(r"KV buffer size =\s+([\d.]+) MiB")
COMPUTE_BUFFER = re.compile(r"compute buffer size =\s+([\d.]+) MiB")


@pytest.fixture(scope="module", params=["one file", "parts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the trained model."""
    made = tmp_path_factory.mktemp("llama")
    in_parts = request.param == "parts"
    artifact = made / ("m" if in_parts else "m.gguf")
    convert(TRAINED, artifact, "gguf", *(["--split-size", "4MB"] if in_parts else []))
    cli.main(
        ["export", str(artifact), "--for", "llama.cpp", "--out", str(made / "out"), "--context", "2048"],
        standalone_mode=False,
    )
    return made / "out"


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The served export; port 0 is any free one."""
    with serve(command_line(folder / "server.sh", tmp_path_factory.mktemp("path"), PORT="0")) as found:
        yield found


def token(text: str) -> int:
    found = Tokenizer.from_file(str(TRAINED / "tokenizer.json")).token_to_id(text)
    assert isinstance(found, int)
    return found


def forced(*parts: str) -> dict[str, Any]:
    """What makes llama.cpp say exactly these pieces, special tokens by their id; the last one is the token that ends the turn.

    Any end token may follow a finished grammar; a bias has the wanted one drawn.
    """
    *said, end = parts
    words = [f"<[{token(p)}]>" if p.startswith("<|") else json.dumps(p, ensure_ascii=False) for p in said]
    return {"grammar": "root ::= " + " ".join(words), "logit_bias": [[token(end), 100.0]]}


def chat(address: str, said: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    reply = post(address, "/v1/chat/completions", {"messages": messages, "max_tokens": 200, **said})
    choice: dict[str, Any] = reply["choices"][0]
    return choice


def test_the_command_line_is_a_shells(folder: Path, tmp_path: Path) -> None:
    given = options(command_line(folder / "server.sh", tmp_path, "--n-gpu-layers", "9", PORT="9000", CONTEXT="512"))
    first = sorted(folder.glob("*.gguf"))[0]
    assert given == {
        "--model": str(first), "--alias": "gpt-oss", "--host": "127.0.0.1", "--port": "9000", "--ctx-size": "512",
        "--parallel": "1", "--cache-ram": "0", "--jinja": "", "--reasoning-format": "auto", "--temp": "1.0", "--top-p": "1.0",
        "--top-k": "0", "--min-p": "0.0", "--n-gpu-layers": "9",
    }  # fmt: skip
    assert options(command_line(folder / "server.sh", tmp_path))["--ctx-size"] == "2048"
    params = parameters(command_line(folder / "server.sh", tmp_path))
    assert (params.sampling.temp, params.sampling.top_p, params.sampling.top_k, params.sampling.min_p) == (1, 1, 0, 0)


def test_it_serves_with_the_samplers_and_the_context_of_the_script(address: str) -> None:
    reply = post(address, "/completion", {"prompt": "def f(x):", "n_predict": 4})
    settings = reply["generation_settings"]
    assert {name: settings[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    }  # fmt: skip
    assert get(address, "/props")["default_generation_settings"]["n_ctx"] == 2048


def test_channels_arrive_apart(address: str) -> None:
    said = forced(
        "<|channel|>", "analysis", "<|message|>", "Two and two is four.", "<|end|>",
        "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "It is 4.", "<|return|>",
    )  # fmt: skip
    answer = chat(address, said)
    assert answer["message"]["reasoning_content"] == "Two and two is four."
    assert answer["message"]["content"] == "It is 4."
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>", "<|endoftext|>"])
def test_every_end_token_ends_generation(address: str, end: str) -> None:
    asked = {
        "prompt": "<|start|>assistant",
        "n_predict": 99,
        "return_tokens": True,
        "logit_bias": [[token(end), 100.0]],
    }
    reply = post(address, "/completion", asked)
    assert (reply["stop_type"], reply["content"], reply["tokens_predicted"]) == ("eos", "", 1)


def test_end_of_a_message_does_not_end_generation(address: str) -> None:
    asked = {"prompt": "<|start|>assistant", "n_predict": 3, "logit_bias": [[token("<|end|>"), 100.0]]}
    assert post(address, "/completion", asked)["tokens_predicted"] == 3


def test_the_forecast_is_what_llama_cpp_reserves(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, whose log is read: the KV cache to the byte, the buffers no more than said.

    A server that is destroyed before its queue runs waits for ever (xllamacpp 2026.10), so it is asked for a token first.
    """
    arguments = command_line(folder / "server.sh", tmp_path, PORT="0")
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); from support.llama_server import parameters, post\n"
    code += "import xllamacpp; p = parameters(json.loads(sys.argv[2])); p.verbosity = 4; s = xllamacpp.Server(p)\n"
    code += "post(s.listening_address, '/completion', {'prompt': 'a', 'n_predict': 1})"
    with open_artifact(Path(options(arguments)["--model"])) as artifact:
        config = artifact.config
    for context in (300, 2048, 5000):
        given = [str(context) if a == "2048" else a for a in arguments]
        command = [sys.executable, "-P", "-c", code, str(ROOT / "tests/lib"), json.dumps(given)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        log = run.stdout + run.stderr
        reserved = sum(float(mib) for mib in KV_BUFFER.findall(log))
        assert reserved * 2**20 == pytest.approx(kv_cache(config, context), abs=0.011 * 2**20)
        assert 0 < sum(float(mib) for mib in COMPUTE_BUFFER.findall(log)) * 2**20 <= buffers(config, context)

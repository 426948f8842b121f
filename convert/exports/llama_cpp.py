"""llama.cpp: a GGUF as it is, a server's command line with gpt-oss's sampling, and how much memory it will take."""

from __future__ import annotations

import shlex
from functools import partial

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.chat import Chat
from gptoss_convert.convert.exports.gguf import (
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    provenance,
    require_gguf,
    served_context,
)
from gptoss_convert.convert.exports.memory import CARDS, Forecast, buffers, kv_cache
from gptoss_convert.convert.exports.package import Package, Request, require_name
from gptoss_convert.convert.exports.words import paragraph, size, table

PLATFORM = "llama.cpp"
SCRIPT = "server.sh"
_NAME = r"[A-Za-z0-9][\w./:-]*"
require_own_name = partial(require_name, pattern=_NAME, what="a model", most=96)


def package(artifact: Artifact, request: Request) -> Package:
    """GGUF, certificate, server.sh, README.md."""
    chat = require_gguf(artifact, PLATFORM)
    context = served_context(artifact.config, request)
    alias = require_own_name(request.name or artifact.model)
    forecast = Forecast.of(artifact)
    made = Package(executable={SCRIPT})
    made.copy(artifact)
    made.files[SCRIPT] = server_script(artifact.weights[0], alias, context)
    made.files["README.md"] = _readme(artifact, chat, forecast, alias, context)
    made.notes.append(f"{context} tokens of context need about {forecast.total(context) / 1e9:.1f} GB; see README.md")
    made.first_steps = [f"./{SCRIPT}", "open http://127.0.0.1:8080, or POST to /v1/chat/completions there"]
    return made


def server_script(model: str, alias: str, context: int) -> bytes:
    """server.sh."""
    return f"""#!/bin/sh
# llama-server with this model. From the environment: LLAMA_SERVER, HOST, PORT, CONTEXT. Further options are passed on.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
exec "${{LLAMA_SERVER:-llama-server}}" \\
    --model "$here"/{shlex.quote(model)} \\
    --alias {shlex.quote(alias)} \\
    --host "${{HOST:-127.0.0.1}}" \\
    --port "${{PORT:-8080}}" \\
    --ctx-size "${{CONTEXT:-{context}}}" \\
    --parallel 1 \\
    --cache-ram 0 \\
    --jinja \\
    --reasoning-format auto \\
    --temp {TEMPERATURE} \\
    --top-p {TOP_P} \\
    --top-k {TOP_K} \\
    --min-p {MIN_P} \\
    "$@"
""".encode()


def _readme(artifact: Artifact, chat: Chat, forecast: Forecast, alias: str, context: int) -> bytes:
    ends = ", ".join(f"`{token}` {index}" for token, index in chat.ends.items())
    serve = (
        f"llama.cpp's `llama-server` must be on the path. The script asks for {context} tokens of context, one conversation at a "
        "time, and OpenAI's sampling: temperature 1, nothing cut off by top-p, top-k or min-p (llama.cpp's own defaults cut). "
        "`--jinja` has the file's own template render the chat and llama.cpp read harmony's channels: analysis comes back as "
        "`reasoning_content`, calls as `tool_calls`, the final channel as `content`. `--cache-ram 0` keeps llama-server from "
        "holding up to 8 GiB of finished conversations in main memory; `./server.sh --cache-ram MIB` allows as much as you say."
    )
    carried = (
        f"Tokenizer, template and the end tokens ({ends}) are in the GGUF. {chat.origin} llama.cpp splits text by an expression "
        "of its own, which leaves out combining marks: Hindi, Bengali, Tamil, Telugu and Thai get other token ids than from "
        "OpenAI's tokenizer."
    )
    blocks = [
        f"# {alias} for llama.cpp\n", *map(paragraph, provenance(artifact)),
        "## Serve\n", f"    ./{SCRIPT}\n    PORT=9000 CONTEXT=32768 ./{SCRIPT} --n-gpu-layers 99\n",
        paragraph(serve), *_parts(artifact),
        "## Memory\n", *_memory(forecast, context),
        "## Chat\n", paragraph(carried),
    ]  # fmt: skip
    return "\n".join(blocks).encode()


def _parts(artifact: Artifact) -> list[str]:
    count = len(artifact.weights)
    what = f"The {count} parts must keep their names and lie together; llama.cpp is given the first."
    return [paragraph(what)] if count > 1 else []


def _memory(forecast: Forecast, context: int) -> list[str]:
    config = forecast.config
    what = (
        f"Weights: {size(forecast.weights)}. The KV cache is f16: of {config.layers} layers {config.sliding.count(False)} keep "
        f"the whole context and {config.sliding.count(True)} a window of {config.sliding_window} tokens. Its size is exact; the "
        "buffers for computing are a rule of thumb, which newer versions stay below. "
        "GB are 10⁹ bytes; what the desktop or another program holds comes on top."
    )
    rows = (
        (n, size(kv_cache(config, n)), size(buffers(config, n)), size(forecast.total(n)))
        for n in sorted({*forecast.contexts, context})
    )
    fits = ((f"{card} GB", _fits(forecast, card * 10**9, context)) for card in CARDS)
    return [
        paragraph(what),
        table(("context", "KV cache", "buffers", "with the weights"), rows, "rrrr"),
        table(("memory of a GPU", "what fits"), fits, "r"),
    ]


def _fits(forecast: Forecast, memory: int, context: int) -> str:
    largest = forecast.largest(memory)
    if largest is not None:
        return f"everything, up to {largest} tokens of context"
    outside = forecast.layers_outside(memory, context)
    if outside is None:
        return "not even without the experts: take a smaller type (`gptoss-convert plan SRC --fits`), or the CPU"
    held = sum(forecast.experts[:outside])
    return f"{context} tokens with `--n-cpu-moe {outside}`: the experts of {outside} layers ({size(held)}) stay in main memory"

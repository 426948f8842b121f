"""Ollama: a Modelfile beside the GGUF.

There is no TEMPLATE in it. Ollama writes prompts from a template in Go's language, and gpt-oss's is no such template; without
one, Ollama since 0.30 hands the messages to llama.cpp, which renders the GGUF's own template and reads the channels itself.
Ollama before 0.30 would send the bare prompt instead, so the Modelfile requires 0.30. (A Go template with harmony's tags would
switch on Ollama's own harmony code: another template than the model's, and not what is checked here.)
"""

from __future__ import annotations

from functools import partial

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.exports.chat import Chat
from gptoss_convert.convert.exports.gguf import (
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    licence,
    provenance,
    require_gguf,
    served_context,
)
from gptoss_convert.convert.exports.memory import Forecast
from gptoss_convert.convert.exports.package import Package, Request, require_name
from gptoss_convert.convert.exports.words import paragraph, size
from gptoss_convert.errors import Refused, printable

PLATFORM = "ollama"
REQUIRES = "0.30.0"
_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?"
require_own_name = partial(require_name, pattern=_NAME, what="a model of Ollama's", most=80)


def package(artifact: Artifact, request: Request) -> Package:
    """GGUF, certificate, Modelfile, README.md."""
    chat = require_gguf(artifact, PLATFORM, whole=True)
    context = served_context(artifact.config, request)
    name = require_own_name(request.name or artifact.model)
    made = Package()
    made.copy(artifact)
    made.files["Modelfile"] = modelfile(artifact.weights[0], context, licence(artifact)).encode()
    made.files["README.md"] = _readme(artifact, chat, name, context)
    made.notes.append(f"needs Ollama {REQUIRES} or later, which takes the chat template from the GGUF")
    made.first_steps = [f"ollama create {name} -f Modelfile", f"ollama run {name}"]
    return made


def modelfile(gguf: str, context: int, terms: str | None) -> str:
    """The Modelfile. Its grammar has no escapes, so what it cannot say is refused."""
    if not gguf.isprintable() or '"' in gguf or gguf.strip() != gguf:
        raise Refused("a Modelfile cannot name this file", file=gguf, expected="a plain name", remedy="rename it")
    lines = [
        "# The chat template is the GGUF's own, so there is no TEMPLATE here; Ollama before 0.30 would not use it.",
        f"FROM ./{gguf}",
        f"REQUIRES {REQUIRES}",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER temperature {TEMPERATURE}",
        f"PARAMETER top_p {TOP_P}",
        f"PARAMETER top_k {TOP_K}",
        f"PARAMETER min_p {MIN_P}",
        "PARAMETER repeat_penalty 1.0",
    ]
    if terms is not None:
        lines.append(f'LICENSE """{printable(terms).replace(chr(34), chr(39))}"""')
    return "\n".join(lines) + "\n"


def _readme(artifact: Artifact, chat: Chat, name: str, context: int) -> bytes:
    how = (
        f"`ollama create` copies the GGUF ({size(artifact.weight_bytes)}) into Ollama's store. With {context} tokens of context "
        f"it takes about {size(Forecast.of(artifact).total(context))} of memory. The parameters are OpenAI's: temperature 1, "
        "nothing cut off, no penalty for repetition."
    )
    template = (
        "The Modelfile has no TEMPLATE. Ollama's templates are in Go's language and gpt-oss's is not; without one, Ollama 0.30 "
        "and later has llama.cpp render the template in the GGUF, with tools, effort and channels. That is read in Ollama's "
        "source, not run here. Ollama before 0.30 would send bare prompts: REQUIRES keeps it out. Ollama's own `gpt-oss` models "
        "come with a Go template and a harmony parser of Ollama's making instead. " + chat.origin
    )
    blocks = [
        f"# {name} for Ollama\n", *map(paragraph, provenance(artifact)),
        f"    ollama create {name} -f Modelfile\n    ollama run {name}\n", paragraph(how),
        "## Chat\n", paragraph(template),
    ]  # fmt: skip
    return "\n".join(blocks).encode()

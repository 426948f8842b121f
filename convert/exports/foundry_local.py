"""Foundry Local: an ONNX folder as its cache of models has them, loadable by the ONNX Runtime that is inside it.

    local/NAME-VERSION/vVERSION/    what `foundry cache location` names has such folders; a scan finds them by
        genai_config.json           … and
        inference_model.json        … with a name; prompts are rendered by the template in the folder
        model.onnx, model.onnx.data, config.json, tokenizer, template, certificate

Foundry Local has an ONNX Runtime of its own and takes no other: an artifact that it does not load is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.certificate import FOLDER_NAME
from gptoss_convert.convert.conversion import Options, wanted
from gptoss_convert.convert.exports.amended import amended_certificate
from gptoss_convert.convert.exports.artifact import Artifact, as_json
from gptoss_convert.convert.exports.chat_files import require_chat_files
from gptoss_convert.convert.exports.genai_settings import GENAI, SAMPLING, read_settings
from gptoss_convert.convert.exports.gguf import provenance, served_context
from gptoss_convert.convert.exports.memory import CONTEXTS
from gptoss_convert.convert.exports.onnx_facts import caveats, loaded_by, resident, version_text
from gptoss_convert.convert.exports.package import Package, Request, require_kind, require_name
from gptoss_convert.convert.exports.words import paragraph, size, table
from gptoss_convert.convert.onnx_layout import Variant
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.source_onnx import variant_of
from gptoss_convert.convert.target_onnx import OLDEST, choose_variant, oldest_runtime
from gptoss_convert.errors import Refused, UsageError
from gptoss_convert.formats.files import parse_json

PLATFORM = "foundry-local"
CARD = "inference_model.json"
RUNTIMES = {(1, 31): "SDK 2.2.1", (1, 28): "the SDK's sources of August 2026", (1, 26): "command line 0.10.3"}
"""ONNX Runtime → what of Foundry Local has it; read in the SDK's wheel, its repository, and a report of the command line's."""
DEFAULT, COMMAND_LINE = (1, 31), (1, 26)
PREFILL = 512  # tokens: of a longer prompt onnxruntime-genai would hold the logits of every position at once
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,9})?"
_VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})(\.\d{1,6})?", re.ASCII)
require_own_name = partial(require_name, pattern=_NAME, what="a model of Foundry Local's", most=96)
_F32 = 4
_CHANNELS = (
    "Foundry Local's library knows nothing of harmony's channels: its answers may have `<|channel|>analysis` and the like in "
    "their text, and the application must part them"
)


@dataclass(frozen=True)
class _Model:
    name: str
    version: int

    @property
    def folder(self) -> str:
        return f"local/{self.name}-{self.version}/v{self.version}/"


def package(artifact: Artifact, request: Request) -> Package:
    """The cache's folder of one model, and README.md."""
    require_kind(artifact, PLATFORM, ("onnx",), _remedy(DEFAULT), "it loads ONNX")
    variant = variant_of(artifact.path)
    _require_loadable(artifact.path, variant, _runtime(request.engine))
    chat = require_chat_files(artifact, PLATFORM)
    context, model = _context(artifact.config, request, variant), _model(artifact, request, variant)
    settings = read_settings(artifact, variant, chat.ends.values())
    settings.document["search"] |= {"max_length": context, "chunk_size": PREFILL}
    made = Package(notes=[*chat.notes, *settings.notes])
    inside: dict[str, bytes] = {
        GENAI: settings.text(),
        CARD: as_json({"Name": f"{model.name}:{model.version}", "PromptTemplate": None}),
        **{name: data for name, data in chat.replaced.items() if name != FOLDER_NAME},
    }
    made.copy(artifact, model.folder)
    made.files |= {model.folder + name: data for name, data in inside.items()}
    if (certificate := amended_certificate(artifact, inside, PLATFORM)) is not None:
        made.files[model.folder + FOLDER_NAME] = certificate
    made.files["README.md"] = _readme(artifact, variant, model, context)
    made.notes += [*_notes(variant), _CHANNELS]
    made.first_steps = [
        *([f"foundry --version (must be {later})"] if (later := _later(variant)) else []),
        "foundry cache location",
        "copy the folder local into what that names",
        "foundry cache list",
        f"foundry model run {model.name}",
    ]
    return made


def foresee(_: str, source: Source, options: Options, request: Request) -> None:
    """Refuse, before the conversion, what package() would refuse of its result."""
    variant = choose_variant(source, wanted(options))
    _require_loadable(source.path, variant, _runtime(request.engine))
    if name := request.name or options.name:
        require_own_name(name)
    _context(source.config, request, variant)


def kv_cache(config: ModelConfig, variant: Variant, context: int) -> int:
    """Bytes of keys and values in f32, which onnxruntime-genai allocates for all of `context` at once."""
    window = config.sliding_window if variant.window_cache else context
    a_token = 2 * config.kv_rows * _F32
    return a_token * sum(window if slides else context for slides in config.sliding)


def logits(config: ModelConfig) -> int:
    """Bytes of the logits of one piece of a prompt, in f32."""
    return PREFILL * config.vocab * _F32


def _runtime(engine: str | None) -> tuple[int, int]:
    """The ONNX Runtime for which the folder is."""
    if engine is None:
        return DEFAULT
    match = _VERSION.fullmatch(engine)
    if match is None:
        raise UsageError(
            "--engine of foundry-local is the ONNX Runtime inside it", found=engine,
            expected="; ".join(f"{version_text(version)} ({what})" for version, what in RUNTIMES.items()) + "; or a later one",
        )  # fmt: skip
    runtime = (int(match[1]), int(match[2]))
    if runtime < OLDEST:
        raise UsageError(
            "this ONNX Runtime cannot compute gpt-oss rightly", found=f"--engine {engine}",
            expected=f"{version_text(OLDEST)} or later",
        )  # fmt: skip
    return runtime


def _require_loadable(path: Path, variant: Variant, runtime: tuple[int, int]) -> None:
    needs = oldest_runtime(variant)
    if needs <= runtime:
        return
    mxfp4, asked = variant.experts == "mxfp4", version_text(runtime)
    raise Refused(
        f"Foundry Local with ONNX Runtime {asked} ({RUNTIMES.get(runtime, '--engine')}) does not load this folder",
        file=path,
        found=f"{'experts mxfp4, which need' if mxfp4 else 'a cache of windows, which needs'} ONNX Runtime {version_text(needs)}",
        expected=f"what ONNX Runtime {asked} loads",
        remedy=f"{_remedy(runtime)}{', which holds MXFP4 experts exactly as int8' if mxfp4 else f' --experts {variant.experts}'}"
        f"; or, of a Foundry Local with a later one, --engine {version_text(needs)}",
    )  # fmt: skip


def _remedy(runtime: tuple[int, int]) -> str:
    return f"gptoss-convert convert SRC DIR --to onnx --onnx-runtime {version_text(runtime)}"


def _context(config: ModelConfig, request: Request, variant: Variant) -> int:
    context, window = served_context(config, request), config.sliding_window
    if variant.window_cache and context < window:
        raise UsageError(
            "ONNX Runtime computes nothing in less context than the window that its cache keeps", found=f"--context {context}",
            expected=f"at least {window}",
        )  # fmt: skip
    return context


def _model(artifact: Artifact, request: Request, variant: Variant) -> _Model:
    """What Foundry Local calls it: as asked, as the folder says, or by what it is."""
    name = request.name or _own_name(artifact) or f"{artifact.model}-{variant.experts}-cpu"
    require_own_name(name)
    stem, _, version = name.partition(":")
    return _Model(stem, int(version or 1))


def _own_name(artifact: Artifact) -> str | None:
    """The name that the folder was given when it was converted."""
    if CARD not in artifact.files:
        return None
    place = artifact.files[CARD]
    data = place.read_bytes()
    name = parse_json(data, place).get("Name")
    artifact.require_certified(CARD, data)
    if not isinstance(name, str):
        return None
    try:
        return require_own_name(name)
    except UsageError as error:
        error.file, error.remedy = str(place), "say another: --name NAME[:VERSION]"
        raise


def _notes(variant: Variant) -> list[str]:
    needs = oldest_runtime(variant)
    older = [f"{RUNTIMES[v]} (ONNX Runtime {version_text(v)})" for v in sorted(RUNTIMES) if v < needs]
    notes = (
        [f"does not load in Foundry Local's {' or '.join(older)}; for these {_remedy(COMMAND_LINE)}"] if older else []
    )
    return [*notes, *caveats(variant)]


def _later(variant: Variant) -> str | None:
    """Which command line loads it, where the known one does not."""
    if oldest_runtime(variant) <= COMMAND_LINE:
        return None
    known = RUNTIMES[COMMAND_LINE].removeprefix("command line ")
    return (
        f"later than {known}, whose ONNX Runtime {version_text(COMMAND_LINE)} does not load this folder; "
        f"else take the SDK, or {_remedy(COMMAND_LINE)}"
    )


def _readme(artifact: Artifact, variant: Variant, model: _Model, context: int) -> bytes:
    config = artifact.config
    parts: Mapping[str, Any] = {
        part: getattr(variant, part) for part in ("experts", "attention", "router", "embedding", "head")
    }
    what = (
        f"Copy the folder `local` into the folder that `foundry cache location` names; `foundry cache list` then shows "
        f"`{model.name}`. Or let Foundry Local look here: `foundry cache cd THIS_FOLDER`. An application "
        "with Foundry Local's SDK has a cache of its own: copy `local` into that."
    )
    memory = (
        f"Weights: {size(artifact.weight_bytes)}. {resident(variant)} Keys and values are f32, and their "
        f"cache is allocated for `search.max_length` of `{GENAI}` ({context} tokens here) when a conversation begins. A prompt "
        f"is read {PREFILL} tokens at a time (`search.chunk_size`); the logits of such a piece are {size(logits(config))}."
    )
    contexts = sorted({context, *(n for n in CONTEXTS if n <= config.max_positions)})
    rows = ((n, size(kv_cache(config, variant, n))) for n in contexts)
    known = f"Foundry Local itself was not run. {loaded_by(variant)} {_CHANNELS}. {SAMPLING}"
    blocks = [
        f"# {model.name} for Foundry Local\n", *map(paragraph, provenance(artifact, model.folder)),
        *([paragraph(f"The command line must be {later}.")] if (later := _later(variant)) else []),
        f"    foundry cache location\n    cp -r local THAT_FOLDER/\n    foundry model run {model.name}\n", paragraph(what),
        paragraph("Held as: " + ", ".join(f"{part} {kind}" for part, kind in parts.items()) + "."),
        "## Memory\n", paragraph(memory), table(("context", "keys and values"), rows, "rr"),
        "## What is known of it\n", paragraph(known), *(paragraph(note[0].upper() + note[1:] + ".") for note in _notes(variant)),
    ]  # fmt: skip
    return "\n".join(blocks).encode()

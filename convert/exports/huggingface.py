"""Hugging Face: the artifact as a repository, with a model card that says what it is, what it cost and how it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptoss_convert import __version__
from gptoss_convert.convert.artifact_card import CARD, SOURCE_CARD
from gptoss_convert.convert.certificate import FOLDER_NAME
from gptoss_convert.convert.exports.amended import amended_certificate
from gptoss_convert.convert.exports.artifact import KINDS, Artifact
from gptoss_convert.convert.exports.chat import GENERATION, Chat, generation_config, require_chat
from gptoss_convert.convert.exports.genai_settings import GENAI, SAMPLING, read_settings
from gptoss_convert.convert.exports.gguf import provenance
from gptoss_convert.convert.exports.onnx_facts import caveats, loaded_by, resident
from gptoss_convert.convert.exports.package import Package, Request, require_kind, require_name
from gptoss_convert.convert.exports.quality import quality_section
from gptoss_convert.convert.exports.words import code, paragraph, shell_word, size, table
from gptoss_convert.convert.model_card import front_matter
from gptoss_convert.convert.source_onnx import variant_of
from gptoss_convert.errors import UsageError

PLATFORM = "huggingface"
LOADING = "LOADING.md"
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB = "https://huggingface.co/"
_BASE = re.compile(r"general\.base_model\.\d+\.repo_url")
SERVED = tuple(kind for kind in KINDS if kind != "original")
_INTEGERS = ("int4", "int8", "int8-g32")
_KEPT = ("license", "license_name", "license_link", "language", "datasets")
_LIBRARY = {"mxfp4": "transformers", "bf16": "transformers", "gguf": "gguf", "onnx": "onnx"}
_TAGS = {
    "mxfp4": ["mxfp4", "vllm"], "bf16": ["vllm"], "gguf": ["gguf", "llama.cpp"], "onnx": ["onnx", "onnxruntime-genai"],
    "int4": ["compressed-tensors", "int4", "vllm"], "int8": ["compressed-tensors", "int8", "vllm"],
    "int8-g32": ["compressed-tensors", "int8", "vllm"],
}  # fmt: skip
_WHAT = {
    "mxfp4": "in the official layout: experts in MXFP4, the rest in bf16",
    "bf16": "with every weight in bfloat16",
    "gguf": "as GGUF, for llama.cpp and what is built on it",
    "onnx": "as ONNX, for ONNX Runtime GenAI",
    "int4": "W4A16: experts and attention as 4-bit integers in groups of 32 (compressed-tensors)",
    "int8": "W8A8: experts and attention as 8-bit integers, a scale for each output (compressed-tensors)",
    "int8-g32": "W8A16: experts as 8-bit integers in groups of 32 (compressed-tensors)",
}
_TRANSFORMERS = """\
    from transformers import pipeline
    chat = pipeline("text-generation", model="{name}", dtype="auto", device_map="auto")
    print(chat([{{"role": "user", "content": "Hello!"}}], max_new_tokens=256)[0]["generated_text"][-1])
"""
_GENAI = """\
    import json
    import onnxruntime_genai as og
    model = og.Model("model")
    tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
    params.set_search_options(max_length=4096)
    generator, words = og.Generator(model, params), tokenizer.create_stream()
    messages = json.dumps([{{"role": "user", "content": "Hello!"}}])
    prompt = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    generator.append_tokens(tokenizer.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        print(words.decode(generator.get_next_tokens()[0]), end="", flush=True)
"""
_OPENAIS = "Sampling as OpenAI has it: temperature 1.0, top-p 1.0, nothing else cut off."
_CARDS = {LOADING: "What loads it, from which version on, and what loads it wrongly", SOURCE_CARD: "The source's card"}
_RUN = {
    "mxfp4": "    vllm serve {name}\n\n" + _TRANSFORMERS,
    "bf16": "    vllm serve {name}\n\n" + _TRANSFORMERS,
    "int4": "    vllm serve {name} --moe-backend humming        # vLLM 0.31 to 0.33; LOADING.md has the rest\n",
    "int8": "    vllm serve {name}                              # vLLM 0.29 to 0.33, one GPU; LOADING.md has the rest\n",
    "int8-g32": "    vllm serve {name} --moe-backend humming        # vLLM 0.31 to 0.33; LOADING.md has the rest\n",
    "gguf": (
        "    hf download {name} --local-dir model\n"
        "    llama-server -m {first} --jinja --temp 1.0 --top-p 1.0 --top-k 0 --min-p 0 -c 16384\n"
    ),
    "onnx": "    hf download {name} --local-dir model\n\n" + _GENAI,
}  # fmt: skip


def package(artifact: Artifact, request: Request) -> Package:
    """The artifact's files, its card as README.md; cards that were there keep their text under other names."""
    require_kind(artifact, PLATFORM, SERVED, "gptoss-convert convert SRC DIR --to hf", "no library of the hub loads it")
    chat = require_chat(artifact, PLATFORM)
    name = require_own_name(request.name or f"OWNER/{artifact.model}-{artifact.kind}")
    if request.base_model is not None:
        require_repository(request.base_model, "a base model")
    made = Package()
    made.copy(artifact)
    if CARD in made.files:
        other = LOADING if artifact.kind in _INTEGERS else SOURCE_CARD
        if other not in made.files:
            made.files[other] = made.files[CARD]
    if artifact.kind != "gguf" and (defaults := generation_config(artifact, chat)) is not None:
        made.files[GENERATION] = defaults
        made.notes.append(f"{GENERATION} was completed: every end token stops generation")
    if artifact.kind == "onnx":
        settings = read_settings(artifact, variant_of(artifact.path), chat.ends.values())
        if settings.notes:
            made.files[GENAI] = settings.text()
            made.notes += settings.notes
    matter = card_matter(artifact, request.base_model)
    made.files[CARD] = model_card(artifact, chat, name, matter, made.files, request.quality)
    small = {name: data for name, data in made.files.items() if isinstance(data, bytes)}
    renamed = {n: CARD for n in (LOADING, SOURCE_CARD) if n in made.files and made.files[n] == artifact.files.get(CARD)}
    if (certificate := amended_certificate(artifact, small, PLATFORM, renamed)) is not None:
        made.files[FOLDER_NAME] = certificate
    if "base_model" not in matter:
        made.notes.append("the card names no base model: say --base-model OWNER/NAME")
    if "license" not in matter:
        made.notes.append("the card names no licence, because the artifact does not: add one to README.md")
    made.first_steps = [
        f"hf upload {name} . (in that folder), or gptoss-convert export … --for huggingface --name OWNER/NAME --push"
    ]
    return made


def require_repository(name: str, what: str) -> str:
    """A name by the hub client's own rules, or UsageError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

    require_name(name, REPOSITORY, what, 96)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"not a name for {what}",
            found=name,
            expected="OWNER/NAME without --, .. or .git, ending in a letter or digit",
        ) from error
    return name


require_own_name = partial(require_repository, what="a repository")


def card_matter(artifact: Artifact, base_model: str | None) -> dict[str, Any]:
    """The card's front matter. What the source's card says of the licence stays true of what is made from it."""
    made = artifact.certificate
    official = bool(made and made["source"]["official_weights"] and artifact.config.release)
    cards = [artifact.small(CARD), _source_card(artifact)]
    theirs: dict[str, Any] = _gguf_matter(artifact)
    for card in filter(None, cards):
        theirs |= front_matter(card)
    matter: dict[str, Any] = {key: theirs[key] for key in _KEPT if key in theirs}
    if "license" not in matter and official:
        matter = {"license": "apache-2.0", **matter}
    base = base_model or (f"openai/{artifact.config.release}" if official else None)
    if base is not None:
        matter |= {"base_model": base, "base_model_relation": "quantized"}
    elif "base_model" in theirs:
        matter["base_model"] = theirs["base_model"]
    matter |= {"pipeline_tag": "text-generation", "library_name": _LIBRARY.get(artifact.kind, "vllm")}
    tags = theirs.get("tags", [])
    named = [tags] if isinstance(tags, str) else tags
    matter["tags"] = list(dict.fromkeys([*named, "gpt_oss", *_TAGS[artifact.kind], "conversational"]))
    return matter


def _gguf_matter(artifact: Artifact) -> dict[str, Any]:
    """What a GGUF's own keys say of licence and base model. A licence with a name of its own is "other" on the hub."""
    metadata = artifact.source.metadata
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    found: dict[str, Any] = {key: str(metadata[name].value) for key, name in keys.items() if name in metadata}
    if found:
        found = {"license": "other", **found}
    addresses = [str(value.value) for name, value in metadata.items() if _BASE.fullmatch(name)]
    bases = [address.removeprefix(_HUB) for address in addresses if re.fullmatch(_HUB + REPOSITORY, address, re.ASCII)]
    return {**found, **({"base_model": bases[0] if len(bases) == 1 else bases} if bases else {})}


def _source_card(artifact: Artifact) -> bytes | None:
    path = artifact.files.get(SOURCE_CARD)
    return None if path is None or path.stat().st_size > 1 << 20 else path.read_bytes()


def model_card(
    artifact: Artifact,
    chat: Chat,
    name: str,
    matter: Mapping[str, Any],
    files: Mapping[str, object],
    quality: Path | None,
) -> bytes:
    """README.md."""
    import yaml

    front = yaml.safe_dump(dict(matter), sort_keys=False, allow_unicode=True, width=1000)
    bits = 8 * artifact.weight_bytes / artifact.config.parameters
    rows = [
        (
            code(weights),
            size(artifact.files[weights].stat().st_size),
            f"`{artifact.digest(weights) or 'see SHA256SUMS'}`",
        )
        for weights in artifact.weights
    ]
    sizes = (
        f"{size(artifact.weight_bytes)} for {artifact.config.parameters / 1e9:.2f} billion parameters: {bits:.2f} bits each. "
        "`sha256sum -c SHA256SUMS` checks every file."
    )
    measured = (
        paragraph("Not measured. `gptoss-convert compare` measures it.")
        if quality is None
        else quality_section(artifact, quality)
    )
    ends = ", ".join(f"`{token}` {index}" for token, index in chat.ends.items())
    others = [
        paragraph(f"{what}: [{other}]({other}).")
        for other, what in _CARDS.items()
        if other in files
    ]  # fmt: skip
    blocks = [
        f"---\n{front}---\n",
        f"# {name.partition('/')[2]}\n",
        paragraph(f"{artifact.model} {_WHAT[artifact.kind]}. Written by gptoss-convert {__version__}."),
        *map(paragraph, provenance(artifact)), *others,
        "## Size\n", table(("file", "size", "SHA-256"), rows, "lrl"), paragraph(sizes),
        "## Quality\n", measured,
        "## How to run\n", _RUN[artifact.kind].format(name=name, first=shell_word(artifact.weights[0], "model/")),
        paragraph(f"{SAMPLING if artifact.kind == 'onnx' else _OPENAIS} Nothing here was run on a GPU."),
        *_of_onnx(artifact),
        "## Chat\n", paragraph(f"The format is harmony: answers come in channels. Generation ends at {ends}. {chat.origin}"),
        "## Licence\n", paragraph(_terms(matter)),
    ]  # fmt: skip
    return "\n".join(blocks).encode()


def _of_onnx(artifact: Artifact) -> list[str]:
    if artifact.kind != "onnx":
        return []
    variant = variant_of(artifact.path)
    return [paragraph(f"{loaded_by(variant)} {resident(variant)}"), paragraph(". ".join(caveats(variant)) + ".")]


def _terms(matter: Mapping[str, Any]) -> str:
    if "license" not in matter:
        return "The artifact does not say."
    link = f" ({matter['license_link']})" if "license_link" in matter else ""
    return f"{matter.get('license_name', matter['license'])}{link}, as the model that it was made from."

"""What the inspector learns of a source beside its tensors: tokenizer, chat templates, other files in the folder.

Templates are hashed and never rendered, pickles are told by their first bytes and never opened.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, ReadOnce, companion_bytes
from gptoss_convert.convert.official import OPENAI, load, official_name_of
from gptoss_convert.convert.source import Layout, Source
from gptoss_convert.errors import GptOssError
from gptoss_convert.formats.files import SourceFile, parse_json
from gptoss_convert.formats.metal import read_header as read_metal_header
from gptoss_convert.formats.sniff import EXECUTABLE, HEAD_BYTES, Kind, identify
from gptoss_convert.formats.tree import TreeFile

ERROR, WARNING = "error", "warning"
TENSOR_KINDS = frozenset({Kind.SAFETENSORS, Kind.GGUF, Kind.METAL})
BROKEN_KINDS = frozenset({Kind.LFS_POINTER, Kind.ZEROS})


@dataclass(frozen=True)
class Oddity:
    """Something odd. severity: ERROR would stop a conversion, WARNING would not; where: a tensor, a file or a key."""

    severity: str
    thing: str
    where: str
    found: str | None = None
    expected: str | None = None


# --- tokenizer and templates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A tokenizer or a chat template: its digest, and which official file has the same one (None: no official file)."""

    kind: str
    where: str
    nbytes: int
    sha256: str
    official: str | None


def documents(source: Source, beside: list[TreeFile]) -> tuple[list[Document], list[Oddity]]:
    """The tokenizer and every chat template of a source, and what is odd about them."""
    found, odd = _tokenizer(source)
    for where, text in _templates(source, beside, odd):
        found.append(_document("chat template", where, text))
    for document in found:
        if document.official is None:
            thing = f"the {document.kind} is not an official one"
            digest = f"sha256 {document.sha256}"
            odd.append(Oddity(WARNING, thing, document.where, digest, "the digest of an official file"))
    if not any(document.kind == "chat template" for document in found):
        odd.append(Oddity(WARNING, "there is no chat template", str(source.path), expected=TEMPLATE))
    return found, odd


def _document(kind: str, where: str, text: bytes) -> Document:
    sha256 = hashlib.sha256(text).hexdigest()
    pins = [pin for pin in load().by_digest(sha256) if pin.publisher.startswith(OPENAI)]
    official = official_name_of(sha256) or (f"{pins[0].name}, {pins[0].authority}" if pins else None)
    return Document(kind, where, len(text), sha256, official)


def _tokenizer(source: Source) -> tuple[list[Document], list[Oddity]]:
    if source.layout is Layout.METAL:
        # The last tokens of the release are not in the file, so only the text tokens can be compared.
        tokens = read_metal_header(source.files[0]).tokens
        ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
        return [_document("tokenizer", f"text tokens of {source.path.name}, as tiktoken lists them", ranks)], []
    if TOKENIZER not in source.companions:
        thing = "there is no tokenizer that can be compared"
        return [], [Oddity(WARNING, thing, str(source.path), expected=TOKENIZER)]
    where = f"{TOKENIZER}, rebuilt from the metadata" if source.layout is Layout.GGUF else TOKENIZER
    try:
        return [_document("tokenizer", where, companion_bytes(source.companions[TOKENIZER]))], []
    except Exception as error:  # the tokenizer library raises plain Exceptions for lists that do not fit together
        return [], [Oddity(ERROR, "the tokenizer cannot be read", where, _reason(error))]


def _templates(source: Source, beside: list[TreeFile], odd: list[Oddity]) -> Iterator[tuple[str, bytes]]:
    """Every template with its place; what cannot be read goes to `odd`."""
    for key, value in source.metadata.items():
        if key.startswith("tokenizer.chat_template") and isinstance(value.value, str):
            yield key, value.value.encode("utf-8", "surrogateescape")
    if source.layout is Layout.GGUF:
        return
    files = {file.name: ReadOnce(file.path) for file in beside if file.name.startswith("additional_chat_templates/")}
    files |= {file.name: ReadOnce(file.path) for file in beside if file.name == "chat_template.json"}
    for name, companion in {**source.companions, **files}.items():
        try:
            if name.endswith(".jinja"):
                yield name, companion_bytes(companion)
            elif name in ("tokenizer_config.json", "chat_template.json"):
                table = parse_json(companion_bytes(companion), name)
                yield from _inline(name, table.get("chat_template"))
        except GptOssError as error:
            odd.append(Oddity(ERROR, "the file cannot be read", name, _reason(error)))


def _inline(name: str, value: object) -> Iterator[tuple[str, bytes]]:
    """Templates inside a JSON file: one text, or a list of names and texts."""
    pairs = [("", value)]
    if isinstance(value, list):
        pairs = [(f" {item.get('name')}", item.get("template")) for item in value if isinstance(item, dict)]
    elif isinstance(value, dict):
        pairs = [(f" {key}", text) for key, text in value.items()]
    for which, text in pairs:
        if isinstance(text, str):
            yield f"{name}: chat_template{which}", text.encode("utf-8", "surrogatepass")


def _reason(error: Exception) -> str:
    return error.what if isinstance(error, GptOssError) else f"{type(error).__name__}: {error}"


# --- files beside ---------------------------------------------------------------------------------------------------


def kinds_of(files: list[TreeFile]) -> dict[str, Kind | None]:
    """What each file is, by its first bytes."""
    kinds = {}
    for entry in files:
        with SourceFile(entry.path) as file:
            kinds[entry.name] = identify(bytes(file.read(0, min(file.size, HEAD_BYTES))))
    return kinds


def odd_files(kinds: Mapping[str, Kind | None], read: set[str]) -> list[Oddity]:
    """Files beside the weights that nobody expects there; `read`: the names of the weights."""
    odd = []
    for name, kind in kinds.items():
        if name in read or kind is None:
            continue
        if kind in EXECUTABLE:
            odd.append(Oddity(WARNING, "a pickle lies beside; it is not opened", name, kind.value))
        elif kind in BROKEN_KINDS:
            odd.append(Oddity(WARNING, "the file is not what its name says", name, kind.value))
        elif kind in TENSOR_KINDS and "/" not in name:
            odd.append(Oddity(WARNING, "tensors lie beside that are not read", name, kind.value))
    return odd

"""What is to be exported: a converted folder or GGUF, what it holds, and what its certificate says of it.

The kind is told by what is there, never by a name:

    gguf        GGUF, whole or split                        mxfp4     safetensors, the official HF layout
    bf16        safetensors, fused experts in bfloat16      int4      compressed-tensors, W4A16 groups of 32
    int8        compressed-tensors, W8A8 a channel          int8-g32  compressed-tensors, W8A16 groups of 32
    onnx        model.onnx with genai_config.json           original  the reference code's layout
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.certificate import FOLDER_NAME, file_name
from gptoss_convert.convert.companions import companion_bytes
from gptoss_convert.convert.names import GATE_UP, layer_name
from gptoss_convert.convert.source import Layout, Source, open_source
from gptoss_convert.errors import BadInput, DigestMismatch, Refused
from gptoss_convert.formats.files import MAX_JSON_BYTES, parse_json
from gptoss_convert.formats.tree import walk

MANIFEST, SUMS = "gptoss-export.json", "SHA256SUMS"  # of an export: its lists of files are true of that alone
KINDS = ("gguf", "mxfp4", "bf16", "int4", "int8", "int8-g32", "onnx", "original")
_BY_LAYOUT = {Layout.HF: "mxfp4", Layout.BF16: "bf16", Layout.ORIGINAL: "original", Layout.GGUF: "gguf"}
_BY_CODEC = {"int4_g32": "int4", "int8_g32": "int8-g32", "int8_channel": "int8"}


@dataclass(frozen=True)
class Artifact:
    """An artifact opened for export. files: every file of it by its name in the folder, small ones too, but an export's lists."""

    path: Path
    kind: str
    source: Source
    files: Mapping[str, Path]
    certificate: Mapping[str, Any] | None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.source.config

    @property
    def model(self) -> str:
        """gpt-oss-20b, gpt-oss-120b, or what its own widths are called."""
        return self.config.release or "gpt-oss"

    @property
    def weights(self) -> list[str]:
        """Names of the files that hold tensors, in order."""
        return sorted(name for name in self.files if Path(name).suffix in (".gguf", ".safetensors", ".onnx", ".data"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of these."""
        return sum(self.files[name].stat().st_size for name in self.weights)

    @property
    def certificate_name(self) -> str | None:
        """The name of the certificate among `files`, if it has one."""
        return _certificate_name(self.path, self.files)

    @property
    def official(self) -> bool:
        """Whether the certificate says that it was made from the official weights, losing nothing."""
        made = self.certificate
        return made is not None and bool(made["source"]["official_weights"]) and made["lost"] == []

    def small(self, name: str) -> bytes | None:
        """A small file beside the weights, or None: of a GGUF, which has its tokenizer within, always None."""
        companion = self.source.companions.get(name)
        return None if companion is None else companion_bytes(companion)

    def digest(self, name: str) -> str | None:
        """SHA-256 of a file as the certificate has it."""
        if self.certificate is None:
            return None
        found = {file["name"]: file["sha256"] for file in self.certificate["artifact"]["files"]}
        return found.get(name)

    def require_certified(self, name: str, data: bytes) -> None:
        """As require_digest, of a small file that an export does not copy but reads."""
        self.require_digest(name, hashlib.sha256(data).hexdigest())

    def require_digest(self, name: str, sha256: str) -> None:
        """DigestMismatch where the certificate has another SHA-256 of a file."""
        promised = self.digest(name)
        if promised is not None and promised != sha256:
            raise DigestMismatch(
                "a file of the artifact is not the one that its certificate names", file=self.files[name], found=sha256,
                expected=promised, remedy="gptoss-convert verify tells which files are whole; convert again",
            )  # fmt: skip


@contextmanager
def open_artifact(path: Path) -> Iterator[Artifact]:
    """The artifact at a path: what any source is opened from, and sound."""
    with open_source(path) as source:
        source.require_sound()
        files = _files(path, source)
        yield Artifact(path, _kind(path, source), source, files, _certificate(path, files))
        source.check_unchanged()


def _kind(path: Path, source: Source) -> str:
    if path.is_dir() and (path / "genai_config.json").is_file():
        return "onnx"
    if source.layout is Layout.COMPRESSED:
        encoding = source.views[layer_name(0, GATE_UP)].encoding
        if encoding in _BY_CODEC:
            return _BY_CODEC[encoding]
    if source.layout in _BY_LAYOUT:
        return _BY_LAYOUT[source.layout]
    if source.layout is Layout.ONNX:
        raise Refused(
            "an ONNX folder without genai_config.json, by which every runtime of it loads a model", file=path,
            found="no such file", expected="genai_config.json", remedy="gptoss-convert convert SRC DIR --to onnx",
        )  # fmt: skip
    raise Refused(
        "a checkpoint in this layout is no artifact to deploy", file=path, found=str(source.layout),
        expected="what gptoss-convert convert writes", remedy="convert it first: gptoss-convert convert SRC DIR --to bf16",
    )  # fmt: skip


def _files(path: Path, source: Source) -> dict[str, Path]:
    if path.is_dir():
        return {str(entry.name): entry.path for entry in walk(path) if str(entry.name) not in (MANIFEST, SUMS)}
    found = {file.path.name: file.path for file in source.files}
    beside = path.parent / file_name(path.name)
    if not beside.is_file() and len(found) > 1 and _lists(path.parent / FOLDER_NAME, found):
        beside = path.parent / FOLDER_NAME  # the parts of a split GGUF have one in their folder
    return found | ({beside.name: beside} if beside.is_file() else {})


def _lists(place: Path, names: Iterable[str]) -> bool:
    """Whether there is a certificate with these files in it."""
    if not place.is_file() or place.stat().st_size > MAX_JSON_BYTES:
        return False
    document = parse_json(place.read_bytes(), place)
    return _is_whole(document) and set(names) <= {file["name"] for file in document["artifact"]["files"]}


def _certificate_name(path: Path, files: Mapping[str, Path]) -> str | None:
    known = (FOLDER_NAME,) if path.is_dir() else (file_name(path.name), FOLDER_NAME)
    return next((name for name in known if name in files), None)


def _certificate(path: Path, files: Mapping[str, Path]) -> Mapping[str, Any] | None:
    name = _certificate_name(path, files)
    if name is None or files[name].stat().st_size > MAX_JSON_BYTES:
        return None
    place = files[name]
    document = parse_json(place.read_bytes(), place)
    if "artifact" not in document or "source" not in document:
        return None
    if not _is_whole(document):
        raise BadInput(
            "the certificate is not one that this tool wrote", file=place, found="a part that is missing or of another type",
            expected="source.official_weights, lost, artifact.files", remedy="convert again, or remove the certificate",
        )  # fmt: skip
    return document


def _is_whole(document: Mapping[str, Any]) -> bool:
    """Whether the parts of a certificate that are read here are there and of their types."""
    try:
        source, lost, files = document["source"], document["lost"], document["artifact"]["files"]
        return (
            isinstance(source["official_weights"], bool)
            and isinstance((source.get("template") or {}).get("sha256", ""), str)
            and isinstance(lost, list | None)
            and isinstance(document["artifact"].get("notes", []), list)
            and all(isinstance(file["name"], str) and isinstance(file["sha256"], str) for file in files)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def as_json(document: object) -> bytes:
    """A small file of JSON, as every export writes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

"""The small files that travel with the weights: tokenizer, template, generation defaults, licence, model card.

They are read and carried as bytes; templates are compared and copied, never rendered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.tree import walk

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    TEMPLATE,
    "generation_config.json",
    "README.md",
    "LICENSE",
    "USAGE_POLICY",
)
Companion = bytes | Callable[[], bytes]
MAX_BYTES = 128 << 20


class ReadOnce:
    """A file read when it is first needed and kept: what is used, digested and copied is one and the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._data: bytes | None = None

    def __call__(self) -> bytes:
        with self._lock:
            if self._data is None:
                self._data = _read(self.path)
            return self._data


def collect_companions(folder: Path) -> dict[str, Companion]:
    """The companion files of a folder by name, links resolved by the rules of `tree.walk`."""
    found = {entry.name: entry.path for entry in walk(folder)}
    return {name: ReadOnce(found[name]) for name in NAMES if name in found}


def companion_bytes(companion: Companion) -> bytes:
    """The bytes of a companion: read from its file, or made when it is rebuilt from what the source holds."""
    return companion if isinstance(companion, bytes) else companion()


def _read(path: Path) -> bytes:
    with SourceFile(path) as file:
        if file.size > MAX_BYTES:
            raise BadInput("a small file is unreasonably large", file=path, found=file.size)
        return bytes(file.read(0, file.size))

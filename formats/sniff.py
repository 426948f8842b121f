"""What a file is, told from its first bytes alone, so that a wrong file is named and never opened as something else.

Nothing is parsed or executed: a pickle in particular is recognised in order to be refused, whatever its file name.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from enum import Enum

# Enough for the magic of a tar archive (at 257) and for telling text from binary data.
HEAD_BYTES = 512

# The largest header that the safetensors format allows, in bytes.
MAX_SAFETENSORS_HEADER = 100_000_000


class Kind(Enum):
    """A recognised content; the value is the sentence shown to people."""

    EMPTY = "an empty file"
    ZEROS = "zero bytes only (space that was reserved and never filled: an interrupted download or copy)"
    LFS_POINTER = "a git-LFS pointer, not the file itself"
    HTML = "an HTML page (a download error saved as a file)"
    XML = "an XML page (a download error saved as a file)"
    JSON = "JSON text"
    TEXT = "plain text (a download error saved as a file?)"
    PICKLE = "a Python pickle"
    ZIP = "a zip archive (a PyTorch pickle?)"
    GZIP = "a gzip archive"
    ZSTD = "a zstd archive"
    XZ = "an xz archive"
    TAR = "a tar archive"
    NUMPY = "a NumPy array file"
    HDF5 = "an HDF5 file"
    GGUF = "a GGUF file"
    SAFETENSORS = "a safetensors file"
    METAL = "a gpt-oss metal model.bin"


# Kinds that run code when they are loaded the way their makers intend, or that hold files that do.
EXECUTABLE = frozenset({Kind.PICKLE, Kind.ZIP})

_MAGICS: tuple[tuple[bytes, Kind], ...] = (
    (b"GGUF", Kind.GGUF),
    (b"GPT-OSS v1.0\0", Kind.METAL),
    (b"version https://git-lfs.github.com/spec/", Kind.LFS_POINTER),
    (b"PK\x03\x04", Kind.ZIP),
    (b"PK\x05\x06", Kind.ZIP),
    (b"\x1f\x8b", Kind.GZIP),
    (b"\x28\xb5\x2f\xfd", Kind.ZSTD),
    (b"\xfd7zXZ\0", Kind.XZ),
    (b"\x93NUMPY", Kind.NUMPY),
    (b"\x89HDF\r\n\x1a\n", Kind.HDF5),
)

# Protocols 2 to 5 announce themselves: PROTO, the version, then an opcode.
_PICKLE_BINARY = re.compile(rb"\x80[\x02-\x05][\x80-\x97()\].}cBCGIJKLMNSTUVX]")
# Protocols 0 and 1 start with an opcode of their own: a global, an instance, or a container that is memoised at once.
_PICKLE_TEXT = re.compile(rb"\(?c[\w.]+\n[\w.]+\n|\(i[\w.]+\n[\w.]+\n|\([dlt]p\d+\n|[\]})]q\x00|\(lq\x00")
_HTML = re.compile(rb"<(!doctype html|html|head|body|script)\b", re.IGNORECASE)


def identify(head: bytes) -> Kind | None:
    """The kind of a file from its first bytes (512 suffice; give all of a shorter file), or None if not recognised."""
    if not head:
        return Kind.EMPTY
    if not head.strip(b"\0"):
        return Kind.ZEROS
    # First, because a header length may begin with the two bytes of gzip or of a pickle.
    if _looks_like_safetensors(head):
        return Kind.SAFETENSORS
    for magic, kind in _MAGICS:
        if head.startswith(magic):
            return kind
    if _PICKLE_BINARY.match(head) or _PICKLE_TEXT.match(head):
        return Kind.PICKLE
    if head[257:262] == b"ustar":
        return Kind.TAR
    return _text_kind(head)


def sniff(head: bytes) -> str | None:
    """A sentence that says what the file is ("a Python pickle"), or None. See `identify`."""
    kind = identify(head)
    return None if kind is None else kind.value


def _looks_like_safetensors(head: bytes) -> bool:
    """A plausible u64 header length followed by the opening brace of the JSON."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER


def _text_kind(head: bytes) -> Kind | None:
    """Pages and messages that servers send instead of a file."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if _HTML.match(text):
        return Kind.HTML
    if text.startswith(b"<?xml"):
        return Kind.XML
    try:
        # An incremental decoder forgives a last character that the end of the head cuts.
        characters = getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return None
    if not all(c.isprintable() or c in "\t\r\n" for c in characters):
        return None
    return Kind.JSON if text[:1] in (b"{", b"[") else Kind.TEXT

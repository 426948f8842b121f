"""Texts for calibration and comparison: read from a file, tokenized by the checkpoint's own tokenizer, cut into chunks.

A text is one of

- `default`: the set that comes with the package (`data/calibration.jsonl`);
- `FILE.jsonl`: one JSON object a line, a conversation (see harmony.py) or `{"text": …}`; empty lines are skipped;
- `FILE.txt`: plain UTF-8 text, taken as one document, to the token as if it were tokenized whole.

Chunks: documents follow one another in order, and whatever is `length` tokens long is a chunk. A conversation or text of a
.jsonl that does not fit into what is left of a chunk, but would fit into a whole one, starts a new chunk; a longer one, and a
.txt, is cut wherever a chunk is full. No token is lost but a single one that would be left over at the very end.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.convert import harmony
from gptoss_convert.convert.companions import TOKENIZER, companion_bytes
from gptoss_convert.errors import BadInput, Refused, UsageError
from gptoss_convert.formats.files import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gptoss_convert.convert.source import Source

DEFAULT = "default"
MAX_LINE = 64 << 20  # bytes of a line of .jsonl
_BLOCK = 1 << 16  # characters of a .txt that are read at once
_MAX_BLOCK = 1 << 20  # characters without any place to cut, after which a cut is made anyway
# Where o200k's splitting surely begins anew: after a line's end before something that neither line ends nor spaces nor a slash
# can be joined with, and before a space between a visible character and a letter.
_SEAM = re.compile(r"(?<=\n)(?=[^\s/])|(?<=\S)(?= [^\W\d_])")

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Texts:
    """Token ids in chunks. digest: SHA-256 of `length` and of every chunk's size and ids; kinds: documents by kind."""

    sequences: list[Ids]
    name: str
    digest: str
    tokens: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class _Document:
    """Some tokens. kind: None for what continues the document before; whole: not cut if a chunk can hold it."""

    ids: list[int]
    kind: str | None
    whole: bool


def read_texts(
    spec: str | Path, source: Source, length: int, limit_tokens: int | None = None, *, parse_special: bool | None = None
) -> Texts:
    """The texts that `spec` names, as chunks of at most `length` and altogether at most `limit_tokens` tokens.

    parse_special: whether `<|start|>` and the like in plain text are special tokens. Left out, they are in a .txt, because
    text that was rendered before is given that way (as to llama-imatrix with --parse-special), and are not in `{"text": …}`;
    in conversations they never are.
    """
    if length < 2 or (limit_tokens is not None and limit_tokens < 2):
        raise UsageError(
            "chunks and the limit need at least two tokens", found=f"length {length}, limit {limit_tokens}"
        )
    path, suffix = (None, ".jsonl") if spec == DEFAULT else (Path(spec), Path(spec).suffix.lower())
    if suffix not in (".jsonl", ".txt"):
        raise UsageError("not a kind of text that is read", file=spec, expected="default, FILE.txt or FILE.jsonl")
    tokenizer = load_tokenizer(source)
    to_ids = _checked(tokenizer, source.config.vocab, source.path)
    if suffix == ".txt" and path is not None:
        documents = _plain(path, to_ids, parse_special is not False)
    else:
        documents = _lines(path, to_ids, parse_special is True)
    kinds: Counter[str] = Counter()
    sequences = _chunks(documents, length, limit_tokens, kinds)
    if not sequences:
        raise BadInput("the text has fewer than two tokens", file=spec, expected="something to read")
    tokens = sum(len(sequence) for sequence in sequences)
    name = path.name if path is not None else DEFAULT
    return Texts(sequences, name, _digest(sequences, length), tokens, dict(sorted(kinds.items())))


def load_tokenizer(source: Source) -> Tokenizer:
    """The checkpoint's tokenizer, without the cutting and filling that a tokenizer.json may ask for."""
    from tokenizers import AddedToken, Tokenizer

    if TOKENIZER not in source.companions:
        raise Refused(
            "the source has no tokenizer, without which no text can be read",
            file=source.path,
            expected=TOKENIZER,
            remedy="give the folder that holds it: --tokenizer FOLDER",
        )
    try:
        tokenizer = Tokenizer.from_str(companion_bytes(source.companions[TOKENIZER]).decode())
    except (BadInput, Refused):
        raise
    except Exception as error:  # the library raises bare Exception for a file that it cannot read
        raise BadInput("the tokenizer cannot be read", file=TOKENIZER, found=str(error)[:200]) from error
    if getattr(tokenizer.model, "dropout", None):
        raise Refused("the tokenizer splits words at random", file=TOKENIZER, found="dropout", expected="null")
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.special and token.content.startswith("<|") and token.content.endswith("|>"):
            tokenizer.add_special_tokens(
                [AddedToken(token.content, special=True, normalized=False)]
            )  # as tokens.py does
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _checked(tokenizer: Tokenizer, rows: int, path: object) -> Callable[[list[harmony.Piece] | str], list[int]]:
    """Pieces, or text in which special tokens are parsed, to ids that the model has rows for."""

    def to_ids(text: list[harmony.Piece] | str) -> list[int]:
        """Their ids, each below `rows`, or Refused."""
        if isinstance(text, str):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = harmony.encode(text, tokenizer)
        if ids and max(ids) >= rows:
            raise Refused(
                "the tokenizer has a token that the model has no row for",
                file=path,
                found=f"{tokenizer.id_to_token(max(ids))!r} with id {max(ids)}",
                expected=f"ids below {rows}",
                remedy="give the tokenizer that belongs to the model",
            )
        return ids

    return to_ids


def _plain(path: Path, to_ids: Callable[[Any], list[int]], parse_special: bool) -> Iterator[_Document]:
    kind: str | None = "text"
    for block in _blocks(path):
        yield _Document(to_ids(block if parse_special else [harmony.Piece(block)]), kind, whole=False)
        kind = None


def _blocks(path: Path) -> Iterator[str]:
    """The text in stretches whose tokens, one after the other, are the whole text's."""
    kept = ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(_BLOCK):
                kept += block
                seam = max((found.start() for found in _SEAM.finditer(kept)), default=0)
                if not seam and len(kept) >= _MAX_BLOCK:
                    seam = len(kept)
                if seam:
                    yield kept[:seam]
                    kept = kept[seam:]
    except UnicodeDecodeError as error:
        raise BadInput("the text is not UTF-8", file=path, found=error.reason, expected="UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if kept:
        yield kept


def _lines(path: Path | None, to_ids: Callable[[Any], list[int]], parse_special: bool) -> Iterator[_Document]:
    for line, where in _read_lines(path):
        table = parse_json(line, where)
        text = table.get("text")
        if ("messages" in table) == ("text" in table):
            raise BadInput(
                "a line is neither a conversation nor a text, or both", file=where, found=f"keys {sorted(table)[:8]}",
                expected="messages, or text",
            )  # fmt: skip
        if "messages" in table:
            yield _Document(to_ids(harmony.render(table, where)), "conversation", whole=True)
        elif isinstance(text, str):
            yield _Document(to_ids(text if parse_special else [harmony.Piece(text)]), "text", whole=True)
        else:
            raise BadInput("text is not a text", file=where, found=repr(text)[:80], expected="a string")


def _read_lines(path: Path | None) -> Iterator[tuple[bytes, str]]:
    """Every line that is not empty, and where it is; of the default set if there is no path."""
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path or 'calibration.jsonl'}, line {number}"
                if len(line) > MAX_LINE:
                    raise BadInput("a line is unreasonably long", file=where, expected=f"at most {MAX_LINE} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield line, where
    except OSError as error:
        raise _unreadable(path, error) from error


def _open(path: Path | None) -> IO[bytes]:
    if path is not None:
        return path.open("rb")
    return importlib.resources.files("gptoss_convert").joinpath("data/calibration.jsonl").open("rb")


def _unreadable(path: Path | None, error: OSError) -> BadInput:
    return BadInput("the text cannot be read", file=path, found=error.strerror, expected="a readable file")


def _chunks(documents: Iterator[_Document], length: int, limit: int | None, kinds: Counter[str]) -> list[Ids]:
    """The chunks, by the rule at the top of this module; `kinds` counts the documents that went into them."""
    chunks: list[Ids] = []
    begun: list[int] = []
    left = limit
    for document in documents:
        ids = document.ids[:left]
        if document.kind is not None:
            kinds[document.kind] += 1
        if document.whole and len(begun) >= 2 and len(begun) + len(ids) > length >= len(ids):
            chunks.append(np.array(begun, np.int32))
            begun = []
        begun += ids
        full = len(begun) - len(begun) % length
        chunks += [np.array(begun[i : i + length], np.int32) for i in range(0, full, length)]
        begun = begun[full:]
        if left is not None:
            left -= len(ids)
            if left == 0:
                break
    if len(begun) >= 2:
        chunks.append(np.array(begun, np.int32))
    return chunks


def _digest(sequences: list[Ids], length: int) -> str:
    digest = hashlib.sha256(length.to_bytes(8, "little"))
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little") + sequence.astype("<i4").tobytes())
    return digest.hexdigest()

"""What the size, the first bytes and the header of a file already tell, before it is hashed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gptoss_convert.convert import official
from gptoss_convert.convert.official import Pin, Table
from gptoss_convert.convert.verify_report import MODEL_SUFFIXES, FileResult, Status
from gptoss_convert.convert.verify_sources import Voice
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.digests import SHA256
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.safetensors import read_header
from gptoss_convert.formats.sniff import HEAD_BYTES, Kind, identify
from gptoss_convert.formats.tree import TreeFile

# Content that stands where a file should be; never a file of a model that ends in one of these suffixes.
STAND_INS = frozenset({Kind.EMPTY, Kind.ZEROS, Kind.LFS_POINTER, Kind.HTML, Kind.XML})


def before_hashing(file: TreeFile, voices: Sequence[Voice], table: Table, quick: bool) -> FileResult | None:
    """The answer where size, first bytes or header already give it, or where `quick` leaves it at that; else None."""
    firm = [voice for voice in voices if not voice.yielding]
    top = min((voice.rank for voice in firm), default=None)
    for voice in firm:
        if voice.rank == top and not any(claim.fits(file.size) for claim in voice.claims):
            return _by_size(file, voice)
    kind = identify(head_of(file))
    if kind in STAND_INS and file.name.endswith(MODEL_SUFFIXES):
        wanted = f"the contents of a {Path(file.name).suffix} file"
        return _refuted(file, "header", kind.value, "its own contents", wanted, kind.value)
    header, fault = header_of(file)
    if fault is not None and not voices:
        return _refuted(file, "header", fault, "its own header", "a sound safetensors header", fault)
    pins = _pins_with_header(file, voices, table)
    agrees = [pin for pin in pins if pin.header_sha256 == header]
    if voices and pins and not agrees and (quick or any(pin.header_published for pin in pins)):
        reason = fault or "already the header differs: another model"
        refuted = _refuted(file, "header", reason, pins[0].authority, pins[0].header_sha256, header)
        return replace(refuted, algorithm=SHA256)
    return _unhashed(file, voices, pins, agrees) if quick else None


def _pins_with_header(file: TreeFile, voices: Sequence[Voice], table: Table) -> list[Pin]:
    """The pins whose header this file should have: those of its name, or for an unknown name those of its size."""
    pins: Iterable[Pin] = table.by_size(file.size)
    if voices:
        pins = [claim.pin for voice in voices for claim in voice.claims if claim.pin and claim.pin.size == file.size]
    return [pin for pin in pins if pin.header_sha256]


def _by_size(file: TreeFile, voice: Voice) -> FileResult:
    claim = voice.claims[0]
    assert claim.size is not None
    kind = identify(head_of(file))
    own = (Kind.SAFETENSORS, Kind.GGUF, Kind.METAL)
    if kind in STAND_INS or (kind and kind not in own and file.name.endswith(official.WEIGHT_SUFFIXES)):
        reason = kind.value
    elif file.size < claim.size:
        reason = f"truncated, or another file: {claim.size - file.size} bytes short"
    else:
        reason = f"another file: {file.size - claim.size} bytes longer"
    return _refuted(file, "size", reason, claim.authority, f"{claim.size} bytes", f"{file.size} bytes")


def _refuted(
    file: TreeFile, stage: str, reason: str, authority: str, expected: str | None, found: str | None
) -> FileResult:
    return FileResult(
        file.name, file.size, Status.MISMATCHED, reason, stage, authority=authority, expected=expected, found=found
    )


def _unhashed(file: TreeFile, voices: Sequence[Voice], pins: Sequence[Pin], agrees: Sequence[Pin]) -> FileResult:
    """The most that a quick look may say."""
    if agrees:
        reason, stage = f"header agrees with {agrees[0].authority}; contents not hashed", "header"
    elif pins:
        reason, stage = f"same size as {pins[0].name} of {pins[0].repo}, but another header", "header"
    elif voices:
        reason, stage = "size agrees or is not on record; contents not hashed", "size"
    else:
        reason, stage = "no authority knows this name; contents not hashed", "size"
    authority = voices[0].claims[0].authority if voices else None
    return FileResult(file.name, file.size, Status.UNKNOWN, reason, stage, authority=authority)


def head_of(file: TreeFile) -> bytes:
    """The first bytes, enough to tell what kind of file it is."""
    with SourceFile(file.path) as opened:
        return bytes(opened.read(0, min(HEAD_BYTES, opened.size)))


def header_of(file: TreeFile) -> tuple[str | None, str | None]:
    """The digest of a safetensors file's header, or what is wrong with that header; neither for other files."""
    if not file.name.endswith(".safetensors"):
        return None, None
    try:
        with SourceFile(file.path) as opened:
            return read_header(opened).header_sha256, None
    except BadInput as error:
        return None, f"{error.what}{f' ({error.found})' if error.found else ''}"

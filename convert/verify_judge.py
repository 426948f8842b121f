"""The answer about a file that was hashed, out of what every authority says of it."""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_convert.convert import official
from gptoss_convert.convert.official import OPENAI, Table
from gptoss_convert.convert.verify_report import FileResult, Status
from gptoss_convert.convert.verify_sources import RANK_WORD, Claim, Voice, pin_claim
from gptoss_convert.convert.verify_unhashed import head_of, header_of
from gptoss_convert.formats.digests import SHA256, FileDigest
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.sniff import identify
from gptoss_convert.formats.tree import TreeFile

TAIL_BYTES = 4096


def judge(file: TreeFile, digest: FileDigest, voices: Sequence[Voice], table: Table) -> FileResult:
    """The answer about a file that was hashed."""
    if not any(claim.pin for voice in voices for claim in voice.claims) and (pins := table.by_digest(digest.sha256)):
        voices = [Voice(RANK_WORD, tuple(pin_claim(pin) for pin in pins)), *voices]
    verified: tuple[int, Claim] | None = None
    doubts: list[str] = []
    for voice in sorted(voices, key=lambda voice: voice.rank):
        match = next((c for c in voice.claims if c.digest and c.digest == digest.get(c.algorithm)), None)
        if match is not None:
            verified = verified or (voice.rank, match)
            continue
        doubt = _doubt(file, digest, voice)
        if doubt is None and (verified is None or verified[0] == voice.rank):
            return _mismatch(file, digest, voice)
        doubts.append(doubt or f"{voice.claims[0].authority} lists another digest")
    if verified is None:
        return _unknown(file, digest, doubts)
    return _verified(file, digest, verified[1], doubts)


def _doubt(file: TreeFile, digest: FileDigest, voice: Voice) -> str | None:
    """Why a voice that does not know this digest does not refute it either; None if it does refute it."""
    for claim in voice.claims:
        if claim.prefix and claim.fits(file.size) and digest.sha256.startswith(claim.prefix):
            return f"the digest begins like that of {claim.authority}, of which no more is on record"
    if voice.yielding:
        return f"differs from {voice.claims[0].authority}, but may be another revision's"
    if any(claim.digest is None and claim.prefix is None and claim.fits(file.size) for claim in voice.claims):
        return "its size is on record, its digest has never been published"
    return None


def _mismatch(file: TreeFile, digest: FileDigest, voice: Voice) -> FileResult:
    claim = next((claim for claim in voice.claims if claim.digest and claim.fits(file.size)), voice.claims[0])
    reason = "right size, other contents"
    if claim.size is None:
        reason = "other contents"
    if claim.pin and claim.pin.header_sha256:
        header, fault = header_of(file)
        same = header == claim.pin.header_sha256
        reason = "the header agrees, the tensors differ: corrupt, or changed weights" if same else "another model"
        reason = fault or reason
    if _tail_is_zero(file):
        reason += "; it ends in zero bytes, as an interrupted download does"
    return _with_claim(file, digest, claim, Status.MISMATCHED, reason)


def _verified(file: TreeFile, digest: FileDigest, claim: Claim, doubts: Sequence[str]) -> FileResult:
    reason = "every byte agrees"
    if claim.pin and claim.pin.name.rpartition("/")[2] != file.name.rpartition("/")[2]:
        reason = f"every byte agrees; this is {claim.pin.name} under another name"
    return _with_claim(file, digest, claim, Status.VERIFIED, "; ".join([reason, *doubts]))


def _unknown(file: TreeFile, digest: FileDigest, doubts: Sequence[str]) -> FileResult:
    kind = identify(head_of(file))
    what = f" ({kind.value})" if kind and file.name.endswith(official.WEIGHT_SUFFIXES) else ""
    reason = "; ".join(doubts) or f"no authority knows this file{what}"
    return FileResult(
        file.name,
        file.size,
        Status.UNKNOWN,
        reason,
        "digest",
        algorithm=SHA256,
        found=digest.sha256,
        sha256=digest.sha256,
    )


def _with_claim(file: TreeFile, digest: FileDigest, claim: Claim, status: Status, reason: str) -> FileResult:
    pin = claim.pin
    return FileResult(
        file.name,
        file.size,
        status,
        reason,
        "digest",
        authority=claim.authority,
        official=status is Status.VERIFIED and pin is not None and pin.publisher == OPENAI,
        grade=pin.grade if pin else None,
        evidence=pin.evidence if pin else None,
        algorithm=claim.algorithm,
        expected=claim.digest,
        found=digest.get(claim.algorithm),
        sha256=digest.sha256,
    )


def _tail_is_zero(file: TreeFile) -> bool:
    with SourceFile(file.path) as opened:
        length = min(TAIL_BYTES, opened.size)
        return length == TAIL_BYTES and not any(opened.read(opened.size - length, length))

"""The certificate beside an artifact: what it was made from, by what, with which options, and what was proved of it.

The same input and options give the same certificate: no clock, no host, no path. `verify` takes it as a manifest.
"""

from __future__ import annotations

import hashlib
from typing import Any

from gptoss_convert import __version__
from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, ReadOnce, companion_bytes
from gptoss_convert.convert.official import official_name_of
from gptoss_convert.convert.plan import Plan
from gptoss_convert.convert.proof import DIFFERENT, Proof
from gptoss_convert.convert.rebase import BlockCounts
from gptoss_convert.convert.run import Digests
from gptoss_convert.convert.source import Source
from gptoss_convert.formats.digests import CERTIFICATE_SCHEMA

FOLDER_NAME = "gptoss-certificate.json"


def file_name(artifact: str) -> str:
    """The certificate's name beside a single-file artifact."""
    return f"{artifact}.certificate.json"


def certificate(
    source: Source, plan: Plan, digests: Digests, proof: Proof | None, base: BlockCounts | None = None
) -> dict[str, Any]:
    """The whole document. base: of a fine-tune, the blocks that kept the release's bytes and those that did not."""
    sizes = {file.name: file.size for file in plan.files} | {name: len(data) for name, data in plan.small.items()}
    return {
        "schema": CERTIFICATE_SCHEMA,
        "tool": {"name": "gptoss-convert", "version": __version__},
        "source": _source(source, digests),
        "target": plan.target,
        "options": plan.options,
        "artifact": {
            "files": [{"name": n, "size": sizes[n], "sha256": d} for n, d in sorted(digests.output.items())],
            "notes": plan.notes,
        },
        "lossless": None if proof is None else proof.lossless,
        "lost": None if proof is None else [*source.losses, *plan.losses, *_lost(proof)],
        **({} if base is None else {"base": base.as_dict()}),
        "proof": None if proof is None else proof.as_dict(),
    }


def _source(source: Source, digests: Digests) -> dict[str, Any]:
    files = []
    for file in source.files:
        digest = digests.source[file.name]
        files.append({"name": file.name, "size": file.size, "sha256": digest, "official": official_name_of(digest)})
    weights = all(file["official"] for file in files)
    parts = [_companion(source, name) for name in (TOKENIZER, TEMPLATE)]
    config = None
    if source.config_sha256 is not None:
        config = {"sha256": source.config_sha256, "official": official_name_of(source.config_sha256)}
    return {
        "layout": str(source.layout),
        "revision": source.revision,
        "model": source.config.release,
        "parameters": source.config.parameters,
        "official": bool(weights and config and config["official"] and all(p is None or p["official"] for p in parts)),
        "official_weights": weights,
        "files": files,
        "config": config,
        "tokenizer": parts[0],
        "template": parts[1],
        "notes": source.notes,
        "losses": source.losses,
    }


def _companion(source: Source, name: str) -> dict[str, Any] | None:
    companion = source.companions.get(name)
    if not isinstance(companion, bytes | ReadOnce):
        return None  # none, or only arrays from which one could be made
    digest = hashlib.sha256(companion_bytes(companion)).hexdigest()
    return {"name": name, "sha256": digest, "official": official_name_of(digest)}


def _lost(proof: Proof) -> list[str]:
    """One line for each way in which tensors were rounded."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for tensor in proof.tensors:
        if tensor.verdict == DIFFERENT:
            kinds.setdefault((tensor.source_encoding, tensor.artifact_encoding), []).append(tensor.rms_error)
    return [
        f"{len(errors)} tensors rounded from {a} to {b}: relative error at most {max(errors):.3g}"
        for (a, b), errors in sorted(kinds.items())
    ]

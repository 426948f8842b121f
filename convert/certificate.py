"""The certificate beside an artifact: what it was made from, by what, with which options, and what was proved of it.

The same input and options give the same certificate: no clock, no host, no path. `verify` takes it as a manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from gptoss_convert import __version__
from gptoss_convert.convert.companions import TEMPLATE, TOKENIZER, ReadOnce, companion_bytes
from gptoss_convert.convert.official import official_name_of
from gptoss_convert.convert.plan import Plan
from gptoss_convert.convert.proof import DIFFERENT, Proof
from gptoss_convert.convert.rebase import Base
from gptoss_convert.convert.run import Digests
from gptoss_convert.convert.source import Source
from gptoss_convert.formats.digests import CERTIFICATE_SCHEMA

FOLDER_NAME = "gptoss-certificate.json"


def file_name(artifact: str) -> str:
    """The certificate's name beside a single-file artifact."""
    return f"{artifact}.certificate.json"


def certificate(
    source: Source, plan: Plan, digests: Digests, proof: Proof | None, base: Base | None = None
) -> dict[str, Any]:
    """The whole document. base: the release that --base named, and what became of its blocks."""
    sizes = {file.name: file.size for file in plan.files} | {name: len(data) for name, data in plan.small.items()}
    return {
        "schema": CERTIFICATE_SCHEMA,
        "tool": {"name": "gptoss-convert", "version": __version__},
        "source": _source(source, digests),
        "target": plan.target,
        "options": plan.options,
        **({"rounding": plan.rounding} if plan.rounding else {}),
        "artifact": {
            "files": [{"name": n, "size": sizes[n], "sha256": d} for n, d in sorted(digests.output.items())],
            "notes": plan.notes,
        },
        "lossless": None if proof is None else proof.lossless,
        "lost": None if proof is None else [*source.losses, *plan.losses, *_lost(proof)],
        **({} if base is None else {"base": _base(base)}),
        "proof": None if proof is None else proof.as_dict(),
    }


def _base(base: Base) -> dict[str, Any]:
    files = _files(base.release, base.digests)
    return {
        "layout": str(base.release.layout),
        "revision": base.release.revision,
        "model": base.release.config.release,
        "official_weights": all(file["official"] for file in files),
        "files": files,
        "blocks": None if base.blocks is None else base.blocks.as_dict(),
    }


def _files(source: Source, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    digest_of = {file.name: digests[file.name] for file in source.files}
    return [
        {"name": f.name, "size": f.size, "sha256": digest_of[f.name], "official": official_name_of(digest_of[f.name])}
        for f in source.files
    ]


def _source(source: Source, digests: Digests) -> dict[str, Any]:
    files = _files(source, digests.source)
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
        if tensor.verdict == DIFFERENT and (tensor.rms_error or tensor.lost_by_cutting is None):
            kinds.setdefault((tensor.source_encoding, tensor.artifact_encoding), []).append(tensor.rms_error)
    lines = [
        f"{len(errors)} tensors rounded from {a} to {b}: relative error at most {max(errors):.3g}"
        for (a, b), errors in sorted(kinds.items())
    ]
    cut = [tensor.lost_by_cutting for tensor in proof.tensors if tensor.lost_by_cutting is not None]
    if cut:
        outputs = max(error for layer in proof.layers for error in layer.cut_errors or ())
        lines.append(
            f"dropped neurons held at most {max(cut):.3g} of a tensor's norm, {outputs:.3g} of an expert's output"
        )
    return lines

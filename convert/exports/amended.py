"""A folder's certificate after an export has written files of its own: it must stay true of what lies beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from gptoss_convert.convert.certificate import FOLDER_NAME
from gptoss_convert.convert.exports.artifact import Artifact, as_json


def amended_certificate(
    artifact: Artifact, written: Mapping[str, bytes], platform: str, renamed: Mapping[str, str] | None = None
) -> bytes | None:
    """The certificate with these small files among its own, and a note of it; None where the artifact is no folder with one.

    written: name beside the certificate → bytes. renamed: new name → the name that the file has in the certificate.
    """
    name, document = artifact.certificate_name, artifact.certificate
    if document is None or name != FOLDER_NAME:
        return None
    listed: dict[str, Mapping[str, Any]] = {file["name"]: file for file in document["artifact"]["files"]}
    for new, old in (renamed or {}).items():
        if old in listed:
            listed[new] = {**listed[old], "name": new}
    for new, data in written.items():
        listed[new] = {"name": new, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    note = f"{', '.join(sorted(written))}: written by export --for {platform}, after the proof"
    notes = list(dict.fromkeys([*document["artifact"].get("notes", []), note]))
    files = [listed[n] for n in sorted(listed)]
    return as_json({**document, "artifact": {**document["artifact"], "files": files, "notes": notes}})

"""The report's footer: what was compared, with what, on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_convert.convert.report_page import name, text

DIGITS = 16  # of a digest that are shown; --json has them all
LISTED = 40  # files of a side
Document = Mapping[str, Any]


def footer(document: Document) -> str:
    """Everything by which the comparison can be told from another."""
    model, words, artifact = document["model"], document["text"], document["artifact"]
    rows = [
        (side, f"{name(it['name'])}, {name(it['layout'])}, {it['bytes']:,} bytes{_files(it['files'])}")
        for side, it in (("source", document["source"]), ("artifact", artifact))
    ]
    if artifact["method"]:
        rows.append(("method", name(artifact["method"])))
    if artifact["widened"]:
        wide, inner = artifact["widened"]
        rows.append(
            ("widened", f"hidden {model['hidden']:,} → {wide:,}, intermediate {model['intermediate']:,} → {inner:,}")
        )
    shape = f"{model['layers']} layers, {model['experts']} experts of which {model['experts_per_token']} a token, "
    shape += f"hidden {model['hidden']:,}, intermediate {model['intermediate']:,}, vocabulary {model['vocab']:,}"
    rows.append(("model", f"{name(model['release'])}: {shape}" if model["release"] else shape))
    if words:
        rows.append(
            ("text", f"{name(words['name'])}, {words['tokens']:,} tokens<br><code>{text(words['digest'])}</code>")
        )
    versions = ", ".join(f"{text(key)} {text(value)}" for key, value in sorted(document["versions"].items()) if value)
    rows += [("made with", f"{versions}, on {name(document['device'])}"), ("document", text(document["schema"]))]
    listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    return f"<footer><h2>What was compared</h2><dl>{listed}</dl></footer>"


def _files(files: Sequence[Document]) -> str:
    """Each file with its size and the beginning of its SHA-256."""
    rows = [
        f"<li>{name(file['name'])}, {file['bytes']:,} bytes, SHA-256 <code>{text(file['sha256'][:DIGITS])}…</code></li>"
        for file in files[:LISTED]
    ]
    more = f"<li>and {len(files) - LISTED:,} files more</li>" if len(files) > LISTED else ""
    return f'<ul class="files">{"".join(rows)}{more}</ul>'

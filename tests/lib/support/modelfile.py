"""A parser of Ollama's Modelfile: comments and instructions, in any case and order, values plain, quoted or in triple quotes.

As the reference has it: `FROM` at least once, `PARAMETER name value` of the names it lists, `MESSAGE role text`, `REQUIRES` a
version; a value goes on over lines until its quotes close. Whatever else stands there is an error with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int, "stop": str,
    "num_predict": int, "draft_num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
INSTRUCTIONS = ("from", "parameter", "template", "system", "adapter", "license", "message", "requires")
ROLES = ("system", "user", "assistant")


class BadModelfile(ValueError):
    """Names the line."""


@dataclass
class Modelfile:
    """Instructions that may come once, last one standing; and those that add up."""

    sources: list[str] = field(default_factory=list)
    parameters: dict[str, object] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> Modelfile:
    found = Modelfile()
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z]+)[ \t]+(.*)", line)
        if match is None or match[1].lower() not in INSTRUCTIONS:
            raise BadModelfile(f"line {start}: no instruction: {line[:40]}")
        name, value = match[1].lower(), match[2]
        head = ""
        if name in ("parameter", "message"):
            head, _, value = value.partition(" ")
        while _open(value.strip()):
            if at == len(lines):
                raise BadModelfile(f"line {start}: the quotes of {name} are never closed")
            value, at = value + "\n" + lines[at], at + 1
        _add(found, name, head, _unquoted(value.strip()), start)
    if not found.sources:
        raise BadModelfile("no FROM")
    return found


def _open(value: str) -> bool:
    if value.startswith('"""'):
        return len(value) < 6 or not value.endswith('"""')
    return value.startswith('"') and (len(value) < 2 or not value.endswith('"'))


def _unquoted(value: str) -> str:
    if value.startswith('"""'):
        return value[3:-3]
    return value[1:-1] if value.startswith('"') else value


def _add(found: Modelfile, name: str, head: str, value: str, line: int) -> None:
    if not value:
        raise BadModelfile(f"line {line}: {name} has no value")
    if name == "parameter":
        if head not in KINDS:
            raise BadModelfile(f"line {line}: no such parameter: {head}")
        try:
            typed = KINDS[head](value)
        except ValueError as error:
            raise BadModelfile(f"line {line}: {head} is not of its type: {value}") from error
        found.stops.append(value) if head == "stop" else found.parameters.__setitem__(head, typed)
    elif name == "message":
        if head not in ROLES:
            raise BadModelfile(f"line {line}: no such role: {head}")
        found.messages.append((head, value))
    elif name == "requires" and not re.fullmatch(r"v?\d+\.\d+(\.\d+)?", value):
        raise BadModelfile(f"line {line}: not a version: {value}")
    elif name == "from":
        found.sources.append(value)
    elif name == "license":
        found.licenses.append(value)
    else:
        found.texts[name] = value

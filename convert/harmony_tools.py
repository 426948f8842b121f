"""Tools as the system and developer messages of the harmony format show them: a TypeScript namespace, and the builtin ones.

The namespace is what the released chat template makes of JSON schemas, with its peculiarities: a line break and sixteen spaces
after the colon of a nested property, `any` for what it does not know, descriptions as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptoss_convert.errors import BadInput

Bad = Callable[[str, object, object], BadInput]
"""Makes the error for: what, found, expected."""

_SIMPLE = {"number": "number", "integer": "number", "boolean": "boolean"}

BROWSER = """\
## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the most \
relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser

"""
PYTHON = """\
## python

Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool should be \
used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when creating plots, tables, \
or files).

When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook environment. \
python will respond with the output of the execution or time out after 120.0 seconds. The drive at '/mnt/data' can be used to \
save and persist user files. Internet access for this session is UNKNOWN. Depends on the cluster.

"""


def namespace(tools: Sequence[Any], bad: Bad) -> str:
    """The functions namespace. tools: `{"type": "function", "function": {name, description, parameters}}` each."""
    parts = ["## functions\n\nnamespace functions {\n\n"]
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise bad("a tool is malformed", tool, '{"type": "function", "function": {"name": …}}')
        parts.append(f"// {_comment(function, bad)}\ntype {function['name']} = ")
        parameters = _object(function, "parameters", bad)
        properties = _object(parameters, "properties", bad)
        required = _required(parameters, bad)
        if not properties:
            parts.append("() => any;\n\n")
            continue
        parts.append("(_: {\n")
        parts.extend(_parameter(name, spec, name in required, bad) for name, spec in properties.items())
        parts.append("}) => any;\n\n")
    return "".join([*parts, "} // namespace functions"])


def _parameter(name: str, spec: object, required: bool, bad: Bad) -> str:
    if not isinstance(spec, Mapping):
        raise bad("a tool's parameter is not an object", spec, "a JSON schema")
    comment = _comment(spec, bad)
    text = (f"// {comment}\n" if comment else "") + name + ("" if required else "?") + ": " + _type(spec, bad)
    if "default" in spec:
        plain = isinstance(spec["default"], str) and (spec.get("enum") or spec.get("oneOf"))
        shown = spec["default"] if plain else json.dumps(spec["default"], ensure_ascii=False)
        text += ("// default: " if spec.get("oneOf") and not spec.get("enum") else ", // default: ") + shown
    return text + ",\n"


def _type(spec: Mapping[str, Any], bad: Bad) -> str:
    kind = spec.get("type")
    nullable = " | null" if spec.get("nullable") else ""
    if kind == "array":
        return _array(spec, bad) + nullable
    if isinstance(kind, list) and kind:
        if not all(isinstance(one, str) for one in kind):
            raise bad("a tool's parameter has a type that is no text", kind, "names of types")
        return " | ".join(kind)
    if spec.get("oneOf"):
        return _one_of(_list(spec, "oneOf", bad), bad)
    if kind == "string":
        if spec.get("enum"):
            return '"' + '" | "'.join(str(value) for value in _list(spec, "enum", bad)) + '"'
        return "string" + nullable
    if kind == "object":
        return _properties(spec, bad)
    return _SIMPLE.get(kind, "any") if isinstance(kind, str) else "any"


def _array(spec: Mapping[str, Any], bad: Bad) -> str:
    items = _object(spec, "items", bad)
    if not items:
        return "any[]"
    kind = items.get("type")
    if isinstance(kind, str) and kind in ("string", *_SIMPLE):
        return _SIMPLE.get(kind, "string") + "[]"
    inner = _type(items, bad)
    return "any[]" if inner == "object | object" or len(inner) > 50 else inner + "[]"


def _one_of(variants: Sequence[Any], bad: Bad) -> str:
    texts = []
    for variant in variants:
        if not isinstance(variant, Mapping):
            raise bad("a variant of a tool's parameter is not an object", variant, "a JSON schema")
        comment = _comment(variant, bad)
        text = _type(variant, bad) + (f"// {comment}" if comment else "")
        if "default" in variant:
            text += " " * 20 + "// default: " + json.dumps(variant["default"], ensure_ascii=False)
        texts.append(text)
    return " | \n".join(texts)


def _properties(spec: Mapping[str, Any], bad: Bad) -> str:
    properties, required = _object(spec, "properties", bad), _required(spec, bad) if spec.get("properties") else []
    if not properties:
        return "object"
    shown = []
    for name, inner in properties.items():
        if not isinstance(inner, Mapping):
            raise bad("a property of a tool's parameter is not an object", inner, "a JSON schema")
        shown.append(f"{name}{'' if name in required else '?'}: \n{' ' * 16}{_type(inner, bad)}")
    return "{\n" + ", ".join(shown) + "}"


def _comment(table: Mapping[str, Any], bad: Bad) -> str:
    found = table.get("description") or ""
    if not isinstance(found, str):
        raise bad("a tool's description is not a text", found, "a string")
    return found


def _object(table: Mapping[str, Any], key: str, bad: Bad) -> Mapping[str, Any]:
    found = table.get(key) or {}
    if not isinstance(found, Mapping):
        raise bad(f"a tool's {key} is not an object", found, "a JSON schema")
    return found


def _list(table: Mapping[str, Any], key: str, bad: Bad) -> list[Any]:
    found = table[key]
    if not isinstance(found, list):
        raise bad(f"a tool's {key} is not a list", found, "a list")
    return found


def _required(table: Mapping[str, Any], bad: Bad) -> list[Any]:
    return _list(table, "required", bad) if table.get("required") else []

"""The invented tools that the default calibration set uses, and conversations with calls as the harmony format has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Conversation = dict[str, Any]


def schema(name: str, description: str, required: Sequence[str] = (), **properties: Any) -> Conversation:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
TOOLS = {
    tool["function"]["name"]: tool
    for tool in (
        schema("get_weather", "Weather at a place for the next days.", ["city"],
               city={**TEXT, "description": "Name of the city"}, days={**WHOLE, "default": 1},
               unit={**TEXT, "enum": ["celsius", "fahrenheit"], "default": "celsius"}),
        schema("convert_currency", "Converts an amount at today's rate.", ["amount", "from", "to"],
               amount=NUMBER, **{"from": {**TEXT, "description": "ISO 4217 code"}, "to": TEXT}),
        schema("search_orders", "Finds orders of a shop.", ["customer"],
               customer=TEXT, since={**TEXT, "description": "ISO date"},
               status={"type": "array", "items": TEXT}, limit={**WHOLE, "default": 10}),
        schema("create_event", "Puts an event into the calendar.", ["title", "start"],
               title=TEXT, start={**TEXT, "description": "ISO 8601, with the offset"}, minutes={**WHOLE, "default": 60},
               guests={"type": "array", "items": TEXT}),
        schema("run_sql", "Runs a read-only query and returns rows as JSON.", ["query"], query=TEXT),
        schema("read_file", "Returns lines of a text file.", ["path"],
               path=TEXT, first={**WHOLE, "default": 1}, last=WHOLE),
        schema("send_message", "Sends a message to a person.", ["to", "text"],
               to=TEXT, text=TEXT, urgent={"type": "boolean", "default": False}),
        schema("route", "Distance and time between two places.", ["start", "end"],
               start=TEXT, end=TEXT, by={**TEXT, "enum": ["car", "train", "bicycle", "foot"]}),
    )
}  # fmt: skip


def as_harmony(sections: Sequence[tuple[str, str | None, str]]) -> Conversation:
    """Sections (kind, tool, text) as messages that keep every channel."""
    result: Conversation = {"messages": []}
    for kind, name, text in sections:
        if kind == "developer":
            result["developer"] = text
            continue
        builtin = name is not None and not name.startswith("functions.")
        channel, content_type = ("analysis", "code") if builtin else ("commentary", "<|constrain|>json")
        result["messages"].append(
            {
                "user": {"role": "user"},
                "call": {"role": "assistant", "channel": channel, "recipient": name, "content_type": content_type},
                "result": {"role": "tool", "name": name, "recipient": "assistant", "channel": channel},
            }.get(kind, {"role": "assistant", "channel": kind})
            | {"content": text}
        )
    return result

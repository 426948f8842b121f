"""Conversations in gpt-oss's harmony format, rendered by our own code: a model's template is never run.

A conversation is one JSON object with `messages`, in either of two forms. Other keys are ignored.

- Chat (OpenAI's API): role, content, thinking or reasoning_content, tool_calls. Rendered as the released chat template does for
  training: the first system or developer message becomes the instructions, analysis is kept only in the last turn and before
  tool calls that no answer follows, a tool's result is written as JSON, a final answer that ends the conversation ends with
  <|return|>. What the template would drop without a word (a second system message, a second call in one message) is refused.
  Arguments given as JSON text, as the API has them, are taken for the object they hold.
- Harmony: any message has channel, recipient or content_type. Rendered as it stands, as openai-harmony does for training with
  nothing dropped. System and developer messages are the conversation's own, unless it has one of the keys below.

The two differ for one and the same conversation: openai-harmony writes a tool's result as it is, `<|constrain|>json`, no empty
lines after instructions without tools, and no comma after a parameter's default. Tools are always shown as the template does.

Keys: tools, developer (instructions), reasoning_effort, model_identity, builtin_tools (browser, python), and date, which is
left out of the system message if it is not given: the clock is never asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gptoss_convert.convert.harmony_tools import BROWSER, PYTHON, namespace
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CHANNELS = ("analysis", "commentary", "final")
EFFORTS = ("low", "medium", "high")
ROLES = ("system", "developer", "user", "assistant", "tool")
CONSTRAIN = "<|constrain|>"
_HARMONY_KEYS = ("channel", "recipient", "content_type")
_CHAT_KEYS = ("thinking", "reasoning_content", "reasoning", "tool_calls")
_HEAD_KEYS = ("tools", "developer", "reasoning_effort", "model_identity", "builtin_tools", "date")
_TAGS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
"""What the template refuses in an assistant's text: a turn that was rendered before."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: one special token, or text in which nothing is one, whatever it looks like."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class _Place:
    """Where in the input something is, for messages: a file and line, and which message of the conversation."""

    where: object
    number: int = 0

    def bad(self, what: str, found: object = None, expected: object = None, remedy: str | None = None) -> BadInput:
        at = f"message {self.number}: " if self.number else ""
        shown = None if found is None else repr(found)[:120]
        return BadInput(at + what, file=self.where, found=shown, expected=expected, remedy=remedy)


def render(conversation: Mapping[str, Any], where: object) -> list[Piece]:
    """A conversation as pieces, text and special tokens in turn. where: file and line, named in errors."""
    place = _Place(where)
    try:
        messages = _messages(conversation, place)
        in_harmony = any(message.get(key) is not None for message in messages for key in _HARMONY_KEYS)
        pieces = list((_harmony if in_harmony else _chat)(conversation, messages, place))
        joined = [
            Piece(piece.text, True) if special else Piece("".join(p.text for p in run))
            for special, run in groupby(pieces, key=lambda piece: piece.special)
            for piece in (run if special else [Piece("")])
        ]
        for piece in joined:
            piece.text.encode()
    except RecursionError as error:
        raise place.bad("the conversation is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise place.bad("a text is not Unicode", error.object[error.start : error.end], "whole characters") from error
    return [piece for piece in joined if piece.text]


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    """Token ids: special pieces by their id, the rest as text even where it spells a special token."""
    ids: list[int] = []
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True  # the library's name for: as text
    try:
        for piece in pieces:
            if not piece.special:
                ids.extend(tokenizer.encode(piece.text, add_special_tokens=False).ids)
                continue
            index = tokenizer.token_to_id(piece.text)
            if index is None:
                raise BadInput(
                    "the tokenizer lacks a special token of the harmony format",
                    file="tokenizer.json",
                    expected=piece.text,
                    remedy="give a plain .txt, or the release's tokenizer",
                )
            ids.append(index)
    finally:
        tokenizer.encode_special_tokens = before
    return ids


def _messages(conversation: Mapping[str, Any], place: _Place) -> list[Message]:
    """The messages with a known role each; keys that are null are as good as absent."""
    if not isinstance(conversation, Mapping):
        raise place.bad("a conversation is not a JSON object", conversation, "an object with messages")
    found = conversation.get("messages")
    if not isinstance(found, list) or not found:
        raise place.bad("a conversation has no messages", found, "messages: a list of at least one")
    messages: list[Message] = []
    for number, message in enumerate(found, 1):
        here = _Place(place.where, number)
        if not isinstance(message, Mapping):
            raise here.bad("a message is not an object", message, "an object with role and content")
        if message.get("role") not in ROLES:
            raise here.bad("unknown role", message.get("role"), ", ".join(ROLES))
        messages.append({key: value for key, value in message.items() if value is not None})
    return messages


def _message(
    author: str, content: str, end: str = "<|end|>", recipient: str = "all", channel: str = "", content_type: str = ""
) -> Iterator[Piece]:
    yield Piece("<|start|>", True)
    yield Piece(author + ("" if recipient == "all" else f" to={recipient}"))
    if channel:
        yield Piece("<|channel|>", True)
        yield Piece(channel)
    if content_type:
        constrained = content_type.startswith(CONSTRAIN)
        yield Piece(" ")
        if constrained:
            yield Piece(CONSTRAIN, True)
        yield Piece(content_type.removeprefix(CONSTRAIN) if constrained else content_type)
    yield Piece("<|message|>", True)
    yield Piece(content)
    yield Piece(end, True)


def _string(table: Mapping[str, Any], key: str, place: _Place, default: str | None = None) -> str:
    value = table.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise place.bad(f"{key} is {'missing' if value is None else 'not a text'}", value, "a string")
    return value


def _content(message: Message, place: _Place) -> str:
    """The text of a message: a string, or a list of text parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(parts) != len(content):
            raise place.bad("content has parts that are not text", content, '{"type": "text", "text": …}')
        return "".join(parts)
    return _string(message, "content", place)


def _system(conversation: Mapping[str, Any], tools: Sequence[Any], place: _Place) -> Iterator[Piece]:
    effort = _string(conversation, "reasoning_effort", place, "medium")
    if effort not in EFFORTS:
        raise place.bad("unknown reasoning_effort", effort, ", ".join(EFFORTS))
    builtin = conversation.get("builtin_tools") or []
    if not isinstance(builtin, list) or not all(tool in ("browser", "python") for tool in builtin):
        raise place.bad("unknown builtin_tools", builtin, "a list of browser, python")
    date = _string(conversation, "date", place, "")
    text = _string(conversation, "model_identity", place, IDENTITY) + "\nKnowledge cutoff: 2024-06\n"
    text += f"Current date: {date}\n\n" if date else "\n"
    text += f"Reasoning: {effort}\n\n"
    if builtin:
        text += "# Tools\n\n" + (BROWSER if "browser" in builtin else "") + (PYTHON if "python" in builtin else "")
    text += f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if tools:
        text += "\nCalls to these tools must go to the commentary channel: 'functions'."
    yield from _message("system", text)


def _tools(conversation: Mapping[str, Any], place: _Place) -> list[Any]:
    tools = conversation.get("tools") or []
    if not isinstance(tools, list):
        raise place.bad("tools is not a list", tools, "a list of function tools")
    return tools


def _harmony(conversation: Mapping[str, Any], messages: Sequence[Message], place: _Place) -> Iterator[Piece]:
    if any(conversation.get(key) is not None for key in _HEAD_KEYS):
        if messages[0]["role"] == "system":
            raise place.bad(
                "a conversation in harmony form has its own system message and keys that make one",
                [key for key in _HEAD_KEYS if conversation.get(key) is not None],
                "one of the two",
            )
        tools, instructions = _tools(conversation, place), _string(conversation, "developer", place, "")
        yield from _system(conversation, tools, place)
        sections = [f"# Instructions\n\n{instructions}"] if instructions else []
        sections += [f"# Tools\n\n{namespace(tools, place.bad)}"] if tools else []
        if sections:
            yield from _message("developer", "\n\n".join(sections))
    for number, message in enumerate(messages, 1):
        yield from _as_it_stands(message, _Place(place.where, number), last=number == len(messages))


def _as_it_stands(message: Message, place: _Place, *, last: bool) -> Iterator[Piece]:
    if mixed := [key for key in _CHAT_KEYS if key in message]:
        raise place.bad("a conversation in harmony form has a key of the chat form", mixed, "messages of one form")
    role, channel = message["role"], _string(message, "channel", place, "")
    if channel and channel not in CHANNELS:
        raise place.bad("unknown channel", channel, ", ".join(CHANNELS))
    recipient, content_type = (_string(message, k, place, d) for k, d in (("recipient", "all"), ("content_type", "")))
    name = _string(message, "name", place, "")
    if role == "tool" and not name:
        raise place.bad("a tool's message has no name", expected="name: functions.…, or a builtin tool's")
    author = name if role == "tool" else f"{role}:{name}" if name else role
    end = "<|end|>"
    if role == "assistant" and recipient != "all":
        end = "<|call|>"
    elif role == "assistant" and channel == "final" and last:
        end = "<|return|>"
    yield from _message(author, _content(message, place), end, recipient, channel, content_type)


def _chat(conversation: Mapping[str, Any], messages: Sequence[Message], place: _Place) -> Iterator[Piece]:
    tools = _tools(conversation, place)
    yield from _system(conversation, tools, place)
    instructions = _string(conversation, "developer", place, "")
    first = 0
    if messages[0]["role"] in ("system", "developer"):
        if instructions:
            raise place.bad("instructions are given twice", "developer, and a first message of that kind", "one")
        first, instructions = 1, _content(messages[0], _Place(place.where, 1))
    if instructions or tools:
        text = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
        text += f"# Tools\n\n{namespace(tools, place.bad)}" if tools else ""
        yield from _message("developer", text)
    call: Message | None = None
    for index in range(first, len(messages)):
        message, here, later = messages[index], _Place(place.where, index + 1), messages[index + 1 :]
        if message["role"] == "user":
            yield from _message("user", _content(message, here))
        elif message["role"] == "tool":
            yield from _result(message, call, here)
        elif message["role"] == "assistant" and message.get("tool_calls"):
            call = _call(message, here)
            yield from _calling(message, call, later, here)
        elif message["role"] == "assistant":
            yield from _answer(message, here, last=not later)
            call = None
        else:
            raise here.bad(
                "a system or developer message that is not the first, which the chat template would drop",
                message["role"],
                remedy="put it into the first message, or use the harmony form",
            )


def _thinking(message: Message, place: _Place) -> str | None:
    key = next((key for key in _CHAT_KEYS[:3] if key in message), None)
    return None if key is None else _untagged(_string(message, key, place), place)


def _untagged(text: str, place: _Place) -> str:
    if tag := next((tag for tag in _TAGS if tag in text), None):
        raise place.bad("an assistant's text holds channel tags", tag, "thinking and content apart, without tags")
    return text


def _answer(message: Message, place: _Place, *, last: bool) -> Iterator[Piece]:
    thinking, content = _thinking(message, place), _untagged(_content(message, place), place)
    if last and thinking is not None:
        yield from _message("assistant", thinking, channel="analysis")
    yield from _message("assistant", content, "<|return|>" if last else "<|end|>", channel="final")


def _calling(message: Message, call: Message, later: Sequence[Message], place: _Place) -> Iterator[Piece]:
    """A tool call, and the analysis before it unless an answer follows later."""
    thinking = _thinking(message, place)
    content = _untagged(_content(message, place), place) if "content" in message else ""
    if content and thinking:
        raise place.bad("a message with a tool call has both content and thinking", expected="one of the two")
    if later and later[0]["role"] != "tool":
        raise place.bad("a tool call is left without its result", later[0]["role"], "a tool's message after it")
    answered = any(m["role"] == "assistant" and not m.get("tool_calls") for m in later)
    if (content or thinking) and not answered:
        yield from _message("assistant", content or thinking or "", channel="analysis")
    yield from _message(
        "assistant",
        _json(call["arguments"], place),
        "<|call|>",
        f"functions.{call['name']}",
        "commentary",
        call["content_type"],
    )


def _call(message: Message, place: _Place) -> Message:
    """The one tool call of a message: name, arguments as an object, content_type and id."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], Mapping):
        raise place.bad(
            "a message has not one tool call", calls, "a list of one: the chat template would drop the others",
            remedy="give each call a message, followed by its result",
        )  # fmt: skip
    function = calls[0].get("function") or calls[0]
    if not isinstance(function, Mapping):
        raise place.bad("a tool call is malformed", function, "function: an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode(), place.where)
        except BadInput as error:
            raise place.bad(
                f"a tool call's arguments are cut off or no JSON object ({error.what})", arguments, "a JSON object"
            ) from error
    if not isinstance(arguments, Mapping):
        raise place.bad("a tool call has no arguments", arguments, "a JSON object")
    kind = _string(function, "content_type", place, "json")
    return {
        "name": _string(function, "name", place),
        "arguments": arguments,
        "content_type": kind,
        "id": calls[0].get("id"),
    }


def _result(message: Message, call: Message | None, place: _Place) -> Iterator[Piece]:
    if call is None:
        raise place.bad("a tool's message without a tool call before it", expected="an assistant's tool_calls")
    if "content" not in message:
        raise place.bad("content is missing", expected="the tool's result")
    for key, wanted in (("name", call["name"]), ("tool_call_id", call["id"])):
        given = message.get(key)
        if given is not None and wanted is not None and given not in (wanted, f"functions.{wanted}"):
            raise place.bad("a tool's message belongs to another call than the last", {key: given}, repr(wanted))
    text = _json(message["content"], place)
    yield from _message(f"functions.{call['name']}", text, recipient="assistant", channel="commentary")


def _json(value: object, place: _Place) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise place.bad("a value that JSON cannot hold", value) from error

"""A conversation through the exports, token for token: openai-harmony, transformers from the exported folders, llama.cpp from the
exported GGUF, onnxruntime-genai from the exported ONNX folders, all with the release's vocabulary and template.

One conversation, with instructions, a tool, a call, its result and an answer, is given to each as its own interface has it. The
official template and openai-harmony do not agree on everything (convert/harmony.py); here each disagreement is a name with the
two texts that stand for one another, and applying these to harmony's text must give the template's, token for token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pytest
from support import tokenizer as tk
from support.checkpoints import SMALL, Model, write_original
from support.judges import convert
from support.llama_server import command_line, post, serve
from support.parrot import parrot
from tokenizers import Tokenizer

from gptoss_convert.cli import cli
from gptoss_convert.convert.companions import TEMPLATE

SPEC = replace(SMALL, layers=1, experts=2, hidden=32, intermediate=32, heads=1, kv_heads=1, vocab=201088)
SPEC = replace(SPEC, spare_rows=SPEC.vocab - tk.TRUE_TEXT_TOKENS - 21)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the place"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
RULES = "Be brief.\n\nAnswer in the user's language."
ARGUMENTS = {"city": "Zürich", "unit": "celsius"}
THOUGHT, RESULT, ANSWER = "Look it up. 天気?", "sunny, 21 °C 🙂", "Sonnig, 21 °C."
ASKED, AGAIN = "Wie ist das Wetter in Zürich?", "Und in Łódź?\n\n  def f(x): return 2880"

QUOTED = json.dumps(RESULT, ensure_ascii=False)
DIFFERENCES = {
    "<|constrain|> before the content type of a call": (" <|constrain|>json<|message|>{", " json<|message|>{"),
    "a tool's result is JSON text": (f"<|message|>{RESULT}<|end|>", f"<|message|>{QUOTED}<|end|>"),
}
"""What openai-harmony writes, and what the template writes in its place, of what this conversation shows. (It does not show the
others: the empty line after instructions without tools, and the comma after a parameter's default.)"""


SAID = 'assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Zürich"}<|call|>'
"""The model of these tests says this after every prompt."""
ARTIFACTS = {
    "m.gguf": ("gguf",),
    "bf16": ("bf16", "--split-size", "20MB"),
    "int4": ("int4",),
    "onnx": ("onnx", "--onnx-runtime", "1.26"),
}
EXPORTS = [
    ("llama.cpp", "m.gguf"), ("ollama", "m.gguf"), ("lmstudio", "m.gguf"), ("huggingface", "m.gguf"),
    ("huggingface", "bf16"), ("huggingface", "int4"), ("huggingface", "onnx"), ("sagemaker", "bf16"), ("bedrock", "bf16"),
    ("azureml", "bf16"), ("azureml", "int4"), ("northflank", "int4"), ("foundry-local", "onnx"),
]  # fmt: skip


@pytest.fixture(scope="module")
def exports(true_file: Path, release_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with the release's tokenizer and template, exported to every platform: what holds its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    source = folder / "source"
    write_original(parrot(Model(SPEC), Tokenizer.from_file(str(true_file)).encode(SAID).ids), source)
    copyfile(true_file, source / "tokenizer.json")
    settings = json.dumps(tk.tokenizer_config(tk.TRUE_TEXT_TOKENS), indent=2) + "\n"
    (source / "tokenizer_config.json").write_text(settings)
    (source / "special_tokens_map.json").write_text(json.dumps(tk.SPECIAL_TOKENS_MAP))
    copyfile(release_template, source / TEMPLATE)
    (source / "generation_config.json").unlink(missing_ok=True)
    for name, (to, *options) in ARTIFACTS.items():
        convert(source, folder / name, to, *options)
    found = {}
    for platform, artifact in EXPORTS:
        out = folder / f"{platform}-{artifact}-out"
        code = cli.main(["export", str(folder / artifact), "--for", platform, "--out", str(out)], standalone_mode=False)
        assert not code
        inside = out if artifact.endswith(".gguf") else next(out.rglob("tokenizer.json")).parent
        found[f"{platform} {artifact}"] = inside
    return found


FOLDERS = [f"{platform} {artifact}" for platform, artifact in EXPORTS if not artifact.endswith(".gguf")]


@pytest.fixture(scope="module")
def llama(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp, serving the export by its own command line."""
    script = exports["llama.cpp m.gguf"] / "server.sh"
    with serve(command_line(script, tmp_path_factory.mktemp("path"), PORT="0", CONTEXT="2048")) as address:
        yield address


def by_harmony(harmony: tuple[Any, Any], date: str, *, turns: int) -> list[int]:
    """The conversation up to where the assistant is to go on: 1 after the question, 2 after the tool's result, 3 after more."""
    library, encoding = harmony
    role, message = library.Role, library.Message.from_role_and_content
    function = WEATHER["function"]
    assert isinstance(function, dict)
    tool = library.ToolDescription.new(function["name"], function["description"], function["parameters"])
    system = library.SystemContent.new().with_conversation_start_date(date)
    system = system.with_reasoning_effort(library.ReasoningEffort.HIGH)
    developer = library.DeveloperContent.new().with_instructions(RULES).with_function_tools([tool])
    call = message(role.ASSISTANT, json.dumps(ARGUMENTS, ensure_ascii=False)).with_channel("commentary")
    author = library.Author.new(role.TOOL, "functions.get_weather")
    result = library.Message.from_author_and_content(author, RESULT).with_recipient("assistant")
    parts = [
        [message(role.SYSTEM, system), message(role.DEVELOPER, developer), message(role.USER, ASKED)],
        [
            message(role.ASSISTANT, THOUGHT).with_channel("analysis"),
            call.with_recipient("functions.get_weather").with_content_type("<|constrain|>json"),
            result.with_channel("commentary"),
        ],
        [message(role.ASSISTANT, ANSWER).with_channel("final"), message(role.USER, AGAIN)],
    ]
    whole = library.Conversation.from_messages([m for part in parts[:turns] for m in part])
    found: list[int] = encoding.render_conversation_for_completion(whole, role.ASSISTANT)
    return found


def as_chat(turns: int) -> dict[str, Any]:
    """The same conversation in OpenAI's chat API."""
    function = {"name": "get_weather", "arguments": ARGUMENTS}
    parts: list[list[dict[str, Any]]] = [
        [{"role": "developer", "content": RULES}, {"role": "user", "content": ASKED}],
        [
            {
                "role": "assistant", "content": "", "thinking": THOUGHT,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
        ],
        [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": AGAIN}],
    ]  # fmt: skip
    return {"messages": [m for part in parts[:turns] for m in part], "tools": [WEATHER]}


def by_transformers(folder: Path, turns: int, effort: str = "high") -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = as_chat(turns)
    found = tokenizer.apply_chat_template(
        chat["messages"], tools=chat["tools"], reasoning_effort=effort, add_generation_prompt=True, return_dict=True
    )
    return list(found["input_ids"])


def by_llama(address: str, turns: int) -> list[int]:
    chat = as_chat(turns)
    for message in chat["messages"]:  # llama.cpp has the API's name for it, and arguments as text
        if "thinking" in message:
            message["reasoning_content"] = message.pop("thinking")
        for call in message.get("tool_calls", []):
            call["function"] = {**call["function"], "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}
    prompt = post(address, "/apply-template", {**chat, "chat_template_kwargs": {"reasoning_effort": "high"}})["prompt"]
    reply = post(address, "/tokenize", {"content": prompt, "add_special": False, "parse_special": True})
    return [int(i) for i in reply["tokens"]]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_runtimes_of_the_exports_agree(exports: dict[str, Path], llama: str, turns: int) -> None:
    ids = by_transformers(exports["huggingface bf16"], turns)
    for name in FOLDERS:
        assert by_transformers(exports[name], turns) == ids, name
    assert by_llama(llama, turns) == ids


@pytest.fixture(scope="module")
def without_slashes(true_file: Path) -> Any:
    """The release's tokenizer, but for slashes after a line's end, which it keeps with the signs before them."""
    text = true_file.read_text()
    assert text.count(r"+[\\r\\n/]*|") == 1
    return Tokenizer.from_str(text.replace(r"+[\\r\\n/]*|", r"+[\\r\\n]*|"))


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.endswith("onnx")])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_onnxruntime_genai_renders_the_same_text_and_parts_slashes_from_the_line_before(
    exports: dict[str, Path], without_slashes: Any, name: str, turns: int
) -> None:
    """Its tokenizer has an expression of its own for this; every tool's `{` line and comment shows it."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer = og.Tokenizer(og.Model(str(exports[name])))
    chat = as_chat(turns)
    text = tokenizer.apply_chat_template(
        messages=json.dumps(chat["messages"]), tools=json.dumps(chat["tools"]), add_generation_prompt=True
    )
    ids = by_transformers(exports[name], turns, "medium")  # it takes no variables of the template
    assert text == without_slashes.decode(ids, skip_special_tokens=False)
    found = [int(i) for i in tokenizer.encode(text)]
    assert found == without_slashes.encode(text).ids
    assert len(found) == len(ids) + 2, "the brace's line, and the comment after a parameter's line"


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_they_say_what_harmony_says(
    exports: dict[str, Path], harmony: tuple[Any, Any], true_file: Path, turns: int
) -> None:
    _, encoding = harmony
    theirs = by_harmony(harmony, datetime.now().strftime("%Y-%m-%d"), turns=turns)
    tokenizer = Tokenizer.from_file(str(true_file))
    ids = by_transformers(exports["huggingface bf16"], turns)
    text = encoding.decode(theirs)
    assert tokenizer.encode(text).ids == theirs, "one vocabulary"
    for pair in DIFFERENCES.values():
        assert (pair[0] in text) == (turns > 1), "a difference that there is, and no other"
        text = text.replace(*pair)
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode(text).ids == ids
    assert (theirs == ids) == (turns == 1)


def test_a_call_that_the_model_makes_arrives_as_one_over_http(exports: dict[str, Path], llama: str) -> None:
    chat = as_chat(1)
    reply = post(llama, "/v1/chat/completions", {**chat, "max_tokens": 60})
    (choice,) = reply["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["type"], call["function"]["name"]) == (
        "tool_calls",
        "function",
        "get_weather",
    )
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}
    assert not choice["message"].get("content")


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.endswith("onnx")])
def test_a_call_that_onnxruntime_genai_generates_is_one_for_harmony(
    exports: dict[str, Path], harmony: tuple[Any, Any], name: str
) -> None:
    """Sampled as genai_config.json has it, up to the token that ends the turn."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    library, encoding = harmony
    model = og.Model(str(exports[name]))
    params = og.GeneratorParams(model)
    if not name.startswith("foundry-local"):
        params.set_search_options(max_length=2048)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([by_transformers(exports[name], 1)], np.int32))
    made: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        made += map(int, generator.get_next_tokens())
    assert encoding.decode(made) == SAID.removeprefix("assistant")
    (call,) = encoding.parse_messages_from_completion_tokens(made, library.Role.ASSISTANT)
    assert (call.recipient, call.channel) == ("functions.get_weather", "commentary")
    assert json.loads(call.content[0].text) == {"city": "Zürich"}


def test_every_export_carries_template_tokenizer_and_end_tokens(
    exports: dict[str, Path], release_template: Path
) -> None:
    template = release_template.read_bytes()
    for name in FOLDERS:
        folder = exports[name]
        assert (folder / TEMPLATE).read_bytes() == template
        assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == tk.TRUE_SHA256
        stops = [json.loads((folder / "generation_config.json").read_text())["eos_token_id"]]
        if name.endswith("onnx"):
            stops.append(json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"])
        assert all(set(ends) == {200002, 200012, 199999} for ends in stops), name


@pytest.mark.parametrize("platform", [platform for platform, artifact in EXPORTS if artifact.endswith(".gguf")])
def test_every_gguf_carries_template_and_end_tokens(
    exports: dict[str, Path], release_template: Path, platform: str
) -> None:
    import gguf

    (file,) = exports[f"{platform} m.gguf"].glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents().encode() == release_template.read_bytes()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 200002
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert {kinds[i] for i in (200002, 200012, 199999)} == {int(gguf.TokenType.CONTROL)}

"""The default calibration set: reproduced by its script, small, diverse, and honest where a machine can tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from support import tokenizer as tk
from tokenizers import Tokenizer

from gptoss_convert.convert.harmony import encode, render

ROOT = Path(__file__).parents[1]
SET = ROOT / "gptoss_convert" / "data" / "calibration.jsonl"
CONVERSATIONS: list[dict[str, Any]] = [json.loads(line) for line in SET.read_text("utf-8").splitlines()]
DOMAINS = {"prose", "code", "mathematics", "tools", "documents", "structured", "dialogue", "science"}
SCRIPTS = {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL"}
SCRIPTS |= {"THAI", "BENGALI", "TAMIL", "GEORGIAN", "ARMENIAN"}


def rendered(conversation: dict[str, Any]) -> str:
    return "".join(piece.text for piece in render(conversation, "calibration.jsonl"))


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in the answers."""
    answers = (
        m["content"] for c in CONVERSATIONS for m in c["messages"] if m["role"] == "assistant" and "content" in m
    )
    pattern = rf"^```{language}\n(.*?)^```$"
    return [found for answer in answers for found in re.findall(pattern, answer, re.MULTILINE | re.DOTALL)]


def test_the_script_writes_the_very_file(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "make_calibration_set.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "set")], check=True)
    assert (tmp_path / "set").read_bytes() == SET.read_bytes()


def test_it_is_small_and_has_many_conversations() -> None:
    assert 150_000 < SET.stat().st_size < 1_000_000
    assert len(CONVERSATIONS) > 250
    assert len({json.dumps(conversation) for conversation in CONVERSATIONS}) == len(CONVERSATIONS)


def test_every_conversation_renders_and_tokenizes(tmp_path: Path) -> None:
    small = Tokenizer.from_file(str(tk.small_tokenizer(tmp_path, 512)))
    for conversation in CONVERSATIONS:
        text, ids = rendered(conversation), encode(render(conversation, "here"), small)
        assert ids[0] == small.token_to_id("<|start|>")
        assert small.id_to_token(ids[-1]) in ("<|return|>", "<|call|>")
        assert small.decode(ids, skip_special_tokens=False) == text


def test_with_the_true_tokenizer_it_has_tokens_enough_for_many_chunks(true_file: Path) -> None:
    true = Tokenizer.from_file(str(true_file))
    counts = Counter(i for conversation in CONVERSATIONS for i in encode(render(conversation, "here"), true))
    assert counts.total() > 80_000
    assert len(counts) > 8_000


def test_all_domains_are_there_and_none_is_most_of_it() -> None:
    sizes = Counter[str]()
    for conversation in CONVERSATIONS:
        sizes[conversation["domain"]] += len(rendered(conversation))
    assert set(sizes) >= DOMAINS
    assert max(sizes.values()) < 0.4 * sizes.total()


def test_the_beginning_is_as_diverse_as_the_whole() -> None:
    first = CONVERSATIONS[: len(CONVERSATIONS) // 4]
    assert {conversation["domain"] for conversation in first} >= DOMAINS
    assert len({conversation["language"] for conversation in first}) > 10


def test_many_languages_and_scripts_are_there() -> None:
    languages = Counter(conversation["language"] for conversation in CONVERSATIONS)
    assert len(languages) > 25
    assert languages["en"] < 0.8 * len(CONVERSATIONS)
    letters = Counter(
        unicodedata.name(c, "?").split()[0] for one in CONVERSATIONS for c in rendered(one) if c.isalpha()
    )
    assert {script for script, count in letters.items() if count >= 50} >= SCRIPTS


def test_every_channel_and_effort_is_there_and_most_have_analysis() -> None:
    texts = [rendered(conversation) for conversation in CONVERSATIONS]
    having = {channel: sum(f"<|channel|>{channel}" in text for text in texts) for channel in ("analysis", "commentary")}
    assert having["analysis"] > 0.7 * len(texts)
    assert having["commentary"] > 30
    assert sum("<|channel|>final" in text for text in texts) > 0.9 * len(texts)
    assert sum("<|call|>" in text for text in texts) > 30
    assert any("<|constrain|>json" in text for text in texts)
    assert {conversation["reasoning_effort"] for conversation in CONVERSATIONS} == {"low", "medium", "high"}


def test_its_python_runs() -> None:
    pieces = [block for block in blocks("python") if "assert" in block]
    assert len(pieces) > 5
    for piece in pieces:
        if "def test_" in piece:
            continue  # a test that is shown because it fails
        subprocess.run([sys.executable, "-c", piece], check=True, timeout=60)


def test_its_json_and_yaml_parse() -> None:
    tables = [json.loads(block) for block in blocks("json")]
    documents = [list(yaml.safe_load_all(block)) for block in blocks("yaml")]
    assert len(tables) > 5
    assert len(documents) > 2


def test_calls_fit_the_tools_that_are_offered() -> None:
    for conversation in CONVERSATIONS:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in conversation.get("tools", [])}
        for message in conversation["messages"]:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            if message.get("recipient", "").startswith("functions.") and message["role"] == "assistant":
                calls = [{"name": message["recipient"].split(".")[1], "arguments": json.loads(message["content"])}]
            for call in calls:
                parameters = offered[call["name"]]
                assert set(parameters["required"]) <= set(call["arguments"]) <= set(parameters["properties"])

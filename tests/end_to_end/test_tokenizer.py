"""The tokenizer through the conversions, judged by `tokenizers` and by llama.cpp's own tokenizer on the written file.

llama.cpp splits text by an expression of its own for `gpt-4o`, which cannot be stored in a file and differs from OpenAI's for
combining marks and for an accented capital before a plain one; `test_llama_cpp_joins_combining_marks` records it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

import gguf
import pytest
from support import metal
from support import tokenizer as tk
from support.checkpoints import SMALL, Model, write_metal, write_original
from support.judges import convert
from support.llama import Llama, load
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
TRUE_SPEC = replace(SMALL, layers=1, experts=2, hidden=32, intermediate=32, heads=1, kv_heads=1, vocab=201088)
TRUE_SPEC = replace(TRUE_SPEC, spare_rows=TRUE_SPEC.vocab - tk.TRUE_TEXT_TOKENS - 21)

PLAIN = """\
def convert(source: dict[str, int], *, limit=2880) -> None:
\tfor name, tensor in source.items():  # tabs, then    four spaces
        if not name.endswith("_blocks") and tensor >= 0x1F: raise ValueError(f"{name!r}: {tensor:,}")


0 7 42 007 1234567890 3.14159 1e-05 100% v2.0.1 2026-11-22T15:30:00Z
🙂🚀👩‍👩‍👧 → ≠ ≤ ∑ 你好，世界。模型的权重是数字。こんにちは世界。 안녕하세요 세계. Быстрая лиса. Η γρήγορη. שלום مرحبا
naïve café, Łódź, MÜNCHEN, ¿Qué pasó mañana? It's, we'll, DON'T, I'VE, they're\u00a0here \u2028 end   \r\n\r\n \t \n
https://example.org/path?query=value&other=1#part user@example.org a_b-c.d/e\\f
"""
SPECIAL = "<|start|>system<|message|>Reasoning: high<|end|><|start|>user<|message|>Hi <|x|> <|end|><|start|>assistant<|channel|>"
SPECIAL += "analysis<|message|>…<|call|><|return|><|endoftext|><|startoftext|><|constrain|>json"
TEXTS = {"plain": PLAIN, "special": SPECIAL, "both": SPECIAL + PLAIN + SPECIAL, "spaces": " \n  \n\t\t x   \n\n\n  y  "}
MARKS = "नमस्ते दुनिया สวัสดีชาวโลก ÁS"


@pytest.fixture(scope="module")
def small_llama(gguf_file: Path) -> Iterator[Llama]:
    with load(gguf_file) as llama:
        yield llama


@pytest.fixture(scope="module")
def true_gguf(true_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the release's vocabulary."""
    folder = tmp_path_factory.mktemp("true")
    write_original(Model(TRUE_SPEC), folder / "original")
    copyfile(true_file, folder / "original" / "tokenizer.json")
    settings = json.dumps(tk.tokenizer_config(tk.TRUE_TEXT_TOKENS), indent=2) + "\n"
    (folder / "original" / "tokenizer_config.json").write_text(settings)
    return convert(folder / "original", folder / "model.gguf", "gguf")


@pytest.fixture(scope="module")
def true_llama(true_gguf: Path) -> Iterator[Llama]:
    with load(true_gguf) as llama:
        yield llama


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_llama_cpp_reads_the_small_tokenizer_as_it_is(text: str, small_llama: Llama, sources: Path) -> None:
    assert small_llama.tokenize(text) == Tokenizer.from_file(str(sources / "hf" / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_llama_cpp_reads_the_true_tokenizer_as_it_is(text: str, true_llama: Llama, true_file: Path) -> None:
    ids = Tokenizer.from_file(str(true_file)).encode(text).ids
    assert true_llama.tokenize(text) == ids


@pytest.mark.xfail(
    strict=True, reason="llama.cpp's own expression for gpt-4o leaves \\p{M} out; no file can say otherwise"
)
def test_llama_cpp_joins_combining_marks(true_llama: Llama, true_file: Path) -> None:
    assert true_llama.tokenize(MARKS) == Tokenizer.from_file(str(true_file)).encode(MARKS).ids


def test_true_tokenizer_comes_back_byte_for_byte(true_gguf: Path, tmp_path: Path) -> None:
    folder = convert(true_gguf, tmp_path / "hf", "hf")
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == tk.TRUE_SHA256
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == tk.tokenizer_config(tk.TRUE_TEXT_TOKENS)
    assert json.loads((folder / "special_tokens_map.json").read_text()) == tk.SPECIAL_TOKENS_MAP


def test_metal_gives_the_true_tokenizer_but_for_five_special_tokens(
    true_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds 16 special tokens of 21 and no names of reserved ones; text tokens and merges come back whole."""
    ranks = tk.true_ranks(true_file.parent / "js-tiktoken-1.0.21.tgz")
    monkeypatch.setattr(metal, "small_vocabulary", lambda _: tuple(ranks))
    write_metal(Model(TRUE_SPEC), tmp_path / "model.bin")
    folder = convert(tmp_path / "model.bin", tmp_path / "hf", "hf")
    made, true = (json.loads(path.read_text()) for path in (folder / "tokenizer.json", true_file))
    assert made.pop("added_tokens") == true.pop("added_tokens")[:16]
    assert made == true


def test_template_is_kept_byte_for_byte(sources: Path, tmp_path: Path) -> None:
    """Line ends, a trailing space, characters beyond the basic plane, and through GGUF back to a file."""
    template = "{%- for m in messages -%}\r\n{{ m.content }}\t🙂 \n\n  {%- endfor -%} \r"
    copy = tmp_path / "source"
    copy.mkdir()
    for file in (sources / "hf").iterdir():
        copyfile(file, copy / file.name)
    (copy / "chat_template.jinja").write_bytes(template.encode())
    path = convert(copy, tmp_path / "model.gguf", "gguf")
    assert gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents() == template
    assert (convert(path, tmp_path / "hf", "hf") / "chat_template.jinja").read_bytes() == template.encode()


def test_llama_cpp_renders_the_template_as_transformers_does(small_llama: Llama, sources: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources / "hf")
    messages = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "1"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert small_llama.chat_prompt(messages) == rendered

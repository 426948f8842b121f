"""Texts become chunks of token ids: which tokens, where they are cut, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import SMALL, Model, write_gguf, write_metal
from tokenizers import AddedToken, Tokenizer

from gptoss_convert.convert import texts
from gptoss_convert.convert.harmony import encode, render
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.texts import Texts, read_texts
from gptoss_convert.errors import BadInput, GptOssError, Refused, UsageError

ROOT = Path(__file__).parents[2]
QUESTION = {"messages": [{"role": "user", "content": "Reading is the first step?"}]}
TALK = {
    "messages": [*QUESTION["messages"], {"role": "assistant", "content": "Checking the second.", "thinking": "Hm."}]
}


@pytest.fixture(scope="module")
def source(hf_folder: Path) -> Iterator[Source]:
    with open_source(hf_folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(hf_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(hf_folder / "tokenizer.json"))


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def ids_of(read: Texts) -> list[int]:
    return np.concatenate(read.sequences).tolist()


def long_text() -> str:
    """What is hard to cut: line ends of all kinds, spaces before and after them, slashes, marks, lines without an end."""
    choose = random.Random(1)
    parts = [
        "word",
        " word",
        "}",
        ");\n",
        "\n",
        "\r\n",
        "  \n",
        "\n\n",
        "/",
        "\n/",
        "\t",
        "  ",
        " 12345",
        "é",
        "́",
        "नि",
        "🙂",
    ]
    parts += ["<|end|>", " <|start|>x", ".", "'s", "\u00a0", "\u2028", "ABC", "x" * 50]
    return "".join(choose.choice(parts) for _ in range(60_000))


def test_a_txt_has_the_tokens_of_the_whole_text(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_BLOCK", 257)
    (tmp_path / "a.txt").write_bytes(long_text().encode())
    read = read_texts(tmp_path / "a.txt", source, 100)
    whole = tokenizer.encode(long_text()).ids
    assert ids_of(read) == whole
    assert read.tokens == len(whole)
    assert [len(chunk) for chunk in read.sequences[:-1]] == [100] * (len(whole) // 100)
    assert read.kinds == {"text": 1}


def test_the_true_tokenizer_gives_the_tokens_of_the_whole_text(
    true_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    true = Tokenizer.from_file(str(true_file))
    monkeypatch.setattr(texts, "_BLOCK", 257)
    (tmp_path / "a.txt").write_bytes(long_text().encode())
    blocks = list(texts._blocks(tmp_path / "a.txt"))
    assert len(blocks) > 300
    assert [i for block in blocks for i in true.encode(block).ids] == true.encode(long_text()).ids


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("aB1 \n\r\t/.}'é\u0301字\u00a0\u3000_-"), max_size=60))
def test_wherever_a_text_is_cut_its_tokens_stay_the_same(text: str, tokenizer: Tokenizer) -> None:
    cuts = [0, *(found.start() for found in texts._SEAM.finditer(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
    assert [i for part in parts for i in tokenizer.encode(part).ids] == tokenizer.encode(text).ids


def test_a_line_without_an_end_is_read_in_bounded_pieces(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_BLOCK", 64)
    monkeypatch.setattr(texts, "_MAX_BLOCK", 1024)
    (tmp_path / "a.txt").write_text("x" * 10_000)
    assert max(map(len, texts._blocks(tmp_path / "a.txt"))) <= 1024 + 64
    assert "".join(texts._blocks(tmp_path / "a.txt")) == "x" * 10_000
    assert read_texts(tmp_path / "a.txt", source, 64).tokens > 0


def test_special_tokens_in_a_txt_are_parsed_unless_told_otherwise(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "<|start|>user<|message|>Hello<|end|>"
    (tmp_path / "a.txt").write_text(text)
    parsed = ids_of(read_texts(tmp_path / "a.txt", source, 100))
    plain = ids_of(read_texts(tmp_path / "a.txt", source, 100, parse_special=False))
    assert parsed == tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<|end|>") not in plain
    assert tokenizer.decode(plain) == text


def test_special_tokens_in_a_line_of_text_are_parsed_only_when_told(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "<|end|> there"}, {"messages": [{"role": "user", "content": "<|end|>"}]}
    )
    end = tokenizer.token_to_id("<|end|>")
    left_out, told = (ids_of(read_texts(path, source, 500, parse_special=flag)) for flag in (None, True))
    assert (left_out.count(end), told.count(end)) == (2, 3)  # the system message's, the user's; the text's


def test_conversations_are_rendered_and_follow_one_another(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", QUESTION, "", TALK, {"text": "Hello there."})
    read = read_texts(str(path), source, 10_000)
    wanted = [*encode(render(QUESTION, ""), tokenizer), *encode(render(TALK, ""), tokenizer)]
    assert ids_of(read) == wanted + tokenizer.encode("Hello there.").ids
    assert len(read.sequences) == 1
    assert read.sequences[0].dtype == np.int32
    assert read.kinds == {"conversation": 2, "text": 1}
    assert read.name == "a.jsonl"


def sizes(tmp_path: Path, source: Source, length: int, *documents: int, limit: int | None = None) -> list[int]:
    """The sizes of the chunks that documents of these many tokens are put into."""
    path = write_lines(tmp_path / "sizes.jsonl", *({"text": "1 " * (n // 2) + "1" * (n % 2)} for n in documents))
    return [len(chunk) for chunk in read_texts(path, source, length, limit).sequences]


def test_what_does_not_fit_starts_a_new_chunk_and_what_is_longer_is_cut(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert len(tokenizer.encode("1 1 1 ").ids) == 6
    assert sizes(tmp_path, source, 10, 4, 6) == [10]
    assert sizes(tmp_path, source, 10, 4, 7) == [4, 7]
    assert sizes(tmp_path, source, 10, 4, 10, 3) == [4, 10, 3]
    assert sizes(tmp_path, source, 10, 4, 23) == [10, 10, 7]
    assert sizes(tmp_path, source, 10, 25, 5, 5) == [10, 10, 10, 5]
    assert sizes(tmp_path, source, 10, 21, 10, 10) == [10, 10, 10, 10]  # one token never stands alone; the last is lost
    assert sizes(tmp_path, source, 10, 11) == [10]


def test_the_limit_is_exact(source: Source, tmp_path: Path) -> None:
    assert sizes(tmp_path, source, 10, 4, 7, 9, limit=13) == [4, 9]
    assert sizes(tmp_path, source, 10, 25, 9, limit=20) == [10, 10]
    assert sizes(tmp_path, source, 10, 25, limit=2) == [2]


def test_nothing_is_read_beyond_the_limit(source: Source, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TALK, "this is no JSON")
    assert read_texts(path, source, 10, 20).tokens == 20
    with pytest.raises(BadInput):
        read_texts(path, source, 10)


def test_the_digest_is_that_of_the_tokens_and_the_length(source: Source, tmp_path: Path) -> None:
    one, same = write_lines(tmp_path / "a.jsonl", TALK), write_lines(tmp_path / "b.jsonl", "", TALK)
    other = write_lines(tmp_path / "c.jsonl", QUESTION)
    digests = [
        read_texts(path, source, length).digest for path, length in ((one, 64), (same, 64), (one, 65), (other, 64))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert digests[0] == read_texts(one, source, 64, 10**9).digest
    assert len(digests[0]) == 64


def test_the_default_set_is_read_from_the_package(source: Source) -> None:
    read = read_texts("default", source, 512, 20_000)
    assert read.name == "default"
    assert read.tokens in (20_000, 19_999)
    assert read.kinds["conversation"] > 5


@pytest.mark.parametrize("kind", ["gguf", "metal"])
def test_a_file_without_a_tokenizer_json_gives_the_same_tokens(
    kind: str, source: Source, small_model: Model, tmp_path: Path
) -> None:
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model.bin")
    (write_gguf if kind == "gguf" else write_metal)(small_model, path)
    with open_source(path) as opened:
        assert read_texts("default", opened, 100, 5000).digest == read_texts("default", source, 100, 5000).digest


class Changed(Source):
    """A source with another tokenizer."""

    def __init__(self, source: Source, tokenizer: bytes | None) -> None:
        self.path, self.config = source.path, source.config
        self.companions = {} if tokenizer is None else {"tokenizer.json": tokenizer}


def with_table(source: Source, tokenizer: Tokenizer, **changes: Any) -> Source:
    return Changed(source, json.dumps(json.loads(tokenizer.to_str()) | changes).encode())


def test_a_source_without_a_tokenizer_is_refused(source: Source) -> None:
    with pytest.raises(Refused, match="--tokenizer FOLDER"):
        read_texts("default", Changed(source, None), 100)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(content: bytes, source: Source) -> None:
    with pytest.raises(BadInput, match="the tokenizer cannot be read"):
        read_texts("default", Changed(source, content), 100)


def test_a_token_beyond_the_models_rows_is_refused(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    bigger = Tokenizer.from_str(tokenizer.to_str())
    bigger.add_tokens([f"extra{i}" for i in range(20)])
    path = write_lines(tmp_path / "a.jsonl", {"text": "Hello extra1"}, {"text": "extra19"})
    assert bigger.token_to_id("extra19") >= SMALL.vocab > bigger.token_to_id("extra1")
    with pytest.raises(Refused, match=f"ids below {SMALL.vocab}") as error:
        read_texts(path, Changed(source, bigger.to_str().encode()), 100)
    assert "extra19" in str(error.value.found)


def test_a_tokenizers_own_cutting_and_filling_are_not_done(source: Source, tokenizer: Tokenizer) -> None:
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(5)
    cut.enable_padding(length=50)
    read = read_texts("default", Changed(source, cut.to_str().encode()), 100, 1000)
    assert read.digest == read_texts("default", source, 100, 1000).digest


def test_a_control_token_that_is_not_marked_as_one_stays_out_of_text(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    added = [{**token, "special": False} for token in json.loads(tokenizer.to_str())["added_tokens"]]
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "<|end|>"}]})
    unmarked = with_table(source, tokenizer, added_tokens=added)
    assert read_texts(path, unmarked, 500).digest == read_texts(path, source, 500).digest


def test_added_words_are_still_found(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    more = Tokenizer.from_str(tokenizer.to_str())
    more.add_tokens([AddedToken("wordhood", normalized=False)])
    path = write_lines(tmp_path / "a.jsonl", {"text": "a wordhood"})
    assert more.token_to_id("wordhood") in ids_of(read_texts(path, Changed(source, more.to_str().encode()), 100))


def test_dropout_is_refused(source: Source, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"] | {"dropout": 0.5}
    with pytest.raises(Refused, match="at random"):
        read_texts("default", with_table(source, tokenizer, model=model), 100)


BAD_LINES = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[1]", "not an object"),
    "neither": ({"prompt": "x"}, "neither a conversation nor a text"),
    "both": ({"text": "x", **TALK}, "neither a conversation nor a text, or both"),
    "text that is a number": ({"text": 1}, "text is not a text"),
    "half a character": ('{"text": "\\ud800"}', "not Unicode text"),
    "a key twice": ('{"text": "a", "text": "b"}', "twice"),
    "a bad conversation": ({"messages": [{"role": "user"}]}, "content is missing"),
    "deep nesting": ('{"text": ' + "[" * 100_000, "nested too deeply"),
    "a huge number": ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize(("line", "what"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(line: object, what: str, source: Source, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TALK, "", line)
    with pytest.raises(BadInput) as error:
        read_texts(path, source, 100)
    assert what in error.value.what
    assert error.value.file == f"{path}, line 3"


def test_a_line_of_unreasonable_length_is_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MAX_LINE", 1000)
    with pytest.raises(BadInput, match="unreasonably long"):
        read_texts(write_lines(tmp_path / "a.jsonl", {"text": "x" * 1000}), source, 100)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"a\xff\n", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_refused(name: str, content: bytes, source: Source, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "a.txt" and content == b"\n\n":
        content = b"\n"
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_texts(tmp_path / name, source, 100)
    assert str(tmp_path / name) in str(error.value.file)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "folder.txt", "folder.jsonl"])
def test_what_cannot_be_read_is_refused(name: str, source: Source, tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(BadInput, match="the text cannot be read"):
        read_texts(tmp_path / name, source, 100)


def test_what_makes_no_sense_is_a_usage_error(source: Source) -> None:
    for spec, length, limit in (
        ("a.parquet", 100, None),
        ("standard", 100, None),
        ("default", 1, None),
        ("default", 9, 1),
    ):
        with pytest.raises(UsageError):
            read_texts(spec, source, length, limit)


def test_a_byte_order_mark_is_no_text(source: Source, tmp_path: Path) -> None:
    for name, content in (("a.txt", "Hello there"), ("a.jsonl", json.dumps(TALK))):
        (tmp_path / name).write_bytes(content.encode())
        plain = read_texts(tmp_path / name, source, 100).digest
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_texts(tmp_path / name, source, 100).digest == plain


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["a.txt", "a.jsonl"]))
def test_any_bytes_are_read_or_refused(source: Source, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(GptOssError):
        read_texts(tmp_path / name, source, 100)

"""The tokenizer between tokenizer.json, GGUF and metal: the same bytes back, and nothing hostile gets through."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_gguf, write_hf, write_metal
from tokenizers import Tokenizer

from gptoss_convert.convert import tokenizer_files, tokens
from gptoss_convert.convert.companions import companion_bytes
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import BadInput, Refused

TINY = replace(SMALL, layers=1, experts=2, experts_per_token=1)
Table = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "hf"
    write_hf(Model(TINY), path)
    return path


def vocabulary(folder: Path, rows: int = TINY.vocab) -> tokens.Vocabulary:
    with open_source(folder) as source:
        return tokens.read_vocabulary(source.companions, rows, folder)


def test_ids_without_a_token_are_named_padding(folder: Path) -> None:
    found = vocabulary(folder)
    assert len(found.tokens) == len(found.types) == TINY.vocab
    spare = range(TINY.vocab - TINY.spare_rows, TINY.vocab)
    assert [found.tokens[i] for i in spare] == [f"[PAD{i}]" for i in spare]
    assert {found.types[i] for i in spare} == {tokens.UNUSED}
    assert found.types.count(tokens.CONTROL) == 21
    assert found.ids == {"bos": TINY.token_id(199998), "eos": TINY.token_id(200002), "pad": TINY.token_id(199999)}


@pytest.mark.parametrize("through", ["gguf", "metal"])
def test_a_tokenizer_comes_back_to_the_byte(through: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / ("model.gguf" if through == "gguf" else "model.bin")
    (write_gguf if through == "gguf" else write_metal)(Model(TINY), path)
    with open_source(path) as source:
        made = json.loads(companion_bytes(source.companions["tokenizer.json"]))
        whole = json.loads((folder / "tokenizer.json").read_text())
        if through == "metal":  # the last five special tokens are not in the file
            first = TINY.text_tokens
            whole["added_tokens"] = whole["added_tokens"][:16]
            names = {t["id"]: t["content"] for t in made["added_tokens"]}
            kept = {t["id"]: t["content"] for t in whole["added_tokens"]}
            unknown = {i for i in kept if names[i] != kept[i]}
            assert unknown <= {first + i for i in (2, 15)}  # named by UUIDs that the release's list leaves reserved
            for table in (made, whole):
                table["added_tokens"] = [t for t in table["added_tokens"] if t["id"] not in unknown]
        else:
            assert companion_bytes(source.companions["tokenizer.json"]) == (folder / "tokenizer.json").read_bytes()
        assert made == whole


def test_text_is_cut_the_same_after_the_way_through_a_gguf(folder: Path, tmp_path: Path) -> None:
    write_gguf(Model(TINY), tmp_path / "model.gguf")
    mine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with open_source(tmp_path / "model.gguf") as source:
        theirs = Tokenizer.from_str(companion_bytes(source.companions["tokenizer.json"]).decode())
    for text in ("Hello, world! 1234567 they'll <|start|>user", "\n\n  def f(x):\t你好 🙂", "İstanbul's naïve ﬁ", ""):
        assert mine.encode(text).ids == theirs.encode(text).ids
        assert mine.decode(mine.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_every_byte_has_its_own_symbol() -> None:
    symbols = [tokenizer_files.as_symbols(bytes([byte])) for byte in range(256)]
    assert len(set(symbols)) == 256
    assert all(len(symbol) == 1 and symbol.isprintable() and not symbol.isspace() for symbol in symbols)


def test_all_merges_are_every_split_by_rank() -> None:
    ranks = {token: i for i, token in enumerate([b"a", b"b", b"c", b"ab", b"bc", b"abc"])}
    assert tokenizer_files.all_merges(ranks) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


CHANGES: dict[str, Callable[[Table], Any]] = {
    "no model": lambda t: t.pop("model"),
    "a model as text": lambda t: t.update(model="BPE"),
    "WordPiece": lambda t: t["model"].update(type="WordPiece"),
    "a vocabulary as a list": lambda t: t["model"].update(vocab=["a"]),
    "an id beyond the rows": lambda t: t["model"]["vocab"].update({"zz": TINY.vocab}),
    "a negative id": lambda t: t["model"]["vocab"].update({"zz": -1}),
    "an id that is true": lambda t: t["model"]["vocab"].update({"zz": True}),
    "an id that is text": lambda t: t["model"]["vocab"].update({"zz": "7"}),
    "an id that is a fraction": lambda t: t["model"]["vocab"].update({"zz": 1.5}),
    "one id twice": lambda t: t["model"]["vocab"].update({"zz": 7}),
    "no merges": lambda t: t["model"].pop("merges"),
    "merges of three": lambda t: t["model"].update(merges=[["a", "b", "c"]]),
    "merges of numbers": lambda t: t["model"].update(merges=[[1, 2]]),
    "merges of objects": lambda t: t["model"].update(merges=[{"a": 1, "b": 2}]),
    "added tokens as an object": lambda t: t.update(added_tokens={"a": 1}),
    "an added token as text": lambda t: t["added_tokens"].append("x"),
    "an added token without an id": lambda t: t["added_tokens"].append({"content": "x"}),
    "an added token whose text is a list": lambda t: t["added_tokens"].append({"content": ["x"], "id": 390}),
    "an added token beyond the rows": lambda t: t["added_tokens"].append({"content": "x", "id": 10**6}),
    "an added token in another's place": lambda t: t["added_tokens"].append({"content": "x", "id": 3}),
    "half a surrogate pair": lambda t: t["model"]["vocab"].update({"\ud800": 395}),
    "half a surrogate pair in a merge": lambda t: t["model"]["merges"].append(["\ud800", "a"]),
    "another split": lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0),
    "a normalizer": lambda t: t.update(normalizer={"type": "NFC"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_is_refused_for_gguf_with(
    name: str, folder: Path, tmp_path: Path, copied: Callable[[Path], Path], convert: Any
) -> None:
    place = copied(folder)
    table = json.loads((place / "tokenizer.json").read_text())
    CHANGES[name](table)
    (place / "tokenizer.json").write_text(json.dumps(table))
    before = sorted(tmp_path.iterdir())
    with pytest.raises((BadInput, Refused)):
        convert(place, tmp_path / "m.gguf", "gguf")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"added_tokens_decoder": []}',
        '{"added_tokens_decoder": {"x": {}}}',
        '{"eos_token": [1]}',
        '{"eos_token": {"content": ["<|return|>"]}}',
        '{"added_tokens_decoder": {"٣": {"content": "x"}}}',
        '{"chat_template": 3}',
    ],
)
@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_odd_tokenizer_settings_are_ignored_or_bad_input(
    text: str, to: str, folder: Path, tmp_path: Path, copied: Callable[[Path], Path], convert: Any
) -> None:
    place = copied(folder)
    (place / "tokenizer_config.json").write_text(text)
    with contextlib.suppress(BadInput):
        convert(place, tmp_path / ("m.gguf" if to == "gguf" else "m"), to, proof=False)


def test_a_template_that_is_no_text_is_bad_input(
    folder: Path, tmp_path: Path, copied: Callable[[Path], Path], convert: Any
) -> None:
    place = copied(folder)
    (place / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(BadInput, match="not UTF-8"):
        convert(place, tmp_path / "m.gguf", "gguf")


def test_a_template_is_carried_and_never_rendered(
    folder: Path, tmp_path: Path, copied: Callable[[Path], Path], convert: Any
) -> None:
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}{% for x in range(10**12) %}"
    )
    place = copied(folder)
    (place / "chat_template.jinja").write_text(template)
    convert(place, tmp_path / "m.gguf", "gguf")
    convert(tmp_path / "m.gguf", tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template
    assert not (tmp_path / "ran").exists()


def test_a_template_inside_the_settings_is_found(folder: Path, copied: Callable[[Path], Path]) -> None:
    place = copied(folder)
    (place / "chat_template.jinja").unlink()
    settings = json.loads((place / "tokenizer_config.json").read_text()) | {"chat_template": "{{ inline }}"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    assert vocabulary(place).template == "{{ inline }}"

"""genai_config.json: sampling as OpenAI means it, or as the source's own generation_config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CUTS_NOTHING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


@pytest.fixture
def searched(hf_folder: Path, copied: Callable[[Path], Path], tmp_path: Path, convert: Any) -> Callable[..., Any]:
    """Converts with these keys added to generation_config.json → what genai_config.json says of them, and the notes."""

    def made(**keys: Any) -> tuple[dict[str, Any], list[str]]:
        path = copied(hf_folder) / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        plan = convert(path.parent, tmp_path / "onnx", "onnx", proof=False).plan
        search = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["search"]
        return {key: search[key] for key in CUTS_NOTHING}, plan.notes

    return made


@pytest.fixture
def ended(hf_folder: Path, copied: Callable[[Path], Path], tmp_path: Path, convert: Any) -> Callable[..., Any]:
    """Converts with these keys in generation_config.json, one token's name taken from the tokenizer → end tokens, notes."""
    folder = copied(hf_folder)

    def made(lacking: str = "", **keys: Any) -> tuple[list[int], list[str]]:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None} | keys))
        if lacking:
            tokenizer = folder / "tokenizer.json"
            tokenizer.write_text(tokenizer.read_text().replace(lacking, "<|other|>"))
        plan = convert(folder, tmp_path / "onnx", "onnx", proof=False, overwrite=True).plan
        return json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["eos_token_id"], plan.notes

    return made


def test_sampling_cuts_nothing_off_where_the_source_says_nothing(searched: Callable[..., Any]) -> None:
    assert searched()[0] == CUTS_NOTHING


def test_sampling_is_the_sources_own_where_it_says_more(searched: Callable[..., Any]) -> None:
    own = {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    assert searched(**own)[0] == own


@pytest.mark.parametrize("whole", [-1, 0, 400, 10**6])
def test_a_top_k_of_the_whole_vocabulary_is_none(searched: Callable[..., Any], whole: int) -> None:
    assert searched(top_k=whole)[0] == CUTS_NOTHING  # genai refuses −1 and more than the vocabulary, which has 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_k", 2.5),
        ("top_k", -2),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_that_no_sampling_has_is_left_out_and_noted(searched: Callable[..., Any], key: str, value: Any) -> None:
    search, notes = searched(**{key: value})
    assert search == CUTS_NOTHING
    assert [note for note in notes if key in note and "generation_config.json" in note]


# --- end tokens --------------------------------------------------------------------------------------------------------


def test_what_generation_config_lists_more_ends_a_generation_too(ended: Callable[..., Any]) -> None:
    """What lies beyond the vocabulary of 400, or is no id, is left out; nothing is named twice."""
    harmonys = ended()[0]
    assert len(harmonys) == 3
    assert ended(eos_token_id=[harmonys[0], 7, 399, 400, -1, True, "x"])[0] == [*harmonys, 7, 399]
    assert ended(eos_token_id=5)[0][:4] == [*harmonys, 5]


def test_end_tokens_that_the_tokenizer_does_not_have_are_noted(ended: Callable[..., Any]) -> None:
    found, notes = ended(lacking="<|call|>")
    assert len(found) == 2
    assert any("cannot name <|call|>" in note for note in notes)

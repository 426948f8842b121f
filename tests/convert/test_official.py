"""The pinned digests: complete, well formed, and recognised by size, name and digest."""

from __future__ import annotations

import re

import pytest
from support.hub import pinned, small_safetensors, table

from gptoss_convert.convert import official
from gptoss_convert.convert.official import official_name_of
from gptoss_convert.errors import BadInput

SMALL, LARGE = "openai/gpt-oss-20b", "openai/gpt-oss-120b"
TEMPLATE = "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146"
RELEASE_DAY_TEMPLATE = "f8d9255777615591a7cc1a7c932f5a69e181128902295e1b81221d20d983cac7"


def sizes(repo: str, layout: str = "") -> dict[str, int]:
    pins = official.load().repos[repo].files.values()
    return {pin.name: pin.size for pin in pins if pin.layout == layout and pin.size is not None}


def test_every_pin_is_well_formed() -> None:
    for repo in official.load().repos.values():
        assert re.fullmatch("[0-9a-f]{40}", repo.revision)
        for pin in (*repo.files.values(), *repo.older):
            assert pin.sha256 is None or re.fullmatch("[0-9a-f]{64}", pin.sha256)
            assert (pin.sha256 is None) == (pin.grade is None)
            assert pin.grade in (None, "A", "B", "C+", "C")
            assert pin.header_sha256 is None or re.fullmatch("[0-9a-f]{64}", pin.header_sha256)
            assert pin.evidence
        for prefix in repo.prefixes:
            assert 8 <= len(prefix.digits) < 64


@pytest.mark.parametrize(("repo", "total"), [(SMALL, 13_761_316_904), (LARGE, 65_248_893_184)])
def test_the_shards_of_the_hf_layout_add_up_to_the_published_totals(repo: str, total: int) -> None:
    assert sum(size for name, size in sizes(repo).items() if name.endswith(".safetensors")) == total


def test_the_smaller_model_is_pinned_completely() -> None:
    files = official.load().repos[SMALL].files
    assert len(files) == 18
    assert sum(pin.size or 0 for pin in files.values()) == 41_301_465_516
    assert all(pin.sha256 for pin in files.values())


def test_all_weights_have_a_digest_except_the_one_that_nobody_has_published() -> None:
    without = [pin.name for pin in official.load().repos[LARGE].files.values() if pin.is_weights and not pin.sha256]
    assert without == ["metal/model.bin"]


@pytest.mark.parametrize("repo", [SMALL, LARGE])
@pytest.mark.parametrize("layout", ["", "original", "metal"])
def test_each_layout_alone_is_recognised_in_its_place_and_as_a_folder_of_its_own(repo: str, layout: str) -> None:
    files = sizes(repo, layout)
    start = f"{layout}/" if layout else ""
    assert [(c.repo, c.prefix) for c in official.load().recognise(files)] == [(repo, "")]
    bare = {name.removeprefix(start): size for name, size in files.items()}
    assert [(c.repo, c.prefix) for c in official.load().recognise(bare)] == [(repo, start)]


def test_a_clone_with_git_lfs_pointers_instead_of_weights_is_recognised_by_its_small_files() -> None:
    files = {name: 135 if name.endswith((".safetensors", "tokenizer.json")) else n for name, n in sizes(SMALL).items()}
    assert [c.repo for c in official.load().recognise(files)] == [SMALL]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": 1806},
        {"tokenizer.json": 27_868_174, "chat_template.jinja": 16_738, "generation_config.json": 177},
        {"LICENSE": 11_357, "USAGE_POLICY": 200, "README.md": 7095},
        {"model-00000-of-00002.safetensors": 1, "config.json": 2},
    ],
)
def test_files_that_any_model_may_have_do_not_make_a_folder_official(files: dict[str, int]) -> None:
    assert official.load().recognise(files) == []


def test_digests_are_named_with_repository_and_revision() -> None:
    assert official_name_of(TEMPLATE) == f"chat_template.jinja of {SMALL} and {LARGE}"
    assert official_name_of(RELEASE_DAY_TEMPLATE) is not None
    assert "older revision" in str(official_name_of(RELEASE_DAY_TEMPLATE))
    assert official_name_of("0" * 64) is None


def test_a_file_lying_alone_is_found_by_its_digest() -> None:
    (pin,) = official.load().by_digest("3340a61d1a0391e8c5b5d3463d18d4c48129a84bbc04a554c762c99020aa06ed")
    assert (pin.repo, pin.name, pin.layout, pin.current) == (SMALL, "original/model.safetensors", "original", True)
    assert pin in official.load().by_size(13_761_300_984)


def test_older_versions_come_after_the_current_one() -> None:
    pins = official.load().repos[SMALL].pins("generation_config.json")
    assert [(pin.size, pin.current) for pin in pins] == [(177, True), (165, False)]
    assert pins[1].authority == f"official, older revision, {SMALL} @cbf31f62"


def test_a_republished_file_is_not_called_official() -> None:
    pin = official.load().repos["ggml-org/gpt-oss-20b-GGUF"].files["gpt-oss-20b-mxfp4.gguf"]
    assert "official" not in pin.authority
    assert "not OpenAI" in pin.authority


def test_of_two_models_the_one_with_more_matching_files_comes_first() -> None:
    shard, other = small_safetensors(1), small_safetensors(2, 4000)
    both = table(
        pinned("o/a", "1" * 40, {"m-0.safetensors": shard, "m-1.safetensors": other, "config.json": b"a"}),
        pinned("o/b", "2" * 40, {"m-0.safetensors": other, "config.json": b"bb"}),
    )
    files = {"m-0.safetensors": len(other), "m-1.safetensors": len(other), "config.json": 1}
    assert [c.repo for c in both.recognise(files)] == ["o/a", "o/b"]


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(BadInput, match="table"):
        official.table_from({"schema": "other/1", "repos": {}})

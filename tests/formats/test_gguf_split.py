"""GGUF models in several files: every part is found from any part, and a wrong part is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.gguf import Value, ValueType, build_header, i32, string, u16, u32
from gptoss_convert.formats.gguf_split import open_split, split_metadata, split_name


def write(path: Path, names: list[str], metadata: list[tuple[str, Value]]) -> Path:
    header, infos = build_header(metadata, [(name, 0, (8,)) for name in names])
    path.write_bytes(header + bytes(32 * len(infos)))
    return path


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts as published: the first one holds metadata only."""
    contents = [[], ["a", "b"], ["c"]]
    return [
        write(
            tmp_path / split_name("gpt-oss", no, 3), names, [("general.name", string("m")), *split_metadata(no, 3, 3)]
        )
        for no, names in enumerate(contents)
    ]


def refusal(path: Path, *mentions: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_split(path)
    for mention in mentions:
        assert mention in str(caught.value)


def test_names_count_from_one_and_numbers_from_zero() -> None:
    assert split_name("gpt-oss-120b-mxfp4", 0, 3) == "gpt-oss-120b-mxfp4-00001-of-00003.gguf"
    assert split_metadata(2, 3, 687) == [
        ("split.no", Value(ValueType.UINT16, 2)),
        ("split.count", Value(ValueType.UINT16, 3)),
        ("split.tensors.count", Value(ValueType.INT32, 687)),
    ]


@pytest.mark.parametrize(("stem", "no", "count"), [("m", 3, 3), ("m", -1, 3), ("m", 0, 0), ("m", 0, 65536), ("", 0, 1)])
def test_a_part_that_cannot_exist_has_no_name(stem: str, no: int, count: int) -> None:
    with pytest.raises(ValueError, match="no name"):
        split_name(stem, no, count)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_parts_are_found_from_any_one(parts: list[Path], given: int) -> None:
    assert open_split(parts[given]) == parts


def test_a_relative_path_gives_relative_parts(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parts[0].parent)
    assert open_split(Path(parts[1].name)) == [Path(part.name) for part in parts]


def test_parts_written_by_gguf_py_are_accepted(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "gpt-oss", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = open_split(tmp_path / "m-00002-of-00003.gguf")
    assert parts == [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_a_part_says_of_itself_what_gguf_py_reads(parts: list[Path]) -> None:
    reader = GGUFReader(parts[1])
    assert [reader.fields[key].contents() for key in ("split.no", "split.count", "split.tensors.count")] == [1, 3, 3]


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00001.gguf"])
def test_a_whole_model_is_its_only_part(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ["a"], [("x", u32(1))])
    assert open_split(path) == [path]


def test_a_model_in_one_part_that_says_so_is_its_only_part(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", ["a"], split_metadata(0, 1, 1))
    assert open_split(path) == [path]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    given = parts[1 if missing == 0 else 0]
    refusal(given, f"part {missing + 1} of 3 is missing", parts[missing].name, "download all parts")


def test_a_part_under_another_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[1].rename(tmp_path / "model.gguf")
    refusal(renamed, "name and its metadata disagree", "model.gguf", "split.count is 3")


def test_a_whole_model_under_the_name_of_a_part_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / split_name("m", 0, 2), ["a"], [])
    refusal(path, "disagree", path.name, "split.count is missing")


def test_exchanged_parts_are_noticed(parts: list[Path]) -> None:
    first, second = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(second)
    parts[2].write_bytes(first)
    refusal(parts[0], "split.no is wrong", parts[1].name, "found:    2", "expected: 1")


@pytest.mark.parametrize(
    ("metadata", "mentions"),
    [
        (split_metadata(1, 4, 3), ("split.count is wrong", "found:    4", "expected: 3")),
        (split_metadata(1, 3, 9), ("split.tensors.count is wrong", "found:    9", "expected: 3")),
        ([], ("no usable split.no", "nothing")),
        ([("split.no", u32(1)), *split_metadata(1, 3, 3)[1:]], ("no usable split.no", "UINT32")),
        ([*split_metadata(1, 3, 3)[:2], ("split.tensors.count", i32(-3))], ("no usable split.tensors.count", "-3")),
    ],
)
def test_a_part_that_says_something_else_is_named(
    parts: list[Path], metadata: list[tuple[str, Value]], mentions: tuple[str, ...]
) -> None:
    write(parts[1], ["a", "b"], metadata)
    refusal(parts[0], parts[1].name, *mentions)


def test_a_tensor_in_two_parts_is_refused(parts: list[Path]) -> None:
    write(parts[2], ["b"], split_metadata(2, 3, 3))
    refusal(parts[0], "in two parts", "tensor:   b", parts[1].name, parts[2].name)


@pytest.mark.parametrize("names", [[], ["c", "d"]])
def test_parts_that_do_not_add_up_are_refused(parts: list[Path], names: list[str]) -> None:
    write(parts[2], names, split_metadata(2, 3, 3))
    refusal(parts[0], "do not hold all tensors", f"found:    {2 + len(names)}", "expected: 3")


def test_a_hostile_number_of_parts_ends_at_the_first_missing_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / split_name("m", 0, 65535), [], [("split.count", u16(65535)), *split_metadata(0, 65535, 1)[::2]]
    )
    refusal(path, "part 2 of 65535 is missing")


def test_a_part_that_is_no_gguf_file_is_named(parts: list[Path]) -> None:
    parts[2].write_bytes(b"<!doctype html>")
    refusal(parts[0], "not a GGUF file", parts[2].name, "an HTML page")

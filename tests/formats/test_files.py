"""Reading files that somebody else wrote: ranges, changes under a run, special files, hostile JSON."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_convert.errors import BadInput, InputChanged
from gptoss_convert.formats.files import SourceFile, parse_json, read_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def refusal(text: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        parse_json(text, "config.json")
    assert "config.json" in str(caught.value)
    return str(caught.value)


def test_a_range_is_read_exactly(source: Path) -> None:
    with SourceFile(source) as file:
        assert file.size == 4096
        assert file.read(250, 10) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
        assert file.read(4096, 0) == b""
        buffer = bytearray(4)
        file.read_into(4092, buffer)
        assert buffer == bytes([252, 253, 254, 255])
        file.check_unchanged()


@pytest.mark.parametrize(("offset", "nbytes"), [(4096, 1), (0, 4097), (-1, 4), (4, -1), (2**63, 2**63), (0, 2**62)])
def test_a_range_outside_the_file_is_refused_before_memory_is_taken(source: Path, offset: int, nbytes: int) -> None:
    with SourceFile(source) as file, pytest.raises(BadInput) as caught:
        file.read(offset, nbytes)
    assert str(source) in str(caught.value)
    assert "outside the file" in caught.value.what


def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(BadInput, match="a FIFO") as caught:
        SourceFile(fifo)
    assert caught.value.file == str(fifo)


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a folder"):
        SourceFile(tmp_path)


def test_a_device_is_refused() -> None:
    with pytest.raises(BadInput, match="a device"):
        SourceFile(Path("/dev/zero"))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model.bin")
        with pytest.raises(BadInput, match=r"model\.bin"):
            SourceFile(Path("model.bin"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file") as caught:
        SourceFile(tmp_path / "absent")
    assert "absent" in str(caught.value)


def test_a_file_truncated_while_it_is_read_is_an_error_and_no_crash(source: Path) -> None:
    with SourceFile(source) as file:
        os.truncate(source, 100)
        with pytest.raises(InputChanged, match="shorter") as caught:
            file.read(0, 4096)
    assert str(source) in str(caught.value)


def test_a_file_that_is_written_to_is_noticed(source: Path) -> None:
    with SourceFile(source) as file:
        with source.open("ab") as handle:
            handle.write(b"more")
        with pytest.raises(InputChanged, match="changed"):
            file.check_unchanged()


def test_a_file_of_the_same_size_and_a_new_time_is_noticed(source: Path) -> None:
    with SourceFile(source) as file:
        os.utime(source, ns=(0, 1))
        with pytest.raises(InputChanged, match="modified at 1 ns"):
            file.check_unchanged()


def test_a_file_replaced_under_its_name_is_noticed(source: Path) -> None:
    with SourceFile(source) as file:
        other = source.with_name("other")
        other.write_bytes(source.read_bytes())
        other.replace(source)
        with pytest.raises(InputChanged, match="changed"):
            file.check_unchanged()


def test_a_file_that_vanishes_is_noticed(source: Path) -> None:
    with SourceFile(source) as file:
        source.unlink()
        with pytest.raises(InputChanged, match="vanished"):
            file.check_unchanged()


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, "é", null, true], "b": {"c": {}}}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, "é", None, True], "b": {"c": {}}}


def test_a_json_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}" + " " * 100)
    with pytest.raises(BadInput, match="too large") as caught:
        read_json(path, limit=101)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ['{"key": 1, "key": 2}', '{"a": [{"key": 1, "x": 2, "key": 1}]}'])
def test_a_repeated_key_is_refused_at_any_depth(text: str) -> None:
    assert "found:    key" in refusal(text.encode())


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(name: str) -> None:
    assert name in refusal(b'{"a": ' + name.encode() + b"}")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e309", "1" + "0" * 400 + ".0"])
def test_numbers_that_overflow_to_infinity_are_refused_at_any_depth(number: str) -> None:
    message = refusal(f'{{"a": [{{"b": {number}}}]}}'.encode())
    assert "too large" in message
    assert number in message


def test_the_largest_and_the_smallest_numbers_are_read() -> None:
    text = b'{"a": 1.7976931348623157e308, "b": 1e-999, "c": "1e999", "d": 123456789012345678901234567890}'
    assert parse_json(text, "x") == {
        "a": sys.float_info.max,
        "b": 0.0,
        "c": "1e999",
        "d": 123456789012345678901234567890,
    }


@pytest.mark.parametrize(
    "text",
    [
        r'{"a": "x\ud800"}',
        r'{"a": "\uDFFFx"}',
        r'{"a": "\ude00\ud83d"}',
        r'{"\uDbff": 1}',
        r'{"a": [1, [{"b": ["\ud83d\ud83d\ude00"]}]]}',
        r'{"a": {"x": {"\ude00": null}}}',
        r'{"a": "\\\ud800"}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused_in_keys_and_strings(text: str) -> None:
    message = refusal(text.encode())
    assert "not Unicode text" in message
    assert message.encode()


def test_whole_pairs_and_escaped_backslashes_are_read() -> None:
    text = r'{"\ud83d\ude00": ["\uD83D\uDE00", "\\ud800", "\u00e9\ud7ff\ue000"]}'
    assert parse_json(text.encode(), "x") == {"\U0001f600": ["\U0001f600", r"\ud800", "\u00e9\ud7ff\ue000"]}


@pytest.mark.parametrize("unit", ["[", '{"a":'])
def test_deep_nesting_is_refused(unit: str) -> None:
    assert "nested too deeply" in refusal(b'{"a":' + unit.encode() * 100_000)


def test_numbers_of_thousands_of_digits_are_refused() -> None:
    assert "not valid JSON" in refusal(b'{"a": ' + b"9" * 5000 + b"}")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{}x", b'{"a": 1,}', b'{"a": \xff}', "{}".encode("utf-16"), b"\xef\xbb\xbf{}"]
)
def test_what_is_not_json_in_utf_8_is_refused(text: bytes) -> None:
    assert "not valid JSON" in refusal(text)


@pytest.mark.parametrize("text", [b"[]", b"1", b'"text"', b"null"])
def test_json_that_is_not_an_object_is_refused(text: bytes) -> None:
    assert "an object" in refusal(text)


def test_a_git_lfs_pointer_is_named_with_the_remedy() -> None:
    assert "git lfs pull" in refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.binary(max_size=200), st.text(alphabet='{}[]":,0123456789.eE-+ntf\\u \n', max_size=200).map(str.encode)
    )
)
def test_arbitrary_bytes_are_an_object_or_bad_input(text: bytes) -> None:
    with contextlib.suppress(BadInput):
        value = parse_json(text, "x")
        assert isinstance(value, dict)
        # What is accepted can be written again by anyone: no infinity, no half characters.
        assert json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value

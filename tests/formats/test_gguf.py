"""The GGUF header: same as gguf-py on good files, and an answer in milliseconds on those that gguf-py hangs on."""

from __future__ import annotations

import math
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import (
    GgufHeader,
    TensorInfo,
    Value,
    ValueType,
    align,
    array,
    boolean,
    build_header,
    f32,
    i32,
    read_header,
    string,
    tensor_nbytes,
    u16,
    u32,
    u64,
)

Write = Callable[[bytes], Path]
MXFP4, BF16, F32, Q8_0 = 39, 30, 0, 8


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def read(path: Path) -> GgufHeader:
    with SourceFile(path) as file:
        return read_header(file)


def refusal(path: Path, *mentions: str) -> str:
    with pytest.raises(BadInput) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    for mention in mentions:
        assert mention in message
    return message


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def preamble(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int, rank: int | None = None) -> bytes:
    rank = len(shape) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", rank, *shape, kind, offset)


def with_tensors(*infos: bytes, data: int, keys: tuple[bytes, ...] = ()) -> bytes:
    header = preamble(len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % 32) + bytes(data)


def with_data(header: bytes, infos: list[TensorInfo]) -> bytes:
    """A whole file: each tensor filled with its number, padded."""
    content = bytearray(header)
    for number, info in enumerate(infos, 1):
        content += bytes(info.offset - len(content)) + bytes([number]) * info.nbytes
    return bytes(content)


METADATA: list[tuple[str, Value]] = [
    ("general.architecture", string("gpt-oss")),
    ("general.file_type", u32(38)),
    ("gpt-oss.attention.layer_norm_rms_epsilon", f32(1e-5)),
    ("tokenizer.ggml.add_bos_token", boolean(False)),
    ("tokenizer.ggml.tokens", array(ValueType.STRING, ["a", "", "Ġthe", "é"])),
    ("tokenizer.ggml.token_type", array(ValueType.INT32, [1, -3, 5])),
    ("scores", array(ValueType.FLOAT32, [0.5, -1.0])),
    ("flags", array(ValueType.BOOL, [True, False, True])),
    ("nothing", array(ValueType.UINT8, [])),
    ("split.no", u16(0)),
    ("large", u64(2**64 - 1)),
    ("small", i32(-(2**31))),
    ("tokenizer.chat_template", string("{%- if x -%}\r\n\t\0…\U0001f600")),
]
TENSORS: list[tuple[str, int, tuple[int, ...]]] = [
    ("token_embd.weight", BF16, (64, 5)),
    ("blk.0.ffn_up_exps.weight", MXFP4, (64, 3, 2)),
    ("blk.0.attn_sinks.weight", F32, (3,)),
    ("output.weight", Q8_0, (32, 7)),
]


def test_what_is_built_reads_back_the_same(write: Write) -> None:
    header, infos = build_header(METADATA, TENSORS)
    found = read(write(with_data(header, infos)))
    assert list(found.metadata.items()) == METADATA
    assert list(found.tensors.values()) == infos
    assert (found.version, found.alignment, found.data_offset) == (3, 32, len(header))
    assert [(i.name, i.type, i.shape) for i in infos] == TENSORS
    assert [i.type_name for i in infos] == ["BF16", "MXFP4", "F32", "Q8_0"]
    assert [i.nbytes for i in infos] == [640, 2 * 3 * 2 * 17, 12, 7 * 34]
    assert all(i.offset % 32 == 0 for i in infos)


def test_a_built_file_is_read_alike_by_gguf_py(write: Write) -> None:
    header, infos = build_header(METADATA, TENSORS)
    reader = GGUFReader(write(with_data(header, infos)))
    for name, value in METADATA:
        field = reader.get_field(name)
        assert field is not None
        assert field.types[0] == value.type
        if name != "nothing":
            assert field.contents() == value.value
    assert reader.data_offset == len(header)
    for number, (info, theirs) in enumerate(zip(infos, reader.tensors, strict=True), 1):
        assert theirs.name == info.name
        assert theirs.tensor_type == info.type
        assert tuple(theirs.shape.tolist()) == info.shape
        assert (theirs.data_offset, theirs.n_bytes) == (info.offset, info.nbytes)
        assert theirs.data.tobytes() == bytes([number]) * info.nbytes


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_a_file_written_by_gguf_py_reads_the_same_here(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "gpt-oss")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_bool("a.bool", True)
    writer.add_float32("a.float", 0.1)
    writer.add_int64("an.int", -5)
    writer.add_array("ids", [1, 2, 3])
    writer.add_token_list(["x", "Ġy", "é"])
    arrays = {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.arange(5, dtype=np.float16)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    blocks = np.arange(2 * 3 * 17, dtype=np.uint8).reshape(2, 3 * 17)
    writer.add_tensor("m", blocks, raw_dtype=GGMLQuantizationType.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, content = read(path), path.read_bytes()
    assert header.alignment == alignment
    assert header.metadata["a.float"] == f32(0.1)
    assert header.metadata["a.bool"] == boolean(True)
    assert header.metadata["an.int"] == Value(ValueType.INT64, -5)
    assert header.metadata["ids"] == array(ValueType.INT32, [1, 2, 3])
    assert header.metadata["tokenizer.ggml.tokens"] == array(ValueType.STRING, ["x", "Ġy", "é"])
    assert {n: t.shape for n, t in header.tensors.items()} == {"f": (3, 2), "h": (5,), "m": (96, 2)}
    for name, values in (*arrays.items(), ("m", blocks)):
        info = header.tensors[name]
        assert content[info.offset : info.offset + info.nbytes] == values.tobytes()
    rebuilt, infos = build_header(
        list(header.metadata.items()), [(t.name, t.type, t.shape) for t in header.tensors.values()], alignment
    )
    assert rebuilt == content[: len(rebuilt)]
    assert infos == list(header.tensors.values())


@pytest.mark.parametrize("kind", list(GGMLQuantizationType), ids=lambda kind: kind.name)
def test_the_size_of_every_type_is_that_of_gguf_py(kind: GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert tensor_nbytes(kind, (3 * block, 5)) == 15 * block_bytes
    if block > 1:
        with pytest.raises(BadInput, match=f"a multiple of {block}"):
            tensor_nbytes(kind, (block + 1, block), tensor="t")


def test_the_expert_tensors_of_the_released_models_have_the_known_sizes() -> None:
    assert tensor_nbytes(MXFP4, (2880, 2880, 32)) == 141_004_800
    assert tensor_nbytes(MXFP4, (2880, 2880, 128)) == 564_019_200


@pytest.mark.parametrize("extra", [0, 5, -1])
def test_a_file_without_tensors_may_end_anywhere_in_the_padding(write: Write, extra: int) -> None:
    header, infos = build_header(METADATA, [])
    unpadded = header.rstrip(b"\0")
    found = read(write({0: header, 5: unpadded + bytes(5), -1: unpadded}[extra]))
    assert infos == []
    assert found.tensors == {}
    assert found.data_offset == len(header)


def test_the_padding_after_the_last_tensor_may_be_there_or_not(write: Write) -> None:
    content = with_tensors(tensor("a", (3,), F32, 0), data=12)
    assert read(write(content)).tensors == read(write(content + bytes(20))).tensors
    refusal(write(content + bytes(21)), "follow the last tensor")


def test_version_2_is_read(write: Write) -> None:
    assert read(write(preamble(0, 1, version=2) + key("a", 4, struct.pack("<I", 7)))).metadata == {"a": u32(7)}


def test_bytes_that_are_not_utf_8_survive_unchanged(write: Write) -> None:
    template = b"\xff\xfe{{ x }}\xed\xa0\x80\x80"
    content = preamble(0, 1) + key("tokenizer.chat_template", 8, text(template))
    value = read(write(content)).metadata["tokenizer.chat_template"]
    assert value.value.encode("utf-8", "surrogateescape") == template
    rebuilt, _ = build_header([("tokenizer.chat_template", value)], [])
    assert rebuilt.rstrip(b"\0") == content


def test_a_real_tokenizer_is_read_and_built_in_well_under_a_second(write: Write) -> None:
    tokens = [f"Ġtoken{n}" for n in range(201_088)]
    merges = [f"Ġab{n} éc{n}" for n in range(446_189)]
    metadata = [
        ("tokenizer.ggml.tokens", array(ValueType.STRING, tokens)),
        ("tokenizer.ggml.token_type", array(ValueType.INT32, [1] * len(tokens))),
        ("tokenizer.ggml.merges", array(ValueType.STRING, merges)),
    ]
    start = time.process_time()
    header, _ = build_header(metadata, [])
    built = time.process_time()
    path = write(header)
    found = read(path)
    done = time.process_time()
    assert list(found.metadata.items()) == metadata
    assert built - start < 1.5  # a quarter of this on an idle machine
    assert done - built < 1.5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"GG", "plain text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-LFS pointer"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (b"GPT-OSS v1.0" + bytes(40), "metal"),
        (b"\x01\x02\x03\x04\x05", r"b'\x01\x02\x03\x04'"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(write: Write, content: bytes, sentence: str) -> None:
    refusal(write(content), "not a GGUF file", sentence)


def test_a_big_endian_file_is_refused_with_the_reason(write: Write) -> None:
    refusal(write(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "big-endian", "little-endian")


@pytest.mark.parametrize("version", [0, 1, 4, 70000])
def test_other_versions_are_refused(write: Write, version: int) -> None:
    refusal(write(preamble(0, 0, version)), "version", f"found:    {version}", "2 or 3")


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 10**6, 1])
def test_counts_that_the_file_cannot_hold_are_refused_at_once(write: Write, count: int) -> None:
    refusal(write(preamble(0, count)), "more metadata keys than the file can hold", str(count))
    refusal(write(preamble(count, 0)), "more tensors than the file can hold", str(count))


ARRAY = struct.Struct("<IQ")
HUGE = 2**63

KEYS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "an array of 2^62 strings": (key("tokens", 9, ARRAY.pack(8, 2**62)), ("elements in", "'tokens'")),
    "an array of 2^64 - 1 bytes": (key("tokens", 9, ARRAY.pack(0, 2**64 - 1)), ("elements in", "'tokens'")),
    "an array that ends early": (key("ids", 9, ARRAY.pack(5, 3) + bytes(11)), ("elements in", "'ids'")),
    "a string of 2^63 bytes": (key("name", 8, struct.pack("<Q", HUGE) + b"x"), ("ends inside", "'name'")),
    "a token of 2^63 bytes": (
        key("tokens", 9, ARRAY.pack(8, 2) + text("a") + struct.pack("<Q", HUGE)),
        ("ends inside", "'tokens'"),
    ),
    "an array of arrays": (key("deep", 9, ARRAY.pack(9, 1) + ARRAY.pack(0, 0)), ("array of arrays", "'deep'")),
    "an unknown type": (key("odd", 13, bytes(8)), ("type that is not known", "'odd'", "13")),
    "an unknown element type": (key("odd", 9, ARRAY.pack(99, 0)), ("type that is not known", "'odd'", "99")),
    "a bool of 2": (key("flag", 7, b"\2"), ("neither true nor false", "'flag'")),
    "an array of bools with a 255": (key("flags", 9, ARRAY.pack(7, 2) + b"\1\xff"), ("neither true", "'flags'")),
    "an empty key": (key("", 0, b"\0"), ("a metadata key has a bad length", "1 to 65535")),
    "a key of 2^63 bytes": (struct.pack("<QI", HUGE, 0) + b"\0", ("bad length", str(HUGE))),
    "a key of 65536 bytes": (key("k" * 65536, 0, b"\0"), ("bad length", "65536")),
    "a key that hides": (key("a\u202eb", 0, b"\0"), ("not printable", r"a\u202eb")),
    "a key that is not UTF-8": (key(b"a\xff", 0, b"\0"), ("not printable", r"a\udcff")),
    "a scalar cut short": (key("abcdefgh", 10, b"\0"), ("ends inside", "'abcdefgh'")),
    "alignment 0": (key("general.alignment", 4, struct.pack("<I", 0)), ("general.alignment", "power of two")),
    "alignment 3": (key("general.alignment", 4, struct.pack("<I", 3)), ("general.alignment", "power of two")),
    "alignment 4": (key("general.alignment", 4, struct.pack("<I", 4)), ("general.alignment", "power of two")),
    "alignment 2 MiB": (key("general.alignment", 4, struct.pack("<I", 2 << 20)), ("general.alignment", "1048576")),
    "alignment as text": (key("general.alignment", 8, text("32")), ("general.alignment", "STRING")),
    "alignment of 64 bits": (key("general.alignment", 10, struct.pack("<Q", 32)), ("general.alignment", "UINT64")),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_hostile_metadata_key_is_refused_and_named(write: Write, case: str) -> None:
    payload, mentions = KEYS[case]
    refusal(write(preamble(0, 1) + payload), *mentions)


def test_the_file_of_49_bytes_on_which_gguf_py_hangs_is_refused(write: Write) -> None:
    content = preamble(0, 1) + key("a", 9, ARRAY.pack(0, 2**40))
    assert len(content) == 49
    refusal(write(content), "'a'", str(2**40))


def test_a_repeated_metadata_key_is_refused(write: Write) -> None:
    again = key("tokenizer.chat_template", 8, text("x"))
    refusal(write(preamble(0, 2) + again + again), "twice", "tokenizer.chat_template")


def test_the_elements_of_all_arrays_together_are_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_convert.formats.gguf_cursor.MAX_ELEMENTS", 10)
    content = key("a", 9, ARRAY.pack(0, 6) + bytes(6)) + key("b", 9, ARRAY.pack(0, 6) + bytes(6))
    refusal(write(preamble(0, 2) + content), "elements in the metadata key 'b'", "at most 4")


def test_a_header_larger_than_the_bound_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_convert.formats.gguf_cursor.MAX_HEADER_BYTES", 100)
    refusal(write(preamble(0, 1) + key("a", 8, text("x" * 200))), "header is too large", "'a'")


INFOS: dict[str, tuple[tuple[bytes, ...], int, tuple[str, ...]]] = {
    "rank 0": ((tensor("t", (8,), F32, 0, rank=0),), 64, ("rank", "1 to 4")),
    "rank 5": ((tensor("t", (8, 1, 1, 1, 1), F32, 0),), 64, ("rank", "found:    5")),
    "rank 2^32 - 1": ((tensor("t", (8,), F32, 0, rank=2**32 - 1),), 64, ("rank",)),
    "a zero size": ((tensor("t", (8, 0), F32, 0),), 64, ("none zero",)),
    "a product that wraps around": ((tensor("t", (2**32, 2**32), F32, 0),), 64, ("impossibly large",)),
    "a product just past 2^63": ((tensor("t", (2**61, 4), 24, 0),), 64, ("impossibly large",)),
    "rows that are no whole blocks": ((tensor("t", (33,), MXFP4, 0),), 64, ("whole blocks", "a multiple of 32")),
    "a type that was removed": ((tensor("t", (32,), 4, 0),), 64, ("not known", "type 4")),
    "a type of the future": ((tensor("t", (32,), 2**32 - 1, 0),), 64, ("not known", "type 4294967295")),
    "an unaligned offset": ((tensor("u", (8,), F32, 0), tensor("t", (8,), F32, 33)), 128, ("not aligned to 32",)),
    "an overlap": ((tensor("u", (16,), F32, 0), tensor("t", (8,), F32, 32)), 128, ("overlaps", "data byte 32")),
    "the same place twice": ((tensor("u", (8,), F32, 0), tensor("t", (8,), F32, 0)), 128, ("overlaps",)),
    "an order that goes back": ((tensor("u", (8,), F32, 32), tensor("t", (8,), F32, 0)), 64, ("leaves a hole",)),
    "a hole at the start": ((tensor("t", (8,), F32, 32),), 64, ("leaves a hole", "data byte 32")),
    "a hole in the middle": ((tensor("u", (8,), F32, 0), tensor("t", (8,), F32, 64)), 128, ("leaves a hole",)),
    "a range past the end": ((tensor("t", (8,), F32, 0),), 31, ("truncated",)),
    "an offset past the end": ((tensor("t", (8,), F32, 2**63),), 32, ("leaves a hole",)),
    "the same name twice": ((tensor("t", (8,), F32, 0), tensor("t", (8,), F32, 32)), 64, ("twice",)),
}


@pytest.mark.parametrize("case", INFOS)
def test_a_hostile_tensor_is_refused_and_named(write: Write, case: str) -> None:
    infos, data, mentions = INFOS[case]
    name = "u" if case == "an order that goes back" else "t"
    refusal(write(with_tensors(*infos, data=data)), f"tensor:   {name}", *mentions)


@pytest.mark.parametrize(
    ("name", "mention"),
    [(b"", "bad length"), (b"n" * 64, "bad length"), (b"a\0b", r"a\x00b"), (b"\xff", r"\udcff"), (b" t", "spaces")],
)
def test_an_unfit_tensor_name_is_refused(write: Write, name: bytes, mention: str) -> None:
    message = refusal(write(with_tensors(tensor(name, (8,), F32, 0), data=32)), "a tensor's name", mention)
    assert all(c.isprintable() or c == "\n" for c in message)


def test_a_tensor_name_of_63_bytes_is_accepted(write: Write) -> None:
    assert list(read(write(with_tensors(tensor("n" * 63, (8,), F32, 0), data=32))).tensors) == ["n" * 63]


def test_a_description_that_the_file_cuts_names_the_tensor(write: Write) -> None:
    content = preamble(1, 0) + tensor("blk.0.attn_sinks.weight", (64,), F32, 0)
    refusal(write(content[:-1]), "ends inside", "blk.0.attn_sinks.weight")


def test_an_alignment_other_than_32_must_stand_in_the_metadata() -> None:
    with pytest.raises(ValueError, match=r"general\.alignment"):
        build_header([], [], alignment=64)
    header, infos = build_header(
        [("general.alignment", u32(4096))], [("a", F32, (1,)), ("b", F32, (1,))], alignment=4096
    )
    assert len(header) == 4096
    assert [info.offset for info in infos] == [4096, 8192]


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ([("a", u32(-1))], []),
        ([("a", u32(2**32))], []),
        ([("a", array(ValueType.INT32, ["x"]))], []),
        ([("a", Value(ValueType.ARRAY, [[1]], ValueType.ARRAY))], []),
        ([("a", string("\ud800"))], []),
        ([("a", u32(1)), ("a", u32(1))], []),
        ([("", u32(1))], []),
        ([], [("n" * 64, F32, (1,))]),
        ([], [("a", F32, (1,)), ("a", F32, (1,))]),
    ],
)
def test_what_the_format_cannot_hold_is_not_built(metadata: Any, tensors: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        build_header(metadata, tensors)


def test_align_rounds_up_to_the_next_multiple() -> None:
    assert [align(n, 32) for n in (0, 1, 32, 33, 2**70 + 1)] == [0, 32, 32, 64, 2**70 + 32]


def bounded(kind: ValueType, low: int, high: int) -> st.SearchStrategy[Value]:
    numbers = st.integers(low, high)
    return numbers.map(lambda n: Value(kind, n)) | st.lists(numbers, max_size=5).map(lambda v: array(kind, v))


TEXTS = st.binary(max_size=20).map(lambda b: b.decode("utf-8", "surrogateescape"))
VALUES = st.one_of(
    bounded(ValueType.UINT8, 0, 255),
    bounded(ValueType.INT16, -(2**15), 2**15 - 1),
    bounded(ValueType.INT64, -(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False).map(f32),
    st.floats(allow_nan=False).map(lambda v: Value(ValueType.FLOAT64, v)),
    st.booleans().map(boolean),
    st.lists(st.booleans()).map(lambda v: array(ValueType.BOOL, v)),
    TEXTS.map(string),
    st.lists(TEXTS, max_size=5).map(lambda v: array(ValueType.STRING, v)),
)
NAMES = st.text(alphabet="abcdefghij._0123456789", min_size=1, max_size=63)


@settings(max_examples=100, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(NAMES, VALUES, max_size=6), names=st.sets(NAMES, max_size=4), data=st.data())
def test_any_header_that_is_built_reads_back_the_same(
    write: Write, metadata: dict[str, Value], names: set[str], data: st.DataObject
) -> None:
    kinds, sizes = st.sampled_from([F32, BF16, MXFP4, Q8_0]), st.lists(st.integers(1, 3), max_size=3)
    tensors = [(name, data.draw(kinds), (32 * data.draw(st.integers(1, 3)), *data.draw(sizes))) for name in names]
    header, infos = build_header(list(metadata.items()), tensors)
    found = read(write(with_data(header, infos)))
    assert list(found.metadata.items()) == list(metadata.items())
    assert list(found.tensors.values()) == infos
    assert all(info.nbytes == tensor_nbytes(kind, shape) for info, (_, kind, shape) in zip(infos, tensors, strict=True))


VALID = with_data(*build_header(METADATA, TENSORS))
BIG = st.sampled_from([2**62, 2**63 - 1, 2**64 - 1, 2**32, 2**31, 0, 1])


@settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(write: Write, data: st.DataObject) -> None:
    content = bytearray(VALID)
    where = st.integers(0, len(content) - 8)
    for position, byte in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=4)):
        content[position] = byte
    for position, number in data.draw(st.lists(st.tuples(where, BIG), max_size=2)):
        content[position : position + 8] = number.to_bytes(8, "little")
    path = write(
        bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content)
    )
    try:
        header = read(path)
    except BadInput:
        refusal(path)
    else:
        for info in header.tensors.values():
            assert info.offset + info.nbytes <= header.size
            assert math.prod(info.shape) > 0

"""The safetensors header: same as the library where both accept, stricter where the library lets things through."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save as save_numpy
from safetensors.torch import save_file as save_torch

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.safetensors import DTYPES, Header, TensorSpec, build_header, read_header, release_order

Write = Callable[[bytes], Path]
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LATE_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def framed(text: bytes, data: int = 8) -> bytes:
    """A file from the text of its header and a number of data bytes."""
    return len(text).to_bytes(8, "little") + text + bytes(data)


def read(path: Path) -> Header:
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


def original_layout(layers: int, experts: int) -> list[TensorSpec]:
    """The tensors of an official `original/` checkpoint."""
    specs: list[TensorSpec] = [
        ("embedding.weight", "BF16", (201088, 2880)),
        ("norm.scale", "BF16", (2880,)),
        ("unembedding.weight", "BF16", (201088, 2880)),
    ]
    block: list[TensorSpec] = [
        ("attn.norm.scale", "BF16", (2880,)),
        ("attn.qkv.weight", "BF16", (5120, 2880)),
        ("attn.qkv.bias", "BF16", (5120,)),
        ("attn.sinks", "BF16", (64,)),
        ("attn.out.weight", "BF16", (2880, 4096)),
        ("attn.out.bias", "BF16", (2880,)),
        ("mlp.norm.scale", "BF16", (2880,)),
        ("mlp.gate.weight", "BF16", (experts, 2880)),
        ("mlp.gate.bias", "BF16", (experts,)),
        ("mlp.mlp1_weight.blocks", "U8", (experts, 5760, 90, 16)),
        ("mlp.mlp1_weight.scales", "U8", (experts, 5760, 90)),
        ("mlp.mlp1_bias", "BF16", (experts, 5760)),
        ("mlp.mlp2_weight.blocks", "U8", (experts, 2880, 90, 16)),
        ("mlp.mlp2_weight.scales", "U8", (experts, 2880, 90)),
        ("mlp.mlp2_bias", "BF16", (experts, 2880)),
    ]
    return specs + [(f"block.{n}.{name}", dtype, shape) for n in range(layers) for name, dtype, shape in block]


def shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors by name, a new file whenever one would exceed the limit in bytes."""
    result: list[list[TensorSpec]] = [[]]
    total = 0
    for spec in sorted(specs):
        nbytes = int(np.prod(spec[2])) * DTYPES[spec[1]]
        if total + nbytes > limit:
            result.append([])
            total = 0
        result[-1].append(spec)
        total += nbytes
    return result


@pytest.mark.parametrize(
    ("repository", "layers", "experts", "limit", "pattern"),
    [
        ("openai/gpt-oss-20b", 24, 32, 1 << 60, "original/model.safetensors"),
        ("openai/gpt-oss-120b", 36, 128, 10 << 30, "original/model--{:05d}-of-00007.safetensors"),
    ],
)
def test_the_headers_of_the_official_files_are_rebuilt_to_the_byte(
    repository: str, layers: int, experts: int, limit: int, pattern: str
) -> None:
    digests = json.loads((files("gptoss_convert") / "data" / "official-digests.json").read_text())
    parts = shards(original_layout(layers, experts), limit)
    assert sum(map(len, parts)) == 15 * layers + 3
    for number, specs in enumerate(parts, 1):
        known = digests["repos"][repository]["files"][pattern.format(number)]
        header, entries = build_header(release_order(specs))
        last = list(entries.values())[-1]
        assert len(header) - 8 == known["header_bytes"]
        assert hashlib.sha256(header[8:]).hexdigest() == known["header_sha256"]
        assert last.offset + last.nbytes == known["size"]


def test_the_official_20b_header_is_the_known_one_and_reads_back(tmp_path: Path) -> None:
    header, entries = build_header(release_order(original_layout(24, 32)))
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    with path.open("r+b") as handle:
        handle.truncate(13_761_300_984)  # sparse
    found = read(path)
    assert found.header_bytes == 36208
    assert found.header_sha256 == "2aca116288fb3e8e4b2dcf28fd50d079806e4a8e4cb179fe32f545300c4a991b"
    assert found.size == 13_761_300_984
    assert list(found.entries.items()) == list(entries.items())


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"clé": 'quote " tab \t é \u007f \u0001'}])
def test_a_built_file_equals_the_one_that_the_library_writes(metadata: dict[str, str] | None) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layer.10": np.arange(4, dtype=np.float16),
        "layer.2": np.arange(5, dtype=np.float16),
        "é": np.arange(3, dtype=np.uint8),
        "scalar": np.array(1.5, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.uint8),
    }
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "float64": "F64"}
    specs = release_order((name, names[str(a.dtype)], a.shape) for name, a in arrays.items())
    header, _ = build_header(specs, metadata)
    assert header + b"".join(arrays[name].tobytes() for name, _, _ in specs) == save_numpy(arrays, metadata)


def test_several_metadata_keys_are_sorted_so_that_a_file_is_reproducible(write: Write) -> None:
    one, _ = build_header([], {"b": "2", "a": "1"})
    two, _ = build_header([], {"a": "1", "b": "2"})
    assert one == two
    assert read(write(one)).metadata == {"a": "1", "b": "2"}


def test_a_file_written_by_the_library_reads_the_same_here(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "f32": torch.arange(3, dtype=torch.float32),
        "u8": torch.arange(7, dtype=torch.uint8),
        "i64": torch.tensor(5),
        "bool": torch.tensor([True, False]),
        "f8": torch.zeros(5, dtype=torch.float8_e5m2),
    }
    path = tmp_path / "model.safetensors"
    save_torch(tensors, path, metadata={"format": "pt"})
    header = read(path)
    content = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.header_sha256 == hashlib.sha256(content[8 : 8 + header.header_bytes]).hexdigest()
    assert header.size == len(content)
    assert set(header.entries) == set(tensors)
    assert [e.offset for e in header.entries.values()] == sorted(e.offset for e in header.entries.values())
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert entry.shape == tuple(tensor.shape)
        data = content[entry.offset : entry.offset + entry.nbytes]
        assert data == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_built_file_loads_in_the_library_with_every_dtype(write: Write) -> None:
    specs = release_order((f"of {dtype}", dtype, (2, 3)) for dtype in DTYPES)
    header, entries = build_header(specs, {"format": "pt"})
    path = write(header + bytes(sum(entry.nbytes for entry in entries.values())))
    with safe_open(path, "pt") as library:
        assert sorted(library.keys()) == sorted(entries)
        for name, dtype, shape in specs:
            assert library.get_slice(name).get_dtype() == dtype
            assert tuple(library.get_slice(name).get_shape()) == shape
    assert read(path).entries == entries


def test_two_empty_tensors_may_share_a_place(write: Write) -> None:
    header, entries = build_header([("a", "U8", (0,)), ("b", "U8", (3,)), ("c", "F32", (4, 0)), ("d", "U8", ())])
    assert read(write(header + bytes(4))).entries == entries


@pytest.mark.parametrize(
    "tensor",
    [
        ("a", "F4", (2,)),
        ("a", "float32", (2,)),
        ("", "U8", (2,)),
        ("a\0", "U8", (2,)),
        ("a", "U8", (-1,)),
        ("__metadata__", "U8", ()),
    ],
)
def test_a_tensor_that_the_format_does_not_have_is_not_built(tensor: TensorSpec) -> None:
    with pytest.raises(ValueError, match="tensor"):
        build_header([tensor])


def test_a_name_given_twice_is_not_built() -> None:
    with pytest.raises(ValueError, match="repeated"):
        build_header([("a", "U8", (1,)), ("a", "U8", (1,))])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-LFS pointer"),
        (b"<!doctype html><html>not found", "an HTML page"),
        (b"PK\x03\x04" + bytes(30), "a zip archive"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (b"GGUF\3\0\0\0" + bytes(16), "a GGUF file"),
        (bytes(1000), "zero bytes only"),
        (b"\xff" * 9, "a header length of 18446744073709551615 bytes"),
        ((100_000_001).to_bytes(8, "little") + b"{", "a header length of 100000001 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "then b'['"),
        ((4).to_bytes(8, "little") + b" {} ", "then b' '"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(write: Write, content: bytes, sentence: str) -> None:
    refusal(write(content), "not a safetensors file", sentence)


def test_the_remedy_for_a_pickle_is_never_to_open_it(write: Write) -> None:
    refusal(write(pickle.dumps([1])), "never read", "safetensors")


@pytest.mark.parametrize("size", [9, 20, 60])
def test_a_file_that_ends_in_its_header_is_called_truncated(write: Write, size: int) -> None:
    refusal(write(framed(json.dumps({"a": F32}).encode())[:size]), "ends inside its header", f"{size} bytes")


def test_a_file_that_ends_in_its_data_is_called_truncated_and_the_tensor_named(write: Write) -> None:
    content = framed(json.dumps({"a": F32, "b": LATE_F32}).encode(), data=16)
    refusal(write(content[:-1]), "truncated", "tensor:   b", f"{len(content)} bytes")
    refusal(write(content[:-9]), "truncated", "tensor:   a")


HOSTILE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "the same tensor twice": (b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), ("twice", "found:    a")),
    "the same field twice": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        ("twice", "dtype"),
    ),
    "bytes after the JSON": (json.dumps({"a": F32}).encode() + b"\0", ("closing brace",)),
    "a newline after the JSON": (json.dumps({"a": F32}).encode() + b"\n", ("closing brace",)),
    "not JSON": (b"{nonsense}", ("not valid JSON",)),
    "not UTF-8": (b'{"\xff":1}', ("not valid JSON",)),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"}", ("nested too deeply",)),
    "thousands of digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", ("not valid JSON",)),
    "millions of lists": (b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", ("too many parts",)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_text_is_refused(write: Write, case: str) -> None:
    text, mentions = HOSTILE[case]
    refusal(write(framed(text)), *mentions)


def changed(**fields: object) -> dict[str, Any]:
    return {"a": {**F32, **fields}}


TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no fields": ({"a": {}}, ("wrong fields",)),
    "an unknown field": (changed(extra=1), ("wrong fields", "extra")),
    "an entry that is a list": ({"a": [1]}, ("wrong fields", "list")),
    "an unknown dtype": (changed(dtype="F33"), ("not known", "F33")),
    "a dtype that is no text": (changed(dtype=["F32"]), ("not known",)),
    "a dtype of half bytes": (changed(dtype="F4"), ("smaller than a byte", "F4")),
    "a shape that is a number": (changed(shape=2), ("shape",)),
    "a negative size": (changed(shape=[-2]), ("shape", "-2")),
    "a size that is true": (changed(shape=[2, True]), ("shape", "True")),
    "a size with a fraction": (changed(shape=[2.0]), ("shape", "2.0")),
    "a size of 2^64": (changed(shape=[2**64 + 2]), ("shape",)),
    "a product that wraps around": (changed(shape=[2**62 + 1, 2]), ("impossibly large",)),
    "a zero that hides a huge size": (changed(shape=[2**62, 0], data_offsets=[0, 0]), ("impossibly large",)),
    "rank 9": (changed(shape=[2] + [1] * 8), ("shape", "at most 8")),
    "rank 100,000": (changed(shape=[1] * 100_000), ("shape", "at most 8")),
    "a shape shorter than the data": (changed(shape=[1]), ("not as long", "8 bytes", "expected: 4")),
    "one offset": (changed(data_offsets=[8]), ("data_offsets",)),
    "three offsets": (changed(data_offsets=[0, 8, 8]), ("data_offsets",)),
    "offsets in reverse": (changed(data_offsets=[8, 0]), ("data_offsets",)),
    "a negative offset": (changed(data_offsets=[-8, 0]), ("data_offsets",)),
    "a floating-point offset": (changed(data_offsets=[0, 8.0]), ("data_offsets",)),
    "a range far outside": (changed(shape=[2**60], data_offsets=[0, 2**62]), ("truncated",)),
    "a huge number for an offset": (changed(data_offsets=[0, 10**4000]), ("data_offsets",)),
    "a hole at the start": (changed(shape=[1], data_offsets=[4, 8]), ("leaves a hole",)),
    "a hole in the middle": (
        {"b": {**F32, "shape": [1], "data_offsets": [0, 4]}, "a": LATE_F32},
        ("leaves a hole", "(b)"),
    ),
    "an overlap": ({"b": F32, "a": {**F32, "data_offsets": [4, 12]}}, ("overlaps", "(b)")),
    "the same range twice": ({"a": F32, "b": F32}, ("overlaps", "(a)", "tensor:   b")),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_hostile_entry_is_refused_and_the_tensor_named(write: Write, case: str) -> None:
    table, mentions = TABLES[case]
    refusal(
        write(framed(json.dumps(table).encode())), *mentions, *(() if "tensor:   b" in mentions else ("tensor:   a",))
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "0 characters"),
        ("a\0b", r"a\x00b"),
        ("a\u202eb", r"a\u202eb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (" a", "surrounding spaces"),
        ("a" * 513, "513 characters"),
    ],
)
def test_a_deceptive_name_is_refused_and_shown_escaped(write: Write, name: str, shown: str) -> None:
    message = refusal(write(framed(json.dumps({name: F32}).encode())), "name is not acceptable", shown)
    assert all(c.isprintable() or c == "\n" for c in message)


@pytest.mark.parametrize("metadata", ['"text"', "null", "[]", '{"a":1}', '{"a":null}', '{"a":{}}'])
def test_metadata_must_be_text_by_text(write: Write, metadata: str) -> None:
    refusal(write(framed(b'{"__metadata__":%s}' % metadata.encode(), 0)), "__metadata__")


@pytest.mark.parametrize(
    "table", [{"a\ud800": F32}, {"__metadata__": {"a": "\ud800"}}, {"__metadata__": {"\ud800": ""}}]
)
def test_half_a_surrogate_pair_is_refused_and_shown_escaped(write: Write, table: dict[str, object]) -> None:
    refusal(write(framed(json.dumps(table).encode())), "not Unicode text", r"\ud800")


def test_bytes_after_the_last_tensor_are_refused(write: Write) -> None:
    refusal(write(framed(json.dumps({"a": F32}).encode(), 9)), "follow the last tensor", "1 bytes")


def test_too_many_tensors_are_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_convert.formats.safetensors.MAX_TENSORS", 3)
    header, _ = build_header([(str(n), "U8", ()) for n in range(4)])
    refusal(write(header + bytes(4)), "too many tensors", "found:    4")


def test_the_120b_model_stored_expert_by_expert_is_within_the_bounds(write: Write) -> None:
    specs = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{part}", "U8", (1,))
        for layer in range(36)
        for expert in range(128)
        for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias", "up_proj.bias", "x")
    ]
    header, entries = build_header(specs)
    assert len(read(write(header + bytes(len(specs)))).entries) == len(entries) == 36 * 128 * 6


VALID = save_numpy({"a.weight": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint8)}, {"format": "pt"})


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(write: Write, data: st.DataObject) -> None:
    content = bytearray(VALID)
    edits = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    for position, byte in data.draw(edits):
        content[position] = byte
    path = write(
        bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content)
    )
    try:
        header = read(path)
    except BadInput:
        refusal(path)
    else:
        assert sum(entry.nbytes for entry in header.entries.values()) == header.size - 8 - header.header_bytes
        with safe_open(path, "np") as library:
            assert set(library.keys()) == set(header.entries)

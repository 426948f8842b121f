"""ONNX files: what is written is what the onnx package reads, what it writes is read; and nothing outside a file is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.onnx import (
    E8M0,
    FLOAT,
    INT64,
    UINT8,
    Model,
    Node,
    Port,
    Tensor,
    model_bytes,
    read_header,
    require_ranges,
)
from gptoss_convert.formats.protobuf import field, fields, message, varint

MODEL = Model(
    nodes=[
        Node(
            "QMoE",
            "/moe",
            ["x", "", "w"],
            ["y"],
            {"k": 4, "alpha": 1.702, "type": "swiglu", "axis": -1},
            "com.microsoft",
        ),
        Node("Add", "/add", ["y", "c"], ["z"], {}),
    ],
    tensors=[
        Tensor("w", UINT8, (2, 3, 4), 4096),
        Tensor("s", E8M0, (2, 3), 8192),
        Tensor("c", INT64, (1,), raw=struct.pack("<q", -1)),
    ],
    inputs=[Port("x", FLOAT, ("batch", 7))],
    outputs=[Port("z", FLOAT, ("batch", 7))],
    producer="tests",
    version="1",
    metadata={"key": "värde"},
)


def written(folder: Path, data: bytes) -> SourceFile:
    (folder / "model.onnx").write_bytes(data)
    return SourceFile(folder / "model.onnx")


def test_the_onnx_package_reads_every_field_that_is_written() -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    found = onnx.ModelProto.FromString(model_bytes(MODEL, "model.onnx.data"))
    assert (found.ir_version, found.producer_name, found.producer_version) == (10, "tests", "1")
    assert [(o.domain, o.version) for o in found.opset_import] == [("", 22), ("com.microsoft", 1)]
    assert {entry.key: entry.value for entry in found.metadata_props} == {"key": "värde"}
    first, second = found.graph.node
    assert (first.op_type, first.domain, list(first.input), list(first.output)) == (
        "QMoE", "com.microsoft", ["x", "", "w"], ["y"],
    )  # fmt: skip
    values = {a.name: onnx.helper.get_attribute_value(a) for a in first.attribute}
    assert values == {"k": 4, "alpha": pytest.approx(1.702), "type": b"swiglu", "axis": -1}
    assert (second.op_type, second.domain, len(second.attribute)) == ("Add", "", 0)
    for tensor, mine in zip(found.graph.initializer, MODEL.tensors, strict=True):
        assert (tensor.name, tensor.data_type, tuple(tensor.dims)) == (mine.name, mine.kind, mine.shape)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if mine.raw is None:
            assert place == {"location": "model.onnx.data", "offset": str(mine.offset), "length": str(mine.nbytes)}
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
        else:
            assert tensor.raw_data == mine.raw
    (port,) = found.graph.input
    assert [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim] == ["batch", 7]
    assert port.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_serialising_again_by_the_onnx_package_changes_nothing() -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    data = model_bytes(MODEL, "model.onnx.data")
    assert onnx.ModelProto.FromString(data).SerializeToString(deterministic=True) == data


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with written(tmp_path, model_bytes(MODEL, "model.onnx.data")) as file:
        header = read_header(file)
    assert list(header.tensors.values()) == MODEL.tensors
    assert header.metadata == MODEL.metadata
    assert (header.producer, header.version, header.data_files) == ("tests", "1", {"model.onnx.data"})


def test_a_range_beyond_the_data_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8192 + 5))
    with (
        written(tmp_path, model_bytes(MODEL, "data")) as file,
        SourceFile(tmp_path / "data") as data,
        pytest.raises(BadInput, match="beyond the data file"),
    ):
        require_ranges(read_header(file), file, data)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8192 + 7))
    with (
        written(tmp_path, model_bytes(MODEL, "data")) as file,
        SourceFile(tmp_path / "data") as data,
        pytest.raises(BadInput, match="after its last tensor") as caught,
    ):
        require_ranges(read_header(file), file, data)
    assert (caught.value.found, caught.value.expected) == ("8199 bytes", "8198 bytes")


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (message((1, 4), (2, 99), (8, "t"), (9, b"1234")), "form that is not read"),
        (message((1, 1 << 60), (2, UINT8), (8, "t")), "form that is not read"),
        (message((1, 4), (2, UINT8), (8, "t"), (9, b"123")), "does not fit its shape"),
        (message((1, 4), (2, UINT8), (8, "t"), (13, message((1, "offset"), (2, "-1")))), "not a number"),
        (message((1, 4), (2, UINT8), (8, b"\xff\xfe"), (9, b"1234")), "not UTF-8"),
    ],
)
def test_hostile_tensors_are_refused(tmp_path: Path, tensor: bytes, what: str) -> None:
    with written(tmp_path, message((7, message((5, tensor))))) as file, pytest.raises(BadInput, match=what):
        read_header(file)


def test_a_graph_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with SourceFile(tmp_path / "model.onnx") as file, pytest.raises(BadInput, match="too large to be one"):
        read_header(file)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    tensor = message((1, 1), (2, UINT8), (8, "t"), (9, b"1"))
    with (
        written(tmp_path, message((7, message((5, tensor), (5, tensor))))) as file,
        pytest.raises(BadInput, match="twice"),
    ):
        read_header(file)


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_an_integer_survives_the_wire(number: int) -> None:
    ((key, value),) = fields(memoryview(field(5, number)), "x")
    assert (key, value) == (5, number & ((1 << 64) - 1))


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        for _ in fields(memoryview(data), "x"):
            pass
    except BadInput:
        pass


@pytest.mark.parametrize("data", [b"\x80", b"\x0a\x05abc", varint(1 << 3 | 3), b"\xff" * 11, b"\x0d\x00"])
def test_a_message_that_does_not_end_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="not a protocol buffer"):
        list(fields(memoryview(data), "x"))

"""ONNX files: a small graph (`model.onnx`, protocol buffers) whose tensors all lie in one data file beside it.

Written are the messages of onnx.proto that such a graph needs; a tensor is its name, type, dimensions and the range of the
data file. Read are a model's metadata and its tensors, every range checked against the data file's size. Offsets are
multiples of ALIGNMENT, as the specification recommends for mapping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptoss_convert.errors import BadInput, printable
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.protobuf import Value, fields, message

ALIGNMENT = 4096
MAX_MODEL_BYTES = 64 << 20  # a graph of a hundred layers takes half a megabyte
IR_VERSION, OPSET = 10, 22
MICROSOFT = "com.microsoft"
# Element types by number, with the bytes of one element.
FLOAT, UINT8, INT32, INT64, E8M0 = 1, 2, 6, 7, 24
WIDTH = {FLOAT: 4, UINT8: 1, INT32: 4, INT64: 8, E8M0: 1}
TYPE_NAMES = {FLOAT: "FLOAT", UINT8: "UINT8", INT32: "INT32", INT64: "INT64", E8M0: "FLOAT8E8M0"}

Dims = tuple[int | str, ...]
Attribute = int | float | str


@dataclass(frozen=True)
class Tensor:
    """An initializer: where it lies in the data file, or its bytes where it is kept in the graph."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int = 0
    raw: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * WIDTH[self.kind]


@dataclass(frozen=True)
class Node:
    """An operator. Absent optional inputs and outputs are empty names."""

    op: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute]
    domain: str = ""


@dataclass(frozen=True)
class Port:
    """An input or an output of the graph; dimensions are numbers or names."""

    name: str
    kind: int
    shape: Dims


@dataclass(frozen=True)
class Model:
    """A whole graph."""

    nodes: Sequence[Node]
    tensors: Sequence[Tensor]
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    producer: str
    version: str
    metadata: Mapping[str, str]


# --- writing -----------------------------------------------------------------------------------------------------------


def model_bytes(model: Model, data_file: str) -> bytes:
    """`model.onnx`. data_file: the name of the file beside it."""
    graph: list[tuple[int, Value]] = [(1, _node(node)) for node in model.nodes]
    graph.append((2, "main_graph"))
    graph += [(5, _tensor(tensor, data_file)) for tensor in model.tensors]
    graph += [(11, _port(port)) for port in model.inputs]
    graph += [(12, _port(port)) for port in model.outputs]
    return message(
        (1, IR_VERSION), (2, model.producer), (3, model.version), (7, message(*graph)),
        (8, message((1, ""), (2, OPSET))), (8, message((1, MICROSOFT), (2, 1))),
        *((14, message((1, key), (2, value))) for key, value in model.metadata.items()),
    )  # fmt: skip


def _node(node: Node) -> bytes:
    parts: list[tuple[int, Value]] = [(1, name) for name in node.inputs]
    parts += [(2, name) for name in node.outputs]
    parts += [(3, node.name), (4, node.op)]
    parts += [(5, _attribute(name, value)) for name, value in node.attributes.items()]
    return message(*parts, *([(7, node.domain)] if node.domain else []))


def _attribute(name: str, value: Attribute) -> bytes:
    number, kind = {float: (2, 1), int: (3, 2), str: (4, 3)}[type(value)]
    return message((1, name), (number, value), (20, kind))


def _tensor(tensor: Tensor, data_file: str) -> bytes:
    parts: list[tuple[int, Value]] = [(1, size) for size in tensor.shape]
    parts += [(2, tensor.kind), (8, tensor.name)]
    if tensor.raw is not None:
        return message(*parts, (9, tensor.raw))
    place = (("location", data_file), ("offset", str(tensor.offset)), ("length", str(tensor.nbytes)))
    return message(*parts, *((13, message((1, key), (2, value))) for key, value in place), (14, 1))


def _port(port: Port) -> bytes:
    sizes = [(1, message((2, size) if isinstance(size, str) else (1, size))) for size in port.shape]
    return message((1, port.name), (2, message((1, message((1, port.kind), (2, message(*sizes)))))))


# --- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What is read of a model: who wrote it, its metadata, and its tensors by name."""

    producer: str
    version: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    data_files: frozenset[str]


def read_header(file: SourceFile) -> Header:
    """The header of an untrusted `model.onnx`; ranges are checked by `require_ranges`."""
    if file.size > MAX_MODEL_BYTES:
        raise BadInput(
            "the graph is too large to be one", file=file.path, found=f"{file.size} bytes",
            expected=f"at most {MAX_MODEL_BYTES}: tensors lie in a data file",
        )  # fmt: skip
    texts: dict[int, str] = {}
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    places: set[str] = set()
    for number, value in fields(memoryview(file.read(0, file.size)), file.path):
        if isinstance(value, int):
            continue
        if number in (2, 3):
            texts[number] = _text(value, file)
        elif number == 14:
            key, entry = _entry(value, file)
            metadata[key] = entry
        elif number == 7:
            for inner, part in fields(value, file.path):
                if inner == 5 and not isinstance(part, int):
                    tensor, place = _read_tensor(part, file)
                    if tensor.name in tensors:
                        raise BadInput("a tensor appears twice in the graph", file=file.path, tensor=tensor.name)
                    tensors[tensor.name] = tensor
                    places |= {place} if place else set()
    return Header(texts.get(2, ""), texts.get(3, ""), metadata, tensors, frozenset(places))


def require_ranges(header: Header, model: SourceFile, data: SourceFile) -> None:
    """Every tensor must lie inside the data file, with as many bytes as its shape has; the file ends with the last one."""
    for tensor in header.tensors.values():
        if tensor.raw is None and not 0 <= tensor.offset <= data.size - tensor.nbytes:
            raise BadInput(
                "a tensor lies beyond the data file", file=model.path, tensor=tensor.name,
                found=f"{tensor.nbytes} bytes at {tensor.offset}", expected=f"within {data.size} bytes",
                remedy="the download or the copy is not complete",
            )  # fmt: skip
    end = max((t.offset + t.nbytes for t in header.tensors.values() if t.raw is None), default=0)
    if data.size != end:
        raise BadInput(
            "the data file goes on after its last tensor", file=data.path, found=f"{data.size} bytes",
            expected=f"{end} bytes", remedy="it is of another model, or was changed; fetch it again",
        )  # fmt: skip


def _read_tensor(data: memoryview, file: SourceFile) -> tuple[Tensor, str]:
    shape: list[int] = []
    kind, name, raw, place = 0, "", None, {}
    for number, value in fields(data, file.path):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and not isinstance(value, int):
            name = _text(value, file)
        elif number == 9 and not isinstance(value, int):
            raw = bytes(value)
        elif number == 13 and not isinstance(value, int):
            key, entry = _entry(value, file)
            place[key] = entry
    if kind not in WIDTH or len(shape) > 4 or math.prod(shape) > 1 << 40:
        raise BadInput(
            "a tensor of a form that is not read", file=file.path, tensor=name, found=f"type {kind}, shape {shape[:6]}",
            expected=", ".join(TYPE_NAMES.values()),
        )  # fmt: skip
    numbers = [place.get(key, "0") for key in ("offset", "length")]
    if not all(re.fullmatch(r"\d{1,18}", number) for number in numbers):
        raise BadInput("a tensor's place is not a number", file=file.path, tensor=name, found=numbers)
    tensor = Tensor(name, kind, tuple(shape), int(numbers[0]), raw)
    length = len(raw) if raw is not None else int(numbers[1])
    if length != tensor.nbytes:
        raise BadInput(
            "a tensor's length does not fit its shape",
            file=file.path,
            tensor=name,
            found=length,
            expected=tensor.nbytes,
        )
    return tensor, place.get("location", "")


def _entry(data: memoryview, file: SourceFile) -> tuple[str, str]:
    parts = {number: _text(value, file) for number, value in fields(data, file.path) if not isinstance(value, int)}
    return parts.get(1, ""), parts.get(2, "")


def _text(data: memoryview, file: SourceFile) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise BadInput("text in the graph is not UTF-8", file=file.path, found=printable(str(error))) from error

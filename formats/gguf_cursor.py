"""Reading the beginning of a GGUF file piece by piece: numbers, names, strings and metadata values, all bounded."""

from __future__ import annotations

import struct
from typing import Any

from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf_types import SCALAR_CODES, Value, ValueType, refusal

# A gpt-oss tokenizer takes 13 MB and 850,000 elements; the bounds leave room for a vocabulary four times as large and
# keep what a hostile header can ask for below a gigabyte of memory.
MAX_HEADER_BYTES = 128 << 20
MAX_ELEMENTS = 4 << 20
_U64 = struct.Struct("<Q")


class Cursor:
    """Reads a file from its start in growing steps; every length is checked before anything is allocated for it."""

    def __init__(self, file: SourceFile) -> None:
        self.path = file.path
        self.at = 0
        self.limit = min(file.size, MAX_HEADER_BYTES)
        self.elements_left = MAX_ELEMENTS
        self.buffer = bytearray()
        self._file = file

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` bytes, which are in the buffer afterwards; the position where they begin."""
        start, end = self.at, self.at + nbytes
        if end > self.limit:
            whole = self.limit == self._file.size
            problem = f"the file ends inside {what}" if whole else f"the header is too large: it does not end in {what}"
            raise refusal(problem, self.path, f"{nbytes} bytes from byte {start}", f"at most {self.limit} bytes in all")
        if end > len(self.buffer):
            target = min(self.limit, max(end, 2 * len(self.buffer), 1 << 16))
            self.buffer += self._file.read(len(self.buffer), target - len(self.buffer))
        self.at = end
        return start

    def u32(self, what: str) -> int:
        """The next 32-bit number."""
        start = self.take(4, what)
        return int.from_bytes(self.buffer[start : self.at], "little")

    def u64(self, what: str) -> int:
        """The next 64-bit number."""
        start = self.take(8, what)
        return int.from_bytes(self.buffer[start : self.at], "little")

    def check_count(self, count: int, least: int, limit: int, what: str) -> None:
        """A count of things of at least `least` bytes each, which must fit into what is left and into the limit."""
        most = min(limit, (self.limit - self.at) // least)
        if count > most:
            raise refusal(f"more {what} than the file can hold", self.path, count, f"at most {most}")

    def name(self, limit: int, what: str) -> str:
        """A key or a tensor's name: printable UTF-8 of 1 to `limit` bytes."""
        length = self.u64(what)
        if not 1 <= length <= limit:
            raise refusal(f"{what} has a bad length", self.path, length, f"1 to {limit} bytes")
        start = self.take(length, what)
        name = self.buffer[start : self.at].decode("utf-8", "surrogateescape")
        if not name.isprintable() or name != name.strip():
            raise refusal(
                f"{what} is not printable text", self.path, name, "printable UTF-8 without surrounding spaces"
            )
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. Written for speed: a tokenizer has 650,000 of them."""
        buffer, at, unpack = self.buffer, self.at, _U64.unpack_from
        result = []
        for _ in range(count):
            if at + 8 > len(buffer):
                self.at = at
                self.take(8, what)
            end = at + 8 + unpack(buffer, at)[0]
            if end > len(buffer):
                self.at = at
                self.take(end - at, what)
            result.append(buffer[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        self.at = at
        return result

    def value(self, what: str) -> Value:
        """The value of a key; `what` names the key in errors."""
        kind = self._value_type(what)
        if kind is ValueType.STRING:
            return Value(kind, self.strings(1, what)[0])
        if kind is not ValueType.ARRAY:
            return Value(kind, self._scalars(kind, 1, what)[0])
        element = self._value_type(what)
        if element is ValueType.ARRAY:
            raise refusal(f"{what} is an array of arrays", self.path, element.name, "an array of scalars or of strings")
        count = self.u64(what)
        width = 8 if element is ValueType.STRING else struct.calcsize("<" + SCALAR_CODES[element])
        self.check_count(count, width, self.elements_left, f"elements in {what}")
        self.elements_left -= count
        many = self.strings(count, what) if element is ValueType.STRING else self._scalars(element, count, what)
        return Value(kind, many, element)

    def _value_type(self, what: str) -> ValueType:
        number = self.u32(what)
        if number >= len(ValueType):
            raise refusal(f"{what} has a type that is not known", self.path, number, "0 to 12")
        return ValueType(number)

    def _scalars(self, kind: ValueType, count: int, what: str) -> list[Any]:
        """`count` scalars of one type."""
        code = f"<{count}{SCALAR_CODES[kind]}"
        values = list(struct.unpack_from(code, self.buffer, self.take(struct.calcsize(code), what)))
        if kind is not ValueType.BOOL:
            return values
        if max(values, default=0) > 1:
            raise refusal(f"{what} is neither true nor false", self.path, max(values), "0 or 1")
        return [value == 1 for value in values]

"""A GGUF model in several files: finding all parts from any one of them, and checking that they belong together.

The parts are called `<stem>-00001-of-00003.gguf`, counted from 1 in the name and from 0 in the metadata. Every part
holds `split.no` (u16, its number), `split.count` (u16, how many parts) and `split.tensors.count` (i32, tensors in all
parts); the first one holds all other metadata, and often no tensor.
"""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import GgufHeader, Value, ValueType, i32, read_header, u16

KEY_NO = "split.no"
KEY_COUNT = "split.count"
KEY_TENSORS = "split.tensors.count"
MAX_PARTS = 65535

_TYPES = {KEY_NO: ValueType.UINT16, KEY_COUNT: ValueType.UINT16, KEY_TENSORS: ValueType.INT32}
_NAME = re.compile(r"(?P<stem>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def split_name(stem: str, no: int, count: int) -> str:
    """The file name of part `no`, counted from 0, of `count`; ValueError if there is no such part."""
    if not stem or not 0 <= no < count <= MAX_PARTS:
        raise ValueError(f"part {no} of {count} of {stem!r} has no name")
    return f"{stem}-{no + 1:05d}-of-{count:05d}.gguf"


def split_metadata(no: int, count: int, tensors: int) -> list[tuple[str, Value]]:
    """What part `no`, counted from 0, must say of itself when `tensors` tensors are in all `count` parts."""
    return [(KEY_NO, u16(no)), (KEY_COUNT, u16(count)), (KEY_TENSORS, i32(tensors))]


def open_split(path: Path) -> list[Path]:
    """All parts of a model, in order, given any one of them; a file that is not a part is returned alone.

    Every header is read: BadInput names the file whose number, count or tensors do not agree with the others.
    """
    with SourceFile(path) as file:
        header = read_header(file)
    named = _NAME.fullmatch(path.name)
    count = _number(header, KEY_COUNT, path) if KEY_COUNT in header.metadata else 0
    if count <= 1 and (named is None or int(named["count"]) <= 1):
        return [path]
    if named is None or int(named["count"]) != count:
        raise BadInput(
            "the file's name and its metadata disagree on whether it is a part of a model",
            file=path,
            found=f"{KEY_COUNT} is {count or 'missing'}",
            expected="a name such as model-00001-of-00003.gguf, with the same number of parts",
            remedy="give the parts back the names that they were published under",
        )
    total = _number(header, KEY_TENSORS, path)
    parts = [path.with_name(split_name(named["stem"], no, count)) for no in range(count)]
    owner: dict[str, Path] = {}
    for no, part in enumerate(parts):
        for tensor in _part_tensors(part, no, count, total):
            if tensor in owner:
                found = f"in {owner[tensor].name} and in {part.name}"
                raise BadInput(
                    "a tensor is in two parts", file=part, tensor=tensor, found=found, expected="in one part"
                )
            owner[tensor] = part
    if len(owner) != total:
        raise BadInput(
            "the parts do not hold all tensors", file=path, found=len(owner), expected=f"{total} ({KEY_TENSORS})"
        )
    return parts


def _part_tensors(part: Path, no: int, count: int, total: int) -> list[str]:
    """The names of the tensors in one part, which must say that it is part `no` of `count` of `total` tensors."""
    if not part.exists():
        remedy = "download all parts into one folder"
        raise BadInput(f"part {no + 1} of {count} is missing", file=part, expected="the file", remedy=remedy)
    with SourceFile(part) as file:
        header = read_header(file)
    for key, expected in ((KEY_NO, no), (KEY_COUNT, count), (KEY_TENSORS, total)):
        if (found := _number(header, key, part)) != expected:
            remedy = "the file is renamed or belongs to another model; download the parts again"
            raise BadInput(f"the part's {key} is wrong", file=part, found=found, expected=expected, remedy=remedy)
    return list(header.tensors)


def _number(header: GgufHeader, key: str, path: Path) -> int:
    """One of the three numbers of a part."""
    value = header.metadata.get(key)
    if value is None or value.type is not _TYPES[key] or value.value < 0:
        found = "nothing" if value is None else f"{value.value!r} ({value.type.name})"
        raise BadInput(
            f"the part has no usable {key}", file=path, found=found, expected=f"a number ({_TYPES[key].name})"
        )
    return int(value.value)

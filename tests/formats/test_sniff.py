"""Files are named by their content, and a pickle is recognised without being opened."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert.formats.safetensors import build_header
from gptoss_convert.formats.sniff import EXECUTABLE, HEAD_BYTES, Kind, identify, sniff


class Command:
    """An object whose pickle calls a function when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.bin"), io.BytesIO())
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13761300984\n"

KNOWN = [
    (b"", Kind.EMPTY),
    (bytes(512), Kind.ZEROS),
    (LFS, Kind.LFS_POINTER),
    (b"<!DOCTYPE html><html><head>", Kind.HTML),
    (b"\xef\xbb\xbf\n <HTML lang='en'>", Kind.HTML),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", Kind.XML),
    (b'{"error": "Repository not found"}', Kind.JSON),
    (b"Invalid username or password.", Kind.TEXT),
    (zip_bytes(), Kind.ZIP),
    (gzip.compress(b"x"), Kind.GZIP),
    (b"\x28\xb5\x2f\xfd\0\0", Kind.ZSTD),
    (b"\xfd7zXZ\0\0", Kind.XZ),
    (tar_bytes(), Kind.TAR),
    (npy_bytes(), Kind.NUMPY),
    (b"\x89HDF\r\n\x1a\n", Kind.HDF5),
    (b"GGUF\x03\0\0\0", Kind.GGUF),
    (b"GPT-OSS v1.0\0\0\0\0", Kind.METAL),
    (build_header([("a", "F32", (2,))])[0], Kind.SAFETENSORS),
]


@pytest.mark.parametrize(("content", "kind"), KNOWN, ids=[f"{kind.name}-{i}" for i, (_, kind) in enumerate(KNOWN)])
def test_each_kind_of_file_is_told_from_its_first_bytes(content: bytes, kind: Kind) -> None:
    assert identify(content[:HEAD_BYTES]) is kind
    assert sniff(content[:HEAD_BYTES]) == kind.value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [{"w": 1}, [1, 2], OrderedDict(w=1), Command()], ids=lambda v: type(v).__name__)
def test_pickles_of_every_protocol_are_recognised(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert identify(data[:HEAD_BYTES]) is Kind.PICKLE
    assert Kind.PICKLE in EXECUTABLE


def test_the_old_format_of_torch_is_a_pickle() -> None:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    assert identify(magic) is Kind.PICKLE


@pytest.mark.parametrize("length", [0x0280, 0x8B1F, 0x7D0280, 0x04034B50])
def test_a_safetensors_header_whose_length_looks_like_another_kind_is_still_one(length: int) -> None:
    head = length.to_bytes(8, "little") + b'{"a":'
    assert identify(head) is Kind.SAFETENSORS


def test_text_that_the_end_of_the_head_cuts_inside_a_character_is_text() -> None:
    assert identify(("x" + "é" * 300).encode()[:HEAD_BYTES]) is Kind.TEXT


def test_an_ordinary_configuration_is_json() -> None:
    assert identify(json.dumps({"model_type": "gpt_oss"}).encode()) is Kind.JSON


@pytest.mark.parametrize("head", [b"\x01\x02\x03", b"\xff\xfe\xfd", b"text\x00with binary"])
def test_unknown_bytes_are_not_given_a_name(head: bytes) -> None:
    assert identify(head) is None
    assert sniff(head) is None


@given(st.binary(max_size=HEAD_BYTES))
def test_any_bytes_at_all_are_looked_at_without_an_error(head: bytes) -> None:
    assert sniff(head) is None or isinstance(sniff(head), str)

"""The safetensors container, written by hand: u64 header length, JSON header, data. And the two ways of sharding."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Lazy = Callable[[], torch.Tensor]
Entry = tuple[str, tuple[int, ...]]

SIZES = {"BF16": 2, "F32": 4, "U8": 1}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}


def size(entry: Entry) -> int:
    dtype, shape = entry
    total = SIZES[dtype]
    for width in shape:
        total *= width
    return total


def stored_order(entries: Mapping[str, Entry]) -> list[str]:
    """Order inside one file: wider elements first, then plain string order of the names."""
    return sorted(entries, key=lambda name: (-SIZES[entries[name][0]], name))


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The JSON header without its length, padded with spaces to a multiple of 8."""
    table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in stored_order(entries):
        end = offset + size(entries[name])
        table[name] = {"dtype": entries[name][0], "shape": list(entries[name][1]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write(
    path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file; each tensor is made when its turn comes."""
    head = header(entries, metadata)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)))
        file.write(head)
        for name in stored_order(entries):
            tensor = tensors[name]().contiguous()
            found = (NAMES[tensor.dtype], tuple(tensor.shape))
            if found != entries[name]:
                raise AssertionError(f"{name}: made as {found}, announced as {entries[name]}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def shards(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """Greedy fill in the given order: a new shard begins when the next tensor would exceed `limit`."""
    result: list[dict[str, Entry]] = [{}]
    total = 0
    for name, entry in entries.items():
        if result[-1] and total + size(entry) > limit:
            result.append({})
            total = 0
        result[-1][name] = entry
        total += size(entry)
    return result

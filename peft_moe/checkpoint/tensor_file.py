"""A safetensors file read tensor by tensor, or by rows of one, without mapping it into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_shapes

_CHUNK = 2**23  # bytes that a raw copy holds

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the header spells it, its shape, and its bytes in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype | None:
        """`None` for one that this version of torch does not have."""
        return DTYPES.get(self.code)


class TensorFile:
    """A safetensors file.

    Attributes: entries: key -> `Entry`, in the order in which their bytes lie. metadata: of the header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        read_shapes(str(path))  # safetensors' own checks: sizes, overlaps, holes
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = file.read(length)
        content: dict[str, Any] = json.loads(self.header)
        self.metadata: dict[str, str] = content.pop("__metadata__", {}) or {}
        data = 8 + length
        found = {
            key: Entry(one["dtype"], tuple(one["shape"]), *(data + offset for offset in one["data_offsets"]))
            for key, one in content.items()
        }
        self.entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[0])))

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """One tensor in memory of its own, or its rows `first` to `last` along the first axis."""
        entry = self.entries[key]
        if entry.dtype is None:
            raise ValueError(f"{self.path}: {key} is stored as {entry.code}, which this version of torch does not have")
        shape, start, stop = entry.shape, entry.start, entry.stop
        if shape and (first, last) != (0, None):
            size = entry.nbytes // shape[0] if shape[0] else 0
            last = shape[0] if last is None else min(last, shape[0])
            shape, start, stop = (last - first, *shape[1:]), start + first * size, start + last * size
        if stop == start:
            return torch.empty(shape, dtype=entry.dtype)
        buffer = bytearray(stop - start)
        view, done = memoryview(buffer), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.path}: {key} ends {len(buffer) - done} bytes early: the file was cut")
                done += count
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).view(shape)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor as they are, a few MiB at a time."""
        entry = self.entries[key]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                found = file.read(min(_CHUNK, left))
                if not found:
                    raise ValueError(f"{self.path}: {key} ends {left} bytes early: the file was cut")
                left -= len(found)
                yield found


def sync_directory(path: str | Path) -> None:
    """Make renames in a directory durable, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

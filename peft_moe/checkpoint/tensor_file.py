"""A safetensors file read tensor by tensor, or by rows of one, without mapping it into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .header import read_header

_CHUNK = 2**23  # bytes that a raw copy holds


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in order, `(n,)` uint8; a view where they lie so."""
    whole = tensor.contiguous()
    # Not `view(-1)`: of one element it keeps any stride, and then bytes cannot be seen.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


class TensorFile:
    """A safetensors file.

    Attributes: entries: key -> `header.Entry`, in the order in which their bytes lie. metadata: of the header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found, self.metadata = read_header(path)
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

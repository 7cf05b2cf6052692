"""The header of a safetensors file, checked before anything is allocated.

A file is 8 bytes of length, that many bytes of JSON (name -> dtype, shape, byte range), and the tensors. What the
header says is believed only where it agrees with itself and with the size of the file: every tensor has the bytes that
its shape and dtype need, and the tensors lie one after the other without a gap from the end of the header to the end
of the file.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from .json_input import parse_object

MAX_HEADER = 100_000_000  # bytes; safetensors refuses longer ones too
MAX_NAME = 1000
MAX_DIMENSIONS = 16
_LARGEST = 2**63 - 1

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as the header spells it, its shape, and where its bytes start and stop in the file."""

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


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file and its metadata.

    Raises `ValueError` naming the file, the tensor and what is wrong with it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER or length > size - 8:
            raise _bad(path, f"its header is said to have {length} bytes, the file has {size}")
        raw = file.read(length)
    if len(raw) != length:
        raise _bad(path, "its header ends early")
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise _bad(path, "its metadata is not text")
    found = {name: _extent(path, name, one, 8 + length) for name, one in content.items()}
    end = 8 + length
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if one.start != end:
            raise _bad(path, f"{name} starts at byte {one.start} where the one before it ends at {end}")
        end = one.stop
    if end != size:
        raise _bad(path, f"its tensors end at byte {end}, the file has {size}")
    return found, metadata


def _parse(path: Any, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _bad(path, "its header does not start with a brace")
    try:
        return parse_object(raw)
    except ValueError as error:
        raise _bad(path, f"its header: {error}") from error


def _extent(path: Any, name: str, said: Any, data: int) -> Entry:
    """Args: data: where in the file the tensors begin."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _bad(path, f"a tensor has the name {name[:80]!r}")
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{name} is not described by dtype, shape and data_offsets")
    code, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise _bad(path, f"{name} has the dtype {str(code)[:40]!r}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _bad(path, f"{name} has the shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"{name} has the byte range {str(offsets)[:80]}")
    if math.prod(max(one, 1) for one in shape) * BITS[code] > _LARGEST:  # also where another axis is empty: strides
        raise _bad(path, f"{name} has the shape {str(shape)[:80]}")
    needed = math.prod(shape) * BITS[code]
    if needed % 8 or needed // 8 != offsets[1] - offsets[0]:
        raise _bad(path, f"{name} needs {needed // 8} bytes as {code} {tuple(shape)}, found {offsets[1] - offsets[0]}")
    return Entry(code, tuple(shape), data + offsets[0], data + offsets[1])


def _counts(values: Any) -> bool:
    """Whether this is a list of integers from 0 on."""
    return isinstance(values, list) and all(type(one) is int and 0 <= one <= _LARGEST for one in values)


def _bad(path: Any, problem: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({problem}): it is truncated or corrupted. Fetch or save it again. Nothing was loaded."
    )

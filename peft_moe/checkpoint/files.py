"""Reading adapter files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from .header import Entry, read_header

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a safetensors file, from its header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """
    return {key: one.shape for key, one in read_header(path)[0].items()}


def check_adapter_tensors(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Raise `ValueError` for a tensor that no adapter has: one without elements, or not of floating values."""
    for key, one in entries.items():
        if not one.nbytes or one.code not in _FLOATING:
            raise ValueError(f"{path}: {key} is {one.code} {one.shape}, expected a tensor of floating values")

"""Reading adapter files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from .header import Entry, read_header

_MAX_NAME = 250  # of a tensor of an adapter: patterns of its config are matched against it
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a safetensors file, from its header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """
    return {key: one.shape for key, one in read_header(path)[0].items()}


def check_adapter_tensors(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Raise `ValueError` for a tensor that no adapter has: one without elements, not of floating values, or whose name
    is endless.
    """
    for key, one in entries.items():
        if len(key) > _MAX_NAME:
            raise ValueError(f"{path}: {key[:80]}… has a name of {len(key)} characters, expected at most {_MAX_NAME}")
        if not one.nbytes or one.code not in _FLOATING:
            raise ValueError(f"{path}: {key} is {one.code} {one.shape}, expected a tensor of floating values")

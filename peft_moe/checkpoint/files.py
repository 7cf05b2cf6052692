"""Reading adapter files."""

from __future__ import annotations

from .header import read_header


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a safetensors file, from its header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """
    return {key: one.shape for key, one in read_header(path)[0].items()}

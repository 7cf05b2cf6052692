"""Reading adapter files."""

from __future__ import annotations

from safetensors import SafetensorError, safe_open


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a safetensors file, from its header.

    Raises `ValueError` if the file is truncated or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is truncated or corrupted. Fetch or save the adapter again. Nothing "
            "was loaded."
        ) from error

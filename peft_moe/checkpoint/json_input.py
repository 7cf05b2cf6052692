"""JSON from files that may come from strangers: an object, of a bounded size, or a `ValueError`."""

from __future__ import annotations

import json
import os
import re
from typing import Any

MAX_DEPTH = 50
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_BYTES = 64 * 2**20  # of a config or an index; the largest index of a known model has about 10 MiB


def read_object(path: str | os.PathLike[str], constants: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args: constants: let NaN and Infinity pass, which Python writes and configs of some models contain.

    Raises `ValueError` naming the file, for one that is too large, too deep, no JSON or no object.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes of JSON: it is not read")
    try:
        return parse_object(raw, constants)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Fetch or save it again.") from error


def parse_object(raw: bytes, constants: bool = False) -> dict[str, Any]:
    """The object that some bytes stand for. Raises `ValueError`; names that stand there twice are refused too."""
    options: dict[str, Any] = {} if constants else {"parse_constant": _refuse}
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is not an object in braces but a {type(found).__name__}")
    _check_depth(found)
    if _SURROGATE.search(raw):  # half of one is no text, and would fail where it is written
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text in it is none ({error.reason})") from error
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            one
            for outer in level
            for one in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(one, (dict, list))
        ]
    if level:
        raise ValueError("it is nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")

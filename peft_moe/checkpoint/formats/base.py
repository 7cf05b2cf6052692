"""The base model of an adapter without its weights, where a format depends on the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ...compat import cached_file
from ..merge.skeleton import skeletons

T = TypeVar("T")


class Base:
    """Config and classes of a model; its weights are not needed.

    Attributes: name: as it was given. folder: with its `config.json`.
    """

    def __init__(self, name: str, folder: Path, trust_remote_code: bool) -> None:
        self.name, self.folder = name, folder
        self._models = skeletons(folder, trust_remote_code)
        self._made: list[Any] = []

    def first(self, fits: Callable[[Any], T]) -> tuple[Any, T]:
        """The first of the classes that the model may be loaded as for which `fits` raises no `ValueError`.

        Returns: the model on the meta device, and what `fits` made of it. Raises the error of the first.
        """
        problem: ValueError | None = None
        for model in self._all():
            try:
                return model, fits(model)
            except ValueError as error:
                problem = problem or error
        assert problem is not None  # there is one model at least
        raise problem

    def _all(self) -> Any:
        yield from self._made
        for model in self._models:
            self._made.append(model)
            yield model


def find_base(name: str | None, trust_remote_code: bool) -> Base | None:
    """The base of this name: a folder with a `config.json`, or a model in the hub's local cache; `None`: not here."""
    if not name:
        return None
    folder = Path(name)
    if not (folder / "config.json").is_file():
        try:
            found = cached_file(name, "config.json", local_files_only=True)
        except (OSError, ValueError):
            found = None
        if found is None:
            return None
        folder = Path(found).parent
    return Base(name, folder, trust_remote_code)


def base_of(given: str | Path | None, stated: str | None, trust_remote_code: bool) -> Base | None:
    """The base that was given, else the one that the adapter states, if that is here.

    Raises `ValueError` if one was given and is not there, and for `trust_remote_code` where none was given.
    """
    if given is None:
        if trust_remote_code:
            raise ValueError(
                "`trust_remote_code=True` runs code of a base, and no adapter chooses which: name the base with "
                f"`base=` (`--base`). The config of this adapter states {stated!r}."
            )
        return find_base(stated, False)
    found = find_base(str(given), trust_remote_code)
    if found is None:
        raise ValueError(f"base={str(given)!r}: no config.json in a folder of this name, nor in the hub's cache")
    return found


def missing_base(adapter: str, stated: str | None, reason: str) -> ValueError:
    """The error where a base is needed and is not here."""
    return ValueError(
        f"adapter {adapter!r}: {reason}. Its config states the base {stated!r}, which is neither a folder with a "
        "config.json nor in the hub's local cache: name one that is with `base=` (`--base`); weights are not needed."
    )

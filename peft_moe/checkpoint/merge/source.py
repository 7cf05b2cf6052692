"""The base checkpoint: its folder, its shards, and every tensor in them by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...compat import cached_file
from ..header import Entry
from ..scales import checkpoint_files
from ..tensor_file import TensorFile


class Source:
    """The safetensors files of a folder, or of a model in the hub's local cache.

    Attributes: folder: where they lie. shards: file name -> `TensorFile`. owner: key -> file name.

    Raises `ValueError` if there are none, a file is damaged, two hold the same key, or a name leads out of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        files = [Path(one) for one in checkpoint_files(str(path))]
        self.folder = Path(path) if Path(path).is_dir() else files[0].parent
        self.shards: dict[str, TensorFile] = {}
        self.owner: dict[str, str] = {}
        for file in files:
            if file.parent != self.folder:
                raise ValueError(f"{path}: its index names {file}, which does not lie in {self.folder}")
            self.shards[file.name] = TensorFile(file)
            for key in self.shards[file.name].entries:
                if key in self.owner:
                    raise ValueError(f"{path}: {key} is in {self.owner[key]} and in {file.name}")
                self.owner[key] = file.name
        config = self.folder / "config.json"
        if not config.is_file():
            raise ValueError(f"{self.folder}: no config.json beside the weights; expected a checkpoint of transformers")
        self.config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))

    def __contains__(self, key: str) -> bool:
        return key in self.owner

    def entry(self, key: str) -> Entry:
        """What the header says of a tensor."""
        return self.shards[self.owner[key]].entries[key]

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """See `TensorFile.read`."""
        return self.shards[self.owner[key]].read(key, first, last)

    @property
    def index_name(self) -> str | None:
        """The name of the index, if there is one."""
        name = "model.safetensors.index.json"
        return name if (self.folder / name).is_file() else None


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter: a local one, or that of an adapter in the hub's local cache.

    Raises `ValueError` if it is not there, or not in safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            found = cached_file(str(path), "adapter_config.json", local_files_only=True)
        except (OSError, ValueError):
            found = None
        if found is None:
            raise ValueError(f"{path}: no adapter found: neither a folder of this name nor one in the hub's cache")
        folder = Path(found).parent
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; expected an adapter that PEFT saved in safetensors")
    return folder

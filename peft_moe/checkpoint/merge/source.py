"""The base checkpoint: its folder, its shards, and every tensor in them by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...compat import cached_file
from ..header import Entry
from ..json_input import read_object
from ..scales import checkpoint_files
from ..tensor_file import TensorFile


class Source:
    """The safetensors files of a folder, or of a model in the hub's local cache.

    Attributes: folder: where they lie. shards: file name -> `TensorFile`. owner: key -> file name.

    Raises `ValueError` if there are none, a file is damaged, the config cannot be theirs, or two hold the same key.
    """

    def __init__(self, path: str | Path) -> None:
        files = [Path(one) for one in checkpoint_files(str(path))]
        self.folder = Path(path) if Path(path).is_dir() else files[0].parent
        self.shards: dict[str, TensorFile] = {}
        self.owner: dict[str, str] = {}
        for file in files:
            self.shards[file.name] = TensorFile(file)
            for key in self.shards[file.name].entries:
                if key in self.owner:
                    raise ValueError(f"{path}: {key} is in {self.owner[key]} and in {file.name}")
                self.owner[key] = file.name
        config = self.folder / "config.json"
        if not config.is_file():
            raise ValueError(f"{self.folder}: no config.json beside the weights; expected a checkpoint of transformers")
        self.config: dict[str, Any] = read_object(config, constants=True)
        for place in (self.config, *(one for one in self.config.values() if isinstance(one, dict))):
            self._check_counts(place, config)

    def _check_counts(self, config: dict[str, Any], path: Path) -> None:
        """Raise `ValueError` for more layers or experts than the files can hold: the model is built to know its names.

        Each layer has tensors of its own, and each expert too, or a slice of one.
        """
        entries = [one for shard in self.shards.values() for one in shard.entries.values()]
        most = max([len(entries), *(one.shape[0] for one in entries if one.shape and one.nbytes)])
        for name, value in config.items():
            if ("layers" in name or "experts" in name) and isinstance(value, int) and value > most:
                raise ValueError(f"{path}: `{name}` is {value}, and its files hold {len(entries)} tensors")

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
            pickled = " (adapter_model.bin is a pickle, which is not read)" * (folder / "adapter_model.bin").is_file()
            raise ValueError(
                f"{folder}: {name} is missing{pickled}; expected an adapter that PEFT saved in safetensors"
            )
    return folder

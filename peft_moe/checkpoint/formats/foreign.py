"""An adapter of another tool on disk: its config as it is written, its tensors by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ...config import MoELoraConfig
from ...config_input import check_types
from ..files import check_adapter_tensors
from ..json_input import read_object
from ..merge.source import adapter_folder
from ..tensor_file import TensorFile
from .base import Base, missing_base
from .plan import Planned

_OURS = {one.name for one in dataclasses.fields(MoELoraConfig)}
_OF_LORA = {one.name for one in dataclasses.fields(LoraConfig)}
_NOT_TAKEN = {"peft_type", "peft_version", "target_parameters"}


class ForeignAdapter:
    """An adapter folder of any kind.

    Attributes: folder, name, tensors: its files. config: its `adapter_config.json`, of which only kinds of values are
        checked. base: or `None`.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = adapter_folder(path)
        self.name = self.folder.name
        path = self.folder / "adapter_config.json"
        self.config = read_object(path)
        check_types(LoraConfig, self.config, path)
        self.tensors = TensorFile(self.folder / "adapter_model.safetensors")
        check_adapter_tensors(self.tensors.path, self.tensors.entries)
        self.base: Base | None = None

    @property
    def stated_base(self) -> str | None:
        """The base that its config names."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) else None

    def require_base(self, reason: str) -> Base:
        """The base. Raises `ValueError` with the reason and the option that names it if it is not here."""
        if self.base is None:
            raise missing_base(self.name, self.stated_base, reason)
        return self.base

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self.tensors.entries[key].shape

    def copied(self, key: str, new: str | None = None) -> Planned:
        """A tensor as it is, under its own name or a new one."""
        entry = self.tensors.entries[key]
        return Planned(new or key, entry.code, entry.shape, lambda: self.tensors.read(key))


def native_config(foreign: Mapping[str, Any], **fields: Any) -> MoELoraConfig:
    """A native config with everything of another one that holds for it, and what is given besides.

    Raises `ValueError` for values that are wrong, naming the option.
    """
    known = _OURS if foreign.get("peft_type") == "MOELORA" else _OF_LORA
    taken = {key: value for key, value in foreign.items() if key in known - _NOT_TAKEN}
    try:
        return MoELoraConfig(**({"peft_type": "MOELORA"} | taken | fields))  # a name: it is looked at as JSON
    except ValueError as error:
        raise ValueError(f"adapter_config.json: {error}") from error
    except (TypeError, AttributeError) as error:  # a value of a kind that PEFT's own checks do not expect
        raise ValueError(f"adapter_config.json: an option has a value of the wrong kind: {error}") from error


def config_dict(config: LoraConfig) -> dict[str, Any]:
    """A config as its `save_pretrained` writes it; sets sorted."""
    found = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    for key in ("peft_type", "task_type"):
        found[key] = getattr(found[key], "value", found[key])
    return found

"""What a native adapter was, noted in the header of the file it is exported to, so that it comes back bit for bit.

Ranks that were padded, experts that were left out, gate and up that had an A each: other formats cannot say so. The
note is believed only where the tensors agree with it; readers of other formats pass it over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ...config import MoELoraConfig
from .foreign import ForeignAdapter, config_dict, native_config
from .native import NativeAdapter

_KEY = "peft_moe_native"


@dataclass(frozen=True)
class Record:
    """Attributes: config: of the native adapter. tensors: key of each expert tensor -> (dtype in a header, shape)."""

    config: MoELoraConfig
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def of(adapter: NativeAdapter) -> dict[str, str]:
    """The note, for `Converted.metadata`."""
    mine = [key for one in adapter.modules for key in one.keys.values()]
    entries = {key: adapter.tensors.entries[key] for key in mine}
    content = {
        "config": config_dict(adapter.config),
        "tensors": {key: [entry.code, list(entry.shape)] for key, entry in entries.items()},
    }
    return {_KEY: json.dumps(content, separators=(",", ":"))}


def read(adapter: ForeignAdapter) -> Record | None:
    """The note of a file, if it has one that can be read; `None` otherwise."""
    try:
        content: Any = json.loads(adapter.tensors.metadata.get(_KEY, "null"))
        if content is None:
            return None
        config = native_config(content["config"])
        tensors = {str(key): (str(code), tuple(shape)) for key, (code, shape) in content["tensors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Record(config, tensors)

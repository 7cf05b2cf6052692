"""Adapters from and to the formats of other tools, on tensors and dicts: no weights, no model in memory.

The native folder is the hub: every import ends there, every export starts there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..card import exported_card, imported_card
from .base import base_of
from .folder import check_target, write_folder
from .foreign import ForeignAdapter, native_config
from .native import NativeAdapter
from .plan import Converted
from .registry import detect, find_format

_FACTOR = 64  # by which an import may make an adapter larger
__all__ = ["export_adapter", "import_adapter"]


def export_adapter(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write a native adapter in the format of another tool, tensor by tensor.

    Args:
        src: folder of a native adapter, or its name in the hub's local cache.
        dst: new folder. It is complete or absent, whatever happens.
        format: for whom, see docs/formats.md.
        base: the base model, where the format depends on its architecture: a folder with its `config.json`, or a name
            in the hub's local cache; weights are not needed. `None`: the one that the adapter's config names.
        trust_remote_code: run the model's own code that lies beside the config of `base`, to know its modules.
        progress: show a bar.
        options: of the format.

    Returns: `dst`. Raises `ValueError` for what the format cannot hold, with the reason; nothing is written then.
    """
    target, chosen = Path(dst), find_format(format, "export")
    probe = ForeignAdapter(src)
    check_target(target, probe.folder)
    adapter = NativeAdapter(probe.folder, base_of(base, probe.stated_base, trust_remote_code))
    assert chosen.export is not None
    converted = _call(chosen.export, adapter, chosen.name, options)
    write_folder(target, converted, exported_card(adapter.config, chosen.name, chosen.consumer, converted), progress)
    return target


def import_adapter(
    src: str | Path,
    dst: str | Path,
    format: str = "auto",
    *,
    assume_layout: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write an adapter of another tool as a native one, which `PeftModel.from_pretrained` loads.

    Args:
        src: folder of an adapter, or its name in the hub's local cache. Only safetensors is read.
        dst: new folder. It is complete or absent, whatever happens.
        format: of `src`, see docs/formats.md. `"auto"`: told from its config and keys.
        assume_layout: how the tensors lie, where nothing in the files tells; the error that asks for it names the
            values.
        base, trust_remote_code, progress: see `export_adapter`. With the base at hand more is told from shapes.
        options: of the format.

    Returns: `dst`. Raises `ValueError` naming the key, what was found, what was expected and what to do.
    """
    target, adapter = Path(dst), ForeignAdapter(src)
    check_target(target, adapter.folder)
    chosen = detect(adapter) if format == "auto" else find_format(format, "read")
    assert chosen.read is not None
    adapter.base = base_of(base, adapter.stated_base, trust_remote_code)
    if assume_layout is not None:
        options = {"assume_layout": assume_layout} | options
    converted = _call(chosen.read, adapter, chosen.name, options)
    _check_size(converted, adapter)
    card = imported_card(native_config(converted.config), chosen.name, converted)
    write_folder(target, converted, card, progress)
    return target


def _check_size(converted: Converted, adapter: ForeignAdapter) -> None:
    """Raise `ValueError` where a small file would become a huge one, filled up with zeros."""
    size = sum(one.nbytes for one in converted.tensors)
    held = sum(one.nbytes for one in adapter.tensors.entries.values())
    if size > 2**30 + _FACTOR * held:
        raise ValueError(
            f"{adapter.folder}: its {held / 1e6:.1f} MB would become {size / 1e6:.1f} MB, most of it zeros: ranks or "
            "experts of its config are out of all proportion to its tensors. Nothing was written."
        )


def _call(convert: Callable[..., Converted], adapter: Any, name: str, options: dict[str, Any]) -> Converted:
    known = list(inspect.signature(convert).parameters)[1:]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options of its own"
            raise ValueError(f"`{option}`: the format {name!r} {takes}")
    return convert(adapter, **options)

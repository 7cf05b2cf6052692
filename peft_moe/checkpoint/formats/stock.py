"""Stock PEFT: `LORA` with `target_parameters`."""

from __future__ import annotations

from . import unsloth
from .foreign import ForeignAdapter
from .plan import Format
from .stock_export import CONSUMER, export
from .stock_import import read


def _recognises(adapter: ForeignAdapter) -> str | None:
    marked = unsloth.marked(adapter) is not None
    if not marked and adapter.config.get("peft_type") == "LORA" and adapter.config.get("target_parameters"):
        return "peft_type LORA with target_parameters"
    return None


FORMAT = Format("peft", CONSUMER, export=export, read=read, recognises=_recognises)

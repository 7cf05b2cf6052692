"""Stock PEFT on lists of experts (transformers 4, remote code): a plain LoRA on each expert's linears.

Keys are `…experts.3.gate_proj.lora_A.weight`, or Mixtral's `w1`, `w3`, `w2` for gate, up and down.
"""

from __future__ import annotations

from .foreign import ForeignAdapter
from .per_expert_export import CONSUMER, export
from .per_expert_import import linear_of, read
from .plan import Format


def _recognises(adapter: ForeignAdapter) -> str | None:
    if adapter.config.get("peft_type") != "LORA" or adapter.config.get("target_parameters"):
        return None
    found = next((key for key in adapter.tensors.entries if linear_of(key)), None)
    return None if found is None else f"the key {found}"


FORMAT = Format("peft-per-expert", CONSUMER, export=export, read=read, recognises=_recognises)

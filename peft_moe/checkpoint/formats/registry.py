"""The formats by name."""

from __future__ import annotations

from . import per_expert, stock, unsloth
from .foreign import ForeignAdapter
from .plan import Format

#: In the order in which `format="auto"` asks them: the more particular ones first.
FORMATS: tuple[Format, ...] = (stock.FORMAT, unsloth.FORMAT, per_expert.FORMAT)


def find_format(name: str, doing: str) -> Format:
    """The format of this name. Args: doing: "export" or "read". Raises `ValueError` listing the names."""
    known = {one.name: one for one in FORMATS if getattr(one, doing) is not None}
    if name not in known:
        where = "exported to" if doing == "export" else "imported from"
        raise ValueError(f"format={name!r}: adapters are {where} {', '.join(sorted(known))}")
    return known[name]


def detect(adapter: ForeignAdapter) -> Format:
    """The format of a folder, from its config and keys. Raises `ValueError` if none, or more than one, takes it."""
    if adapter.config.get("peft_type") == "MOELORA":
        raise ValueError(f"{adapter.folder} is in the native format of peft-moe already: nothing is to be imported")
    asked = [(one, one.recognises(adapter)) for one in FORMATS if one.recognises is not None]
    found = [(one, why) for one, why in asked if why is not None]
    if not found:
        sample = ", ".join(list(adapter.tensors.entries)[:3]) or "no tensors"
        raise ValueError(
            f"{adapter.folder}: no format of experts recognises this adapter (peft_type "
            f"{adapter.config.get('peft_type')!r}, target_parameters {adapter.config.get('target_parameters')!r}, keys "
            f"such as {sample}). A LoRA of linears alone needs no conversion; else name its format with `format=`, one "
            f"of {', '.join(sorted(one.name for one in FORMATS if one.read is not None))}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{adapter.folder} could be of more than one format: "
            + "; ".join(f"{one.name} ({why})" for one, why in found)
            + ". Say which with `format=` (`--from`)."
        )
    return found[0][0]

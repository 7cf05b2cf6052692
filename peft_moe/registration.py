"""The tuner type `MOELORA`, made known to PEFT from outside.

PEFT has no entry points: its registry wants the name to be a member of the enum `PeftType`. With a real member
everything works that works for PEFT's own types: saving, loading, pickling, copying, `model.load_adapter`.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

from . import compat

NAME = "MOELORA"


def peft_type() -> PeftType:
    """The enum member, created by the first call."""
    if NAME not in PeftType.__members__:
        compat.add_enum_member(PeftType, NAME)
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Enter config and tuner into PEFT's tables. Idempotent, also when the package is reloaded.

    Raises `RuntimeError` if another package has taken the name.
    """
    member = peft_type()
    tables = compat.peft_tables(config_cls, model_cls)
    for table, value in tables.items():
        registered: Any = table.table.get(member)
        if registered is not None and not _ours(registered, value):
            raise RuntimeError(
                f"PEFT's {table.name} already has a {NAME} of another package: found {registered!r}, expected "
                f"{value!r}. Uninstall one of the two."
            )
    for table, value in tables.items():
        table.table[member] = value


def _ours(registered: object, value: object) -> bool:
    """Whether an entry is this package's: the same, or (after a reload) of the same name."""
    if isinstance(registered, type) and isinstance(value, type):
        return (registered.__module__, registered.__qualname__) == (value.__module__, value.__qualname__)
    return registered == value

"""The changes of parameters, put in order by the tensors of the checkpoint that they end up in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .deltas import Change, ExpertsDelta, Replaced
from .names import Group
from .stored import Stored


@dataclass(eq=False)
class Edit:
    """What happens to one tensor of the checkpoint.

    Attributes: pattern: its place in the group. slice_: which expert's tensor it is, of a stack that the checkpoint
        holds apart. stacked: it holds all experts itself, one a slice. flat: it does so as a matrix of this many.
    """

    group: Merging
    pattern: str
    slice_: int | None = None
    stacked: bool = False
    flat: int | None = None

    @property
    def replaced(self) -> Replaced | None:
        """The value that takes the place of the base's."""
        return self.group.replaced

    def delta(self, expert: int | None, device: torch.device) -> Tensor | None:
        """What to add to it (or to the slice of one expert, with a first axis of one), fp32; `None`: nothing."""
        made = self.group.make(self.slice_ if expert is None else expert, device)
        return None if made is None else made[self.pattern]


@dataclass(eq=False)
class Merging:
    """One group of parameters with their changes.

    Attributes: stored: of the checkpoint, by name. cache: shared by all groups; the deltas made last stay in it.
    """

    group: Group
    changes: dict[str, Change]
    stored: Mapping[str, Stored]
    cache: dict[Any, dict[str, Tensor] | None] = field(default_factory=dict, repr=False)

    @property
    def replaced(self) -> Replaced | None:
        """The new value of the group, where it has one."""
        return next((one.instead for one in self.changes.values() if one.instead is not None), None)

    def make(self, slice_: int | None, device: torch.device) -> dict[str, Tensor] | None:
        """Pattern -> delta in the form of the checkpoint. The last one is kept: gate and up are often neighbours."""
        key = (self, slice_)
        if key not in self.cache:
            self.cache.clear()
            self.cache[key] = self._make(slice_, device)
        return self.cache[key]

    def _make(self, slice_: int | None, device: torch.device) -> dict[str, Tensor] | None:
        deltas: dict[str, Tensor] = {}
        for parameter, change in self.changes.items():

            def weight(parameter: str = parameter) -> Tensor:
                return self.read(parameter, slice_, device)

            found = change.delta(slice_, weight, device)
            if found is not None:
                deltas[parameter] = found
        if not deltas:
            return None
        for parameter in self.group.parameters.values():
            if parameter not in deltas:
                shape = list(self.group.model.get_parameter(parameter).shape)
                deltas[parameter] = torch.zeros([1, *shape[1:]] if slice_ is not None else shape, device=device)
        if self._flat is not None:
            (only,), (pattern,) = deltas.values(), self.group.sources
            return {pattern: only}
        return self.group.to_source(deltas, lambda name: self.stored[name].shape, slice_)

    def read(self, parameter: str, slice_: int | None, device: torch.device, merged: bool = False) -> Tensor:
        """A parameter of the model, or a slice of it with a first axis of one, fp32, from the checkpoint's tensors.

        Args: merged: with the deltas, added in the form of the checkpoint.
        """
        deltas = self.make(slice_, device) if merged else None
        patterns = {name: pattern for pattern, names in self.group.sources.items() for name in names}

        def one(name: str, index: int | None) -> Tensor:
            value = self._read(name, index, device)
            return value if deltas is None else value + deltas[patterns[name]]

        return self.group.to_parameter(one, parameter, slice_)

    @property
    def _flat(self) -> int | None:
        change = next(iter(self.changes.values()))
        return change.factors.count if isinstance(change, ExpertsDelta) and change.flat else None

    def _read(self, name: str, slice_: int | None, device: torch.device) -> Tensor:
        one = self.stored[name]
        first, last = (0, one.shape[0]) if slice_ is None else (slice_, slice_ + 1)
        if slice_ is not None and self._flat is not None:
            size = one.shape[0] // self._flat
            first, last = slice_ * size, (slice_ + 1) * size
        value = one.read(first, last, torch.float32, device)
        if slice_ is None:
            one.release()  # nobody reads the rest of it
        return value

    def edits(self) -> dict[str, Edit]:
        """Name in the checkpoint -> what happens to it. Raises `ValueError` where that cannot be said."""
        stacked = any(isinstance(one, ExpertsDelta) and one.expert is None for one in self.changes.values())
        if self.replaced is not None and (self.group.converter is not None or len(self.changes) > 1):
            raise ValueError(
                f"{next(iter(self.changes))}: `modules_to_save` replaces it, and the checkpoint holds it in another "
                f"form ({sorted(self.group.sources)}); load the model and use `merge_and_unload`"
            )
        if stacked:
            self.group.check_slices()
            if self._flat is not None and self.group.converter is not None:
                raise ValueError(
                    f"{next(iter(self.changes))}: transformers converts a matrix of experts; not supported"
                )
        self._check_shapes(stacked)
        found: dict[str, Edit] = {}
        for pattern, names in self.group.sources.items():
            for position, name in enumerate(names):
                one = position if stacked and self.group.listed else None
                in_stack = stacked and one is None
                if in_stack or any(not isinstance(c, ExpertsDelta) or c.adapts(one) for c in self.changes.values()):
                    found[name] = Edit(self, pattern, one, in_stack, self._flat)
        return found

    def _check_shapes(self, stacked: bool) -> None:
        """Raise `ValueError` if the checkpoint's tensors are not those that the changes are for. Makes no change."""
        shapes = {name: tuple(self.group.model.get_parameter(name).shape) for name in self.group.parameters.values()}
        if self._flat is not None:
            (name,), (shape,) = next(iter(self.group.sources.values())), shapes.values()
            if self.stored[name].shape != shape:
                raise ValueError(f"{name}: found shape {self.stored[name].shape}, and the model has {shape}")
            return
        values = {name: torch.empty((1, *one[1:]) if stacked else one, device="meta") for name, one in shapes.items()}
        if not stacked:
            self.group.to_source(values, lambda name: self.stored[name].shape, None)
            return
        experts = next(iter(shapes.values()))[0]
        for pattern, names in self.group.sources.items():
            found = len(names) if self.group.listed else self.stored[names[0]].shape[0]
            if found != experts:
                raise ValueError(
                    f"{next(iter(shapes))}: the checkpoint has {pattern} of {found} experts, expected {experts}"
                )
            strange = [one for number, one in enumerate(names) if f".{number}." not in one]
            if self.group.listed and strange:  # conversions put them in the order of their names
                raise ValueError(
                    f"{next(iter(shapes))}: the checkpoint has {strange[0]} where {pattern} of expert "
                    f"{names.index(strange[0])} was expected"
                )
        for slice_ in range(experts) if self.group.listed else [0]:
            self.group.to_source(values, lambda name: self.stored[name].shape, slice_)


def edits_of(
    changes: Mapping[str, Change], groups: Mapping[str, Group], stored: Mapping[str, Stored]
) -> dict[str, Edit]:
    """Name in the checkpoint -> what happens to it.

    Args: changes: by parameter. groups: the group of each parameter.

    Raises `ValueError` for a parameter that the checkpoint does not hold.
    """
    missing = sorted(set(changes) - set(groups))
    if missing:
        raise ValueError(
            f"the adapter changes {', '.join(missing[:4])}{' and others' if len(missing) > 4 else ''}, which the "
            "checkpoint does not hold. Is it a checkpoint of another model, or is the parameter tied to another one "
            "(then load the model and use `merge_and_unload`)?"
        )
    merged: dict[int, Merging] = {}
    cache: dict[Any, Any] = {}
    for parameter, change in changes.items():
        group = groups[parameter]
        merged.setdefault(id(group), Merging(group, {}, stored, cache)).changes[parameter] = change
    found: dict[str, Edit] = {}
    for one in merged.values():
        found |= one.edits()
    return found

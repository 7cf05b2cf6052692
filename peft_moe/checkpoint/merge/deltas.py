"""What an adapter on disk changes: for each parameter of the model a delta, or a new value.

Deltas are made when they are asked for, one linear or one expert at a time, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...adapter import ProjectionAdapter, factors, magnitude
from ...layouts import ProjectionSpec
from ...merging import dora_delta
from ...settings import AdapterSettings
from ..tensor_file import TensorFile

_NAME = "default"  # of the adapter, inside this file
Read = Callable[[], Tensor]
Loaded = tuple[Tensor, Tensor, Tensor | None]


@dataclass(eq=False)
class Replaced:
    """A whole new value of a parameter: of a module in `modules_to_save`, or a trained bias."""

    file: TensorFile
    key: str

    @property
    def instead(self) -> Replaced | None:
        """What takes the place of the base's value."""
        return self

    def delta(self, slice_: int | None, weight: Read, device: torch.device) -> Tensor | None:
        """Nothing is added."""
        return None

    def value(self) -> Tensor:
        """The new value."""
        return self.file.read(self.key)


@dataclass(eq=False)
class LinearDelta:
    """`scaling * B A` of a linear or an embedding.

    Attributes: keys: factor -> key. instead: a new value to add it to (PEFT saves embeddings that are adapted).
    """

    file: TensorFile
    keys: dict[str, str]
    scaling: float
    instead: Replaced | None = None

    def delta(self, slice_: int | None, weight: Read, device: torch.device) -> Tensor:
        """`(out, in)` fp32. Args: weight: reads the base's, which DoRA needs."""
        found = {name: self.file.read(key).to(device, torch.float32) for name, key in self.keys.items()}
        if "lora_embedding_A" in found:
            return (found["lora_embedding_B"] @ found["lora_embedding_A"]).T * self.scaling
        a, b, size = self._factors(found)
        return b @ a if size is None else dora_delta(b @ a, size, weight())

    def low_rank(self, slice_: int | None, device: torch.device) -> Loaded | None:
        """A `(r, in)`, B `(out, r)` with the scaling in it, magnitudes `(out,)`; `None` for an embedding."""
        if "lora_embedding_A" in self.keys:
            return None
        return self._factors({name: self.file.read(key).to(device, torch.float32) for name, key in self.keys.items()})

    def _factors(self, found: dict[str, Tensor]) -> Loaded:
        size = found.get("lora_magnitude_vector")
        return found["lora_A"], found["lora_B"] * self.scaling, None if size is None else size.view(-1)


class ExpertFactors:
    """The factors of one projection of one experts module.

    Args:
        keys: `(slot, factor)` -> key. scaling: the nominal one of the adapter.
        count: of all experts. cache: shared by all projections of an adapter; the last one asked for stays in it.
    """

    def __init__(
        self,
        file: TensorFile,
        keys: dict[tuple[str, str], str],
        settings: AdapterSettings,
        projection: ProjectionSpec,
        scaling: float,
        count: int,
        cache: dict[ExpertFactors, Loaded],
    ) -> None:
        self.file, self.keys, self.settings, self.projection = file, keys, settings, projection
        self.scaling, self.count, self.cache = scaling, count, cache

    def load(self, device: torch.device) -> Loaded:
        """A `(E', r', in)`, B `(E', out, r')` with the scaling in it, magnitudes `(E', out)` or `None`; fp32."""
        if self not in self.cache:
            self.cache.clear()
            slots = {slot: ProjectionAdapter([]) for slot in self.settings.slots(self.projection)}
            for (slot, factor), key in self.keys.items():
                value = self.file.read(key).to(device, torch.float32)
                getattr(slots[slot], factor)[_NAME] = nn.Parameter(value, requires_grad=False)
            a, b = factors(slots, _NAME, self.settings, self.scaling, self.projection)
            size = magnitude(slots, _NAME, self.settings, self.projection) if self.settings.use_dora else None
            self.cache[self] = (a, b, size)
        return self.cache[self]


@dataclass(eq=False)
class ExpertsDelta:
    """What one parameter of an experts module gets: the rows of a projection that it holds.

    Attributes:
        rows: of the projection. transposed: the parameter holds `(in, out)`.
        expert: whose parameter it is; `None`: it is a stack of all experts, changed slice by slice.
        flat: the stack is a matrix, the experts under each other.
    """

    factors: ExpertFactors
    rows: slice
    transposed: bool = False
    expert: int | None = None
    flat: bool = False
    instead: Replaced | None = None

    def delta(self, slice_: int | None, weight: Read, device: torch.device) -> Tensor | None:
        """fp32, in the form of the parameter (a slice of a stack has a first axis of one); `None`: no change.

        Args: weight: reads the parameter, or its slice, which DoRA needs.
        """
        low = self.low_rank(slice_, device)
        if low is None:
            return None
        a, b, size = low
        delta = b @ a
        if size is not None:
            base = weight().flatten(0, -2)
            delta = dora_delta(delta, size, base.T if self.transposed else base)
        delta = delta.T if self.transposed else delta
        return delta if self.expert is not None or self.flat else delta.unsqueeze(0)

    def adapts(self, slice_: int | None) -> bool:
        """Whether anything changes: not for experts without an adapter, nor for identity experts that end a stack."""
        expert = slice_ if self.expert is None else self.expert
        return expert in self.factors.settings.adapted(self.factors.count)

    def low_rank(self, slice_: int | None, device: torch.device) -> Loaded | None:
        """A `(r, in)`, B `(rows, r)` with the scaling in it, magnitudes `(rows,)` of one expert; `None`: no adapter."""
        expert = slice_ if self.expert is None else self.expert
        if expert is None or not self.adapts(slice_):
            return None
        experts = self.factors.settings.experts
        position = expert if experts is None else experts.index(expert)
        a, b, size = self.factors.load(device)
        return a[position], b[position, self.rows], None if size is None else size[position, self.rows]


Change = Replaced | LinearDelta | ExpertsDelta

"""What a foreign adapter holds of experts, before it is brought into native form.

A reader of a format finds the pairs, one a slot of a module; what follows (common ranks and scalings, the config) is
the same for all formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...adapter import pack
from ...config import MoELoraConfig
from ...layouts import ExpertsSpec, ProjectionSpec, find_experts
from ...settings import AdapterSettings, nominal_scaling, resolve
from .. import native
from . import record
from .base import Base
from .foreign import ForeignAdapter, config_dict, native_config
from .fuse import scaled, scaled_dtype, target_of
from .native import bind
from .pair_config import config_of
from .plan import Converted, Planned, planned


@dataclass(frozen=True)
class Pair:
    """The factors of one slot of an experts module.

    Attributes:
        module: its path in the file. slot: `gate_up_proj`, `gate_proj`, `down_proj`, ….
        ranks, scalings: of each expert that has factors here, n of them.
        in_features, out_features: of one. dtypes: of A and B.
        read: `"lora_A"` -> `(n, r, in)`, `"lora_B"` -> `(n, out, r)`, r the largest rank, zeros beyond an expert's own.
    """

    module: str
    slot: str
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    in_features: int
    out_features: int
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)


@dataclass
class Found:
    """Everything that a reader found.

    Attributes: pairs: of all modules. others: keys of everything else. facts: for the card.
        indices: module -> the experts that have factors; a module that is not in it has them for all.
        folded: whether scalings that differ between experts are in B, so that each pair has one scaling.
        some_modules: whether the base has experts modules without any, as `to_native` finds out.
        fields: options of the native config that the format determines.
    """

    pairs: list[Pair]
    others: list[str]
    facts: list[str] = field(default_factory=list)
    indices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    folded: bool = True
    some_modules: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> dict[str, list[Pair]]:
        """Path -> its pairs."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.module, []).append(pair)
        return found


def to_native(adapter: ForeignAdapter, found: Found, noted: Found | None = None) -> Converted:
    """The native adapter; as it was before an export of this package, if the file notes that and still agrees.

    Args: noted: the same with one pair a projection, where `found` has more, to compare with the note.

    Raises `ValueError` if it does not fit the base, where that is here.
    """
    converted = record.restore(adapter, noted or found)
    if converted is None:
        found.some_modules = adapter.base is not None and _some(adapter.base, found, adapter.name)
        converted = _general(adapter, found)
    check_fits(adapter, converted)
    return converted


def check_fits(adapter: ForeignAdapter, converted: Converted) -> None:
    """Raise `ValueError` if a native adapter does not fit the base, where that is here."""
    if adapter.base is not None:
        config = native_config(converted.config)
        shapes = {one.key: tuple(one.shape) for one in converted.tensors}
        adapter.base.first(lambda model: bind(config, shapes, model, adapter.name))


def _some(base: Base, found: Found, adapter: str) -> bool:
    """Whether the base has more experts modules than the adapter."""
    mine = {native.canonical(f".{name}.") for name in found.modules()}

    def more(model: Any) -> bool:
        theirs = {native.canonical(f".{name}.") for name in find_experts(model)}
        if not mine <= theirs:
            raise ValueError(
                f"adapter {adapter!r}: its base has experts at {sorted(theirs)[:3]}, found {sorted(mine - theirs)[:3]}"
            )
        return mine < theirs

    return base.first(more)[1]


def _general(adapter: ForeignAdapter, found: Found) -> Converted:
    modules = found.modules()
    slots: dict[str, list[str]] = {}  # some architectures hold each projection in a module of its own
    for name, pairs in modules.items():
        mine = sorted(pair.slot for pair in pairs)
        if slots.setdefault(name.rpartition(".")[2], mine) != mine:
            raise ValueError(
                f"adapter {adapter.name!r}: {name} has factors for {mine}, modules of this name before it for "
                f"{slots[name.rpartition('.')[2]]}; expected the same ones in each"
            )
    values = {name: _values(pairs) for name, pairs in modules.items()}
    config = config_of(adapter.config, found, values)
    tensors: list[Planned] = [adapter.copied(key) for key in found.others]
    for name, pairs in modules.items():
        settings = _settings(config, name, pairs, found.indices.get(name))
        if list(settings.ranks) != [rank for rank, _ in values[name]]:
            raise RuntimeError(f"{name}: the config gives ranks {settings.ranks}, expected {values[name]}")
        for pair in pairs:
            tensors += [_planned(pair, factor, settings, config) for factor in ("lora_A", "lora_B")]
    return Converted(config_dict(config), tensors, [], found.facts)


def _values(pairs: list[Pair]) -> list[tuple[int, float]]:
    """Rank and scaling of each expert: the largest rank of its pairs, and the scaling of the first."""
    return [
        (max(pair.ranks[position] for pair in pairs), pairs[0].scalings[position])
        for position in range(len(pairs[0].ranks))
    ]


def _settings(config: MoELoraConfig, name: str, pairs: list[Pair], indices: tuple[int, ...] | None) -> AdapterSettings:
    count = len(pairs[0].ranks) if indices is None else indices[-1] + 1
    projections = tuple(
        ProjectionSpec(pair.slot, target_of(pair.slot), pair.out_features, pair.in_features, ()) for pair in pairs
    )
    return resolve(config, ExpertsSpec(count, projections, None), name)


def _planned(pair: Pair, factor: str, settings: AdapterSettings, config: MoELoraConfig) -> Planned:
    ratio = None
    if factor == "lora_B":
        wanted = [settings.expert_scaling(position, nominal_scaling(config)) for position in range(len(settings.ranks))]
        both = zip(pair.scalings, wanted, strict=True)
        ratios = [1.0 if own == one else own / one if own else 0.0 for own, one in both]  # zero has no ratio to zero
        if any(abs(one - 1) > 1e-9 for one in ratios):
            ratio = torch.tensor(ratios, dtype=torch.float64)[:, None, None]
    key = f"{native.PREFIX}{pair.module}.{pair.slot}.{factor}"
    size = pair.in_features if factor == "lora_A" else pair.out_features
    shape: tuple[int, ...] = (len(settings.ranks), settings.rank, size)
    if settings.ragged:
        shape = (sum(settings.ranks), size)
    elif factor == "lora_B":
        shape = (len(settings.ranks), size, settings.rank)
    dtype = scaled_dtype(pair.dtypes[factor], ratio)
    return planned(key, shape, dtype, partial(_make, pair, factor, settings, ratio))


def _make(pair: Pair, factor: str, settings: AdapterSettings, ratio: Tensor | None) -> Tensor:
    value = scaled(pair.read(factor), ratio)
    missing = settings.rank - pair.rank
    value = torch.nn.functional.pad(value, (0, 0, 0, missing) if factor == "lora_A" else (0, missing))
    if not settings.ragged:
        return value
    return pack((value if factor == "lora_A" else value.transpose(1, 2)).contiguous(), settings)

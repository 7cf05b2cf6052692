"""What a foreign adapter holds of experts, before it is brought into native form.

A reader of a format finds the pairs, one a projection of a module; what follows (a common rank, a common scaling, the
config) is the same for all formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...layouts import TARGETS
from ...patterns import check_patterns, matches
from ...settings import layer_number
from .. import native
from . import record
from .foreign import ForeignAdapter, config_dict, native_config
from .fuse import alpha_for, scaled, scaled_dtype
from .native import bind
from .plan import Converted, Planned, planned


@dataclass(frozen=True)
class Pair:
    """The factors of one slot of an experts module.

    Attributes:
        module: its path in the file. slot: `gate_up_proj`, `down_proj`, …. experts: how many have factors here.
        rank, scaling: of all of them. in_features, out_features: of one. dtypes: of A and B.
        read: `"lora_A"` -> `(experts, r, in)`, `"lora_B"` -> `(experts, out, r)`.
    """

    module: str
    slot: str
    experts: int
    rank: int
    scaling: float
    in_features: int
    out_features: int
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]

    def shape(self, factor: str, rank: int) -> tuple[int, int, int]:
        """Of a factor, padded to a rank."""
        if factor == "lora_A":
            return self.experts, rank, self.in_features
        return self.experts, self.out_features, rank


@dataclass
class Found:
    """Everything that a reader found.

    Attributes: pairs: of all modules. others: keys of everything else. facts: for the card.
        indices: module -> the experts that have factors, where not all have; `None`: all have, everywhere.
        fields: options of the native config that the format determines.
    """

    pairs: list[Pair]
    others: list[str]
    facts: list[str] = field(default_factory=list)
    indices: dict[str, Sequence[int]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def to_native(adapter: ForeignAdapter, found: Found) -> Converted:
    """The native adapter; as it was before an export of this package, if the file notes that and still agrees.

    Raises `ValueError` if it does not fit the base, where that is here.
    """
    converted = record.restore(adapter, found) or _general(adapter, found)
    if adapter.base is not None:
        config = native_config(converted.config)
        shapes = {one.key: tuple(one.shape) for one in converted.tensors}
        adapter.base.first(lambda model: bind(config, shapes, model, adapter.name))
    return converted


def _general(adapter: ForeignAdapter, found: Found) -> Converted:
    modules: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        modules.setdefault(pair.module, []).append(pair)
    slots = {frozenset(pair.slot for pair in pairs) for pairs in modules.values()}
    if len(slots) > 1:
        raise ValueError(
            f"adapter {adapter.name!r}: its experts modules differ in the projections that are adapted "
            f"({' and '.join(str(sorted(one)) for one in slots)}); expected the same ones in each"
        )
    tensors: list[Planned] = [adapter.copied(key) for key in found.others]
    ranks = {name: (max(pair.rank for pair in pairs), pairs[0].scaling) for name, pairs in modules.items()}
    for name, pairs in modules.items():
        for pair in pairs:
            ratio = None if pair.scaling == pairs[0].scaling else pair.scaling / pairs[0].scaling
            for factor in ("lora_A", "lora_B"):
                tensors.append(_planned(pair, factor, ranks[name][0], ratio if factor == "lora_B" else None))
    return Converted(config_dict(_config(adapter, found, ranks)), tensors, [], found.facts)


def _planned(pair: Pair, factor: str, rank: int, ratio: float | None) -> Planned:
    scale = None if ratio is None else torch.tensor([ratio], dtype=torch.float64)
    key = f"{native.PREFIX}{pair.module}.{pair.slot}.{factor}"
    dtype = scaled_dtype(pair.dtypes[factor], scale)
    return planned(key, pair.shape(factor, rank), dtype, partial(_make, pair, factor, rank, scale))


def _make(pair: Pair, factor: str, rank: int, scale: Tensor | None) -> Tensor:
    value = scaled(pair.read(factor), scale)
    missing = rank - pair.rank
    if not missing:
        return value
    return torch.nn.functional.pad(value, (0, 0, 0, missing) if factor == "lora_A" else (0, missing))


def _config(adapter: ForeignAdapter, found: Found, ranks: dict[str, tuple[int, float]]) -> Any:
    foreign = adapter.config
    rslora = bool(foreign.get("use_rslora"))
    targets = {"down_proj" if pair.slot == "down_proj" else "gate_up_proj" for pair in found.pairs}
    values = {name: (rank, alpha_for(scaling, rank, rslora)) for name, (rank, scaling) in ranks.items()}
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    patterns = {rf"{re.escape(name)}\.\d+": value for name, value in values.items() if value != (rank, alpha)}
    fields: dict[str, Any] = {
        "expert_r": rank,
        "expert_alpha": alpha,
        "expert_rank_pattern": {key: value[0] for key, value in patterns.items() if value[0] != rank},
        "expert_alpha_pattern": {key: value[1] for key, value in patterns.items() if value[1] != alpha},
        "target_experts": [one for one in TARGETS if one in targets],
        "expert_indices": _indices(found),
        "inference_mode": True,
    }
    full = (native.full_key(key).removeprefix(native.PREFIX) for key in found.others if ".lora_" in key)
    linears = [key.partition(".lora_")[0] for key in full]
    if not linears:
        fields["target_modules"] = []
    for option in ("rank_pattern", "alpha_pattern"):
        fields[option] = _of_linears(foreign.get(option), linears)
    return native_config(foreign, **(fields | found.fields))


def _of_linears(patterns: Any, linears: list[str]) -> Any:
    """Patterns that match a linear; those of experts alone go, as the native config has options of its own for them."""
    if not isinstance(patterns, dict):
        return patterns  # refused by the config
    check_patterns(patterns, "rank_pattern or alpha_pattern")
    return {key: value for key, value in patterns.items() if any(matches(key, one) for one in linears)}


def _indices(found: Found) -> Any:
    """`expert_indices`: one list where all modules agree, else by layer."""
    if found.indices is None:
        return None
    lists = {name: list(indices) for name, indices in found.indices.items()}
    if len({tuple(one) for one in lists.values()}) == 1:
        return next(iter(lists.values()))
    by_layer: dict[int, list[int]] = {}
    for name, indices in lists.items():
        number = layer_number(name)
        if number is None or by_layer.setdefault(number, indices) != indices:
            raise ValueError(f"{name}: its experts {indices} cannot be told apart by the number of its layer")
    return by_layer

"""Native -> linears of experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ...layouts import ProjectionSpec
from ...patterns import value_of
from ...settings import scaling_of
from .. import native
from . import record
from .foreign import config_dict
from .fuse import alpha_for, linears
from .native import ExpertsAdapter, NativeAdapter
from .plan import Converted, planned
from .refusals import check_plain
from .stock_export import usage

CONSUMER = "stock PEFT, on lists of experts"
_STACKS = (
    "for a base whose experts are a list; where they are stacks (transformers 5) import it with `peft-moe`: PEFT's own "
    "conversion passes over ranks, alphas and the choice of experts"
)


def export(adapter: NativeAdapter) -> Converted:
    """A LoRA on each adapted expert's linears, for a base whose experts are a list in the installed transformers.

    Every expert keeps its rank and alpha; experts without an adapter have no tensors.
    """
    check_plain(adapter, CONSUMER)
    adapter.require_base("the names of its experts' linears have to be known")
    tensors = [adapter.copied(key) for key in adapter.others]
    values: dict[str, tuple[int, float]] = {}  # linear -> rank, scaling
    for one in adapter.modules:
        if not one.spec.experts:
            raise ValueError(
                f"{one.name} holds its experts in stacks in this version of transformers: there is no linear to adapt. "
                "Use the format 'peft', or convert where the base has lists (transformers 4)."
            )
        for projection, slot, leaf, rows in _leaves(one):
            for position, expert in enumerate(one.experts):
                linear = f"{one.name}.{one.spec.experts[expert]}.{leaf}"
                values[linear] = (one.ranks[position], one.scaling(position))
                shapes = _expert_shapes(one, projection, slot, rows, position)
                for factor, shape in shapes.items():
                    key = f"{native.PREFIX}{linear}.{factor}.weight"
                    make = partial(_expert_factor, one, slot, rows, factor, position)
                    tensors.append(planned(key, shape, one.dtype(slot, factor), make))
    return Converted(_config(adapter, values), tensors, usage(adapter.config), [_STACKS], record.of(adapter))


def _leaves(one: ExpertsAdapter) -> Iterator[tuple[ProjectionSpec, str, str, slice]]:
    """(projection, slot, name of the linear in each expert, its rows of the slot's B)."""
    for projection in one.projections():
        found = linears(one, projection)
        if len(found) != len(projection.parts):
            raise ValueError(
                f"{one.name}.{projection.name}: its base holds it in {len(projection.parts)} linears an expert, "
                f"expected {len(found)}"
            )
        for (slot, rows), part in zip(found.values(), projection.parts, strict=True):
            yield projection, slot, part.path, rows


def _expert_shapes(
    one: ExpertsAdapter, projection: ProjectionSpec, slot: str, rows: slice, position: int
) -> dict[str, tuple[int, int]]:
    out = len(range(one.settings.slot_out_features(projection, slot))[rows])
    return {"lora_A": (one.ranks[position], projection.in_features), "lora_B": (out, one.ranks[position])}


def _expert_factor(one: ExpertsAdapter, slot: str, rows: slice, factor: str, position: int) -> Tensor:
    value = one.factor_of(position, slot, factor)
    return (value if factor == "lora_A" else value[rows]).contiguous()


def _config(adapter: NativeAdapter, values: dict[str, tuple[int, float]]) -> dict[str, Any]:
    ours = adapter.config
    ranks, alphas = {}, {}
    for name, (rank, scaling) in values.items():
        if rank != value_of(ours.rank_pattern, name, ours.r):
            ranks[re.escape(name)] = rank
        found = value_of(ours.alpha_pattern, name, ours.lora_alpha)
        if not math.isclose(scaling_of(ours, found, rank), scaling, rel_tol=1e-12):
            alphas[re.escape(name)] = alpha_for(scaling, rank, ours.use_rslora)
    fields = {key: getattr(ours, key) for key in LoraConfig.__dataclass_fields__ if key != "peft_type"}
    mine = sorted(values)
    linear = sorted({key.partition(".lora_")[0] for key in adapter.others if ".lora_" in key})
    fields |= {
        "rank_pattern": ranks | (ours.rank_pattern or {}),
        "alpha_pattern": alphas | (ours.alpha_pattern or {}),
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": None,
        "target_modules": mine + [native.full_key(one).removeprefix(native.PREFIX) for one in linear],
    }
    return config_dict(LoraConfig(**fields))

"""Native -> stock PEFT's `target_parameters`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ...compat import targets_taken_for_experts, transformers_major
from ...config import MoELoraConfig
from ...patterns import value_of
from ...settings import scaling_of
from .. import native as keys
from ..card import load_base
from . import record
from .foreign import config_dict
from .fuse import alpha_for, full_dtype, full_factor, fused_rank
from .native import ExpertsAdapter, NativeAdapter
from .plan import Converted, Planned, planned
from .refusals import check_plain
from .stock_layout import CURRENT, NOTE, Stack, role, stacks, to_stock

CONSUMER = "stock PEFT"


def export(adapter: NativeAdapter) -> Converted:
    """An adapter that stock PEFT loads without this package, in the layout of the installed PEFT and transformers.

    Ranks that differ are padded with zeros, experts without an adapter get zeros, gate and up with an A each become
    one pair of twice the rank, and alphas that differ are folded into B.
    """
    return convert(adapter, contiguous_r=False)


def convert(adapter: NativeAdapter, contiguous_r: bool) -> Converted:
    """See `export`. Args: contiguous_r: let the columns of `lora_B` lie expert after expert, which PEFT misreads."""
    check_plain(adapter, CONSUMER)
    if adapter.modules:
        adapter.require_base("the order and the orientation of its expert parameters have to be known")
    tensors = [adapter.copied(key) for key in adapter.others]
    ranks: dict[str, tuple[int, float]] = {}  # parameter -> rank, scaling
    swapped: set[bool] = set()
    for one in adapter.modules:
        order = stacks(one.name, one.spec, one.module)
        targeted = [stack for stack in order if stack.projection.name in one.settings.projections]
        swapped |= {stack.swapped(CURRENT) for stack in targeted}
        for depth, stack in enumerate(reversed(targeted)):
            path = one.name + ".base_layer" * depth
            tensors += [_planned(one, stack, path, factor, contiguous_r) for factor in ("lora_A", "lora_B")]
            ranks[f"{one.name}.{stack.name}"] = (fused_rank(one, stack.projection), one.scaling(0))
    folded = any(one.settings.scaling is not None for one in adapter.modules)
    facts = ["alphas that differ between experts are folded into B"] if folded else []
    config = _config(adapter, ranks)
    note = {NOTE: role(swapped.pop())} if len(swapped) == 1 else {}
    return Converted(config, tensors, usage(adapter.config, "0.19.1 or later; "), facts, record.of(adapter) | note)


def _planned(one: ExpertsAdapter, stack: Stack, path: str, factor: str, contiguous_r: bool) -> Planned:
    swapped = stack.swapped(CURRENT)
    name = {"lora_A": "lora_B", "lora_B": "lora_A"}[factor] if swapped else factor
    rank = fused_rank(one, stack.projection)
    experts, size = (
        stack.shape[0],
        stack.projection.in_features if factor == "lora_A" else stack.projection.out_features,
    )
    shape = (experts * rank, size) if name == "lora_A" else (size, rank * experts)
    dtype = full_dtype(one, stack.projection, factor)
    return planned(f"{keys.PREFIX}{path}.{name}.weight", shape, dtype, partial(_make, one, stack, factor, contiguous_r))


def _make(one: ExpertsAdapter, stack: Stack, factor: str, contiguous_r: bool) -> Tensor:
    value = full_factor(one, stack.projection, stack.shape[0], factor)
    return to_stock(value, factor, stack.swapped(CURRENT), contiguous_r)[1]


def _config(adapter: NativeAdapter, ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    ours = adapter.config
    rank_pattern, alpha_pattern = dict(ours.rank_pattern or {}), dict(ours.alpha_pattern or {})
    new_ranks, new_alphas = {}, {}
    for pattern, (rank, scaling) in _grouped(adapter, ranks):
        alpha = alpha_for(scaling, rank, ours.use_rslora)
        for name in (name for name in ranks if re.fullmatch(rf"(.*\.)?({pattern})", name)):
            if value_of(rank_pattern, name, ours.r) != rank:
                new_ranks[pattern] = rank
            found = value_of(alpha_pattern, name, ours.lora_alpha)
            if not math.isclose(scaling_of(ours, found, rank), scaling, rel_tol=1e-12):
                new_alphas[pattern] = alpha
    fields = {key: getattr(ours, key) for key in LoraConfig.__dataclass_fields__ if key != "peft_type"}
    fields |= {
        "target_parameters": _targets(adapter, list(ranks)) or None,
        "rank_pattern": new_ranks | rank_pattern,  # the first that matches counts
        "alpha_pattern": new_alphas | alpha_pattern,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": None,  # that of the installed PEFT, whose layout this is
    }
    linears = any(".lora_" in key for key in adapter.others)
    fields["target_modules"] = (ours.target_modules if linears else None) or []
    if adapter.modules:
        fields["lora_dropout"] = 0.0  # stock PEFT refuses another one on parameters; it is for training alone
    config = LoraConfig(**fields)
    taken = [] if adapter.model is None else targets_taken_for_experts(config, adapter.model)
    if taken:
        raise ValueError(
            f"adapter {adapter.name!r}: it adapts linears called {', '.join(taken)}, which stock PEFT takes for "
            "experts of a transformers 4 adapter when it reads them on this architecture. Adapt others, or merge it."
        )
    return config_dict(config)


def _grouped(adapter: NativeAdapter, ranks: dict[str, tuple[int, float]]) -> Iterator[tuple[str, tuple[int, float]]]:
    """(pattern, rank and scaling): by the end of the names where all parameters of that name agree."""
    endings: dict[str, list[str]] = {}
    for name in ranks:
        endings.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    for ending, names in endings.items():
        if len({ranks[name] for name in names}) == 1:
            yield re.escape(ending), ranks[names[0]]
        else:
            yield from ((re.escape(name), ranks[name]) for name in names)


def _targets(adapter: NativeAdapter, names: list[str]) -> list[str]:
    """The ends of the names where they match nothing else in the model, else whole names."""
    if not names:
        return []
    ends = {".".join(name.split(".")[-2:]) for name in names}
    matched = [one for one, _ in adapter.model.named_parameters() if one.endswith(tuple(f".{end}" for end in ends))]
    return sorted(ends if set(matched) == set(names) else names)


def usage(config: MoELoraConfig, needs: str = "") -> list[str]:
    """How stock PEFT loads what it is given. Args: needs: of its version, with a "; " behind it."""
    return [
        "```python",
        f"from peft import PeftModel  # {needs}peft-moe is not needed",
        f"from transformers import AutoModelForCausalLM  # {transformers_major()}, under which it was exported",
        "",
        load_base(config),
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        "```",
    ]

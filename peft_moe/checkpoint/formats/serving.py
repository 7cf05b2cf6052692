"""What the formats of servers have in common: one rank and one scale for a whole adapter.

A server multiplies every B A by the one `lora_alpha / r` of the config. The scale that fits most tensors stands there,
and where an adapter has others too their ratio to it is folded into B. Lower ranks are padded with zeros.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from ...config import MoELoraConfig
from .. import native as keys
from .foreign import config_dict
from .fuse import fused_rank, scaled, scaled_dtype
from .native import ExpertsAdapter, NativeAdapter
from .plan import Planned, planned
from .refusals import check_plain
from .served_stacks import LINEARS, Stacks, apart, joined, padded

#: What vLLM's `--max-lora-rank` can be; SGLang's can be any number.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LINEAR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
EMBEDDINGS = ("lm_head", "embed_tokens")

# leaf as served -> slots that may adapt it
_SLOTS = {
    "gate_up_proj": ("gate_up_proj", "gate_proj"), "gate_proj": ("gate_up_proj", "gate_proj"),
    "up_proj": ("gate_up_proj", "up_proj"), "down_proj": ("down_proj",),
}  # fmt: skip


@dataclass
class Linear:
    """A linear that is adapted. Attributes: scaling: of its B A. keys: factor -> key."""

    scaling: float
    keys: dict[str, str] = field(default_factory=dict)


class Serving:
    """A native adapter on its way to a server.

    Args: fused: gate and up get one pair of factors (of twice the rank where each has an A).
        rank: of the result; `None`: the smallest of `RANKS` that is enough.

    Attributes: rank, scale: of the result. linears: path -> `Linear`.

    Raises `ValueError` for what no server holds, with the reason.
    """

    def __init__(self, adapter: NativeAdapter, consumer: str, fused: bool, rank: int | None) -> None:
        self.adapter, self.consumer, self.fused = adapter, consumer, fused
        adapter.require_base(f"{consumer} names, orders and counts experts as the architecture does")
        check_plain(adapter, consumer)
        _check_config(adapter, consumer)
        self.linears = _linears(adapter, consumer)
        for one in adapter.modules:
            _check_experts(one, consumer)
        needed = max((self._rank(one) for one in adapter.modules), default=1)
        for each in self.linears.values():
            needed = max(needed, adapter.tensors.entries[each.keys["lora_A"]].shape[0])
        self.rank = _rank(adapter, consumer, needed, rank)
        self.scale = _scale(self._scalings())
        self._last: tuple[str, Stacks] | None = None

    # --- tensors -------------------------------------------------------------------------------------------------

    def ratio(self, one: ExpertsAdapter) -> Tensor | None:
        """`(E', 1, 1)` fp64: what B of each adapted expert is multiplied with; `None`: nothing."""
        return ratios([one.scaling(position) for position in range(len(one.experts))], self.scale)

    def dtype(self, one: ExpertsAdapter, leaf: str, factor: str) -> torch.dtype:
        """Of a factor of the result."""
        slots = [slot for _, slot in one.slots()]
        mine = [slot for slot in _SLOTS[leaf] if slot in slots]
        dtype = one.dtype((mine or slots)[0], factor)  # what has no adapter is zeros, in the dtype of what has one
        return scaled_dtype(dtype, self.ratio(one)) if mine and factor == "lora_B" else dtype

    def stacks(self, one: ExpertsAdapter) -> Stacks:
        """(leaf, factor) -> factors of all experts, finished. Those of the last module that was asked for are kept."""
        if self._last is None or self._last[0] != one.name:
            self._last = None  # two modules are never held at once
            self._last = (one.name, (joined if self.fused else apart)(one, self.rank, self.ratio(one)))
        return self._last[1]

    def sizes(self, one: ExpertsAdapter) -> dict[str, tuple[int, int]]:
        """Leaf -> (out, in)."""
        first, down = one.spec.projections
        found = {"down_proj": (down.out_features, down.in_features)}
        if self.fused:
            return found | {"gate_up_proj": (first.out_features, first.in_features)}
        return found | {leaf: (first.out_features // 2, first.in_features) for leaf in LINEARS[:2]}

    def linear_tensors(self) -> list[Planned]:
        """The factors of all linears."""
        result = []
        for name, one in self.linears.items():
            fold = ratios([one.scaling], self.scale)
            fold = None if fold is None else fold[0]
            for factor, key in one.keys.items():
                entry = self.adapter.tensors.entries[key]
                assert entry.dtype is not None  # `_linears` looked
                size = entry.shape[1 if factor == "lora_A" else 0]
                shape = (self.rank, size) if factor == "lora_A" else (size, self.rank)
                dtype = entry.dtype if factor == "lora_A" else scaled_dtype(entry.dtype, fold)
                make = partial(self._linear, key, factor, fold)
                result.append(planned(f"{keys.PREFIX}{name}.{factor}.weight", shape, dtype, make))
        return result

    def _linear(self, key: str, factor: str, fold: Tensor | None) -> Tensor:
        value = self.adapter.tensors.read(key)
        return padded(scaled(value, fold) if factor == "lora_B" else value, factor, self.rank)

    # --- config and card -----------------------------------------------------------------------------------------

    def config(self, targets: set[str]) -> dict[str, Any]:
        """`adapter_config.json`. Args: targets: last parts of the names of adapted expert modules."""
        ours: MoELoraConfig = self.adapter.config
        alpha = self.scale * self.rank
        near = round(alpha)
        served = LoraConfig(
            r=self.rank,
            lora_alpha=near if near and math.isclose(alpha, near, rel_tol=1e-12) else alpha,  # type: ignore[arg-type]
            target_modules=sorted(targets | {name.rpartition(".")[2] for name in self.linears}),
            task_type=ours.task_type,
            base_model_name_or_path=ours.base_model_name_or_path,
            revision=ours.revision,
            lora_dropout=ours.lora_dropout,
            inference_mode=True,
        )
        return config_dict(served)

    def facts(self) -> list[str]:
        """For the card."""
        found = [f"rank and scale as served: {self.rank} and {self.scale:g}; lower ranks are padded with zeros"]
        others = sorted({value for value in self._scalings() if ratios([value], self.scale) is not None})
        if others:
            found.append(f"other scales, folded into B: {', '.join(f'{value:g}' for value in others)}")
        return found

    # --- rank and scale ------------------------------------------------------------------------------------------

    def _rank(self, one: ExpertsAdapter) -> int:
        return max(fused_rank(one, each) if self.fused else one.settings.rank for each in one.projections())

    def _scalings(self) -> Counter[float]:
        """Scaling -> how many values have it."""
        found: Counter[float] = Counter()
        for one in self.adapter.modules:
            size = sum(math.prod(self.adapter.tensors.entries[key].shape) for key in one.keys.values())
            for position in range(len(one.experts)):
                found[one.scaling(position)] += size // len(one.experts)
        for linear in self.linears.values():
            found[linear.scaling] += math.prod(self.adapter.tensors.entries[linear.keys["lora_B"]].shape)
        return found


def ratios(scalings: list[float], scale: float) -> Tensor | None:
    """`(N, 1, 1)` fp64: scalings by the scale of a result; `None` where all are one."""
    found = [1.0 if math.isclose(one, scale, rel_tol=1e-12) else one / scale for one in scalings]
    return None if all(one == 1 for one in found) else torch.tensor(found, dtype=torch.float64)[:, None, None]


def _scale(scalings: Counter[float]) -> float:
    """The one that leaves least to be rounded: a ratio that is a power of two changes no digit."""

    def cost(scale: float) -> tuple[int, int, float]:
        others = {one: size for one, size in scalings.items() if one and ratios([one], scale) is not None}
        inexact = sum(size for one, size in others.items() if abs(math.frexp(one / scale)[0]) != 0.5)
        return inexact, sum(others.values()), scale

    return min((one for one in scalings if one), key=cost, default=1.0)


def _rank(adapter: NativeAdapter, consumer: str, needed: int, given: int | None) -> int:
    if given is not None and (type(given) is not int or given < needed):
        raise ValueError(f"rank={given!r}: adapter {adapter.name!r} needs {needed} at least for {consumer}")
    enough = [rank for rank in RANKS if rank >= needed]
    if given is None and not enough:
        raise ValueError(
            f"adapter {adapter.name!r}: {consumer} takes ranks up to {RANKS[-1]}, and {needed} are needed (gate and up "
            "with an A each count twice where they are served as one). Merge it instead (`peft_moe.merge_checkpoint`)."
        )
    return enough[0] if given is None else given


# --- what servers refuse -----------------------------------------------------------------------------------------


def _check_config(adapter: NativeAdapter, consumer: str) -> None:
    config = adapter.config
    refused = {
        "use_dora": (config.use_dora, "it has no place for magnitudes"),
        "modules_to_save": (config.modules_to_save, "it serves the base's own weights beside the low-rank ones"),
        "bias": (config.bias not in (None, "none"), "it does not load trained biases"),
        "lora_bias": (config.lora_bias, "it does not load biases of adapters"),
    }
    for option, (found, reason) in refused.items():
        if found:
            raise ValueError(
                f"adapter {adapter.name!r}: `{option}={getattr(config, option)!r}` cannot be exported to {consumer}: "
                f"{reason}. Merge it instead (`peft_moe.merge_checkpoint`) and serve the merged model."
            )


def _check_experts(one: ExpertsAdapter, consumer: str) -> None:
    names = [projection.name for projection in one.spec.projections]
    if names != ["gate_up_proj", "down_proj"] or one.spec.projections[0].gate is None:
        raise ValueError(
            f"{one.name}: its experts have the projections {', '.join(names)}; for {consumer} experts with gate, up "
            "and down are exported. Merge it instead (`peft_moe.merge_checkpoint`)."
        )


def _linears(adapter: NativeAdapter, consumer: str) -> dict[str, Linear]:
    found: dict[str, Linear] = {}
    for key in adapter.others:
        match = LINEAR.fullmatch(keys.full_key(key).removeprefix(keys.PREFIX))
        entry = adapter.tensors.entries[key]
        if match is None or len(entry.shape) != 2 or entry.dtype is None or not entry.dtype.is_floating_point:
            raise ValueError(
                f"adapter {adapter.name!r}: {key} ({entry.code}, {entry.shape}) is not a factor of a linear, and "
                f"{consumer} takes nothing else beside experts. Merge it instead (`peft_moe.merge_checkpoint`)."
            )
        name, factor = match.groups()
        if name.rpartition(".")[2] in EMBEDDINGS:
            raise ValueError(
                f"adapter {adapter.name!r}: {key} adapts an embedding or the head, which {consumer} serves on few "
                "architectures only: it is not exported. Merge it instead (`peft_moe.merge_checkpoint`)."
            )
        found.setdefault(name, Linear(adapter.files.linear_scaling(name))).keys[factor] = key
    return found

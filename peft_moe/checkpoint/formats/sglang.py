"""SGLang: per expert, stacked, or with outer factors shared (docs/serving.md)."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from .. import native as keys
from .foreign import ForeignAdapter
from .native import ExpertsAdapter, NativeAdapter
from .plan import Converted, Format, Planned, planned
from .served_read import note, read_served
from .served_stacks import FACTORS, LINEARS
from .serving import Serving

CONSUMER = "SGLang"
LAYOUTS = ("per-expert", "stacked", "shared-outer")

# The linears that it knows, by the one it makes of them, in the order in which it puts them together.
_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_ALONE = ("o_proj", "out_proj", "down_proj", "q_b_proj", "kv_b_proj")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def export(adapter: NativeAdapter, layout: str = "per-expert", rank: int | None = None) -> Converted:
    """An adapter that SGLang serves.

    Args: layout: "per-expert" (one pair of factors an expert and projection), "stacked" (one tensor for all experts),
        or "shared-outer" (stacked, with the factors that experts share held once; for adapters with `share_experts`).
        All adapters of one server have to be with shared factors, or all without. rank: see `Serving`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if layout == "shared-outer" and adapter.config.share_experts != "outer":
        raise ValueError(
            f"layout='shared-outer': adapter {adapter.name!r} was trained with share_experts="
            f"{adapter.config.share_experts!r}, its experts have factors of their own. Use 'per-expert' or 'stacked'."
        )
    serving = Serving(adapter, CONSUMER, fused=False, rank=rank)
    _check_names(serving)
    if layout == "shared-outer" and any(one.settings.scaling is not None for one in adapter.modules):
        raise ValueError(
            f"layout='shared-outer': experts of adapter {adapter.name!r} differ in alpha, which is folded into B, and "
            "B of down is one for all. Use 'per-expert' or 'stacked'."
        )
    tensors = serving.linear_tensors()
    for one in adapter.modules:
        tensors += _single(serving, one) if layout == "per-expert" else _stacked(serving, one, layout == "shared-outer")
    targets = set(LINEARS) if adapter.modules else set()
    usage = _usage(adapter, serving)
    return Converted(
        serving.config(targets), tensors, usage, [f"layout: {layout}", *serving.facts()],
        note("sglang", adapter),
    )  # fmt: skip


def _check_names(serving: Serving) -> None:
    """SGLang finds its modules by number of layer and last part of the name alone, and puts some of them together."""
    name = serving.adapter.name
    layers: dict[str, str] = {}
    for one in serving.adapter.modules:
        number = _LAYER.search(one.name)
        if number is None or not one.name.endswith(".experts"):
            raise ValueError(f"{one.name}: {CONSUMER} has the experts of a layer N in `layers.N.<block>.experts`")
        if layers.setdefault(number[1], one.name) != one.name:
            raise ValueError(f"{one.name} and {layers[number[1]]}: {CONSUMER} has one module of experts in a layer")
    known = {part: parts for parts in _TOGETHER.values() for part in parts}
    for path in serving.linears:
        owner, _, leaf = path.rpartition(".")
        if (leaf not in known and leaf not in _ALONE) or _LAYER.search(path) is None:
            raise ValueError(
                f"adapter {name!r}: {path} is no linear that {CONSUMER} serves an adapter on; it knows "
                f"{', '.join((*known, *_ALONE))} of numbered layers. Merge it instead (`peft_moe.merge_checkpoint`)."
            )
        needed = [part for part in known.get(leaf, ()) if part != "k_proj"]  # of which it makes zeros itself
        missing = [part for part in needed if f"{owner}.{part}" not in serving.linears]
        if missing:
            raise ValueError(
                f"adapter {name!r}: {path} is adapted and {', '.join(missing)} beside it is not; {CONSUMER} puts "
                f"{', '.join(known[leaf])} together and would fail or drop it. Merge it instead "
                "(`peft_moe.merge_checkpoint`)."
            )


def _single(serving: Serving, one: ExpertsAdapter) -> list[Planned]:
    result = []
    for leaf, (out_features, in_features) in serving.sizes(one).items():
        for factor in FACTORS:
            shape = (serving.rank, in_features) if factor == "lora_A" else (out_features, serving.rank)
            dtype = serving.dtype(one, leaf, factor)
            for expert in range(one.spec.num_experts):
                make = partial(_of_expert, serving, one, leaf, factor, expert)
                result.append(planned(f"{keys.PREFIX}{one.name}.{expert}.{leaf}.{factor}.weight", shape, dtype, make))
    return result


def _of_expert(serving: Serving, one: ExpertsAdapter, leaf: str, factor: str, expert: int) -> Tensor:
    return serving.stacks(one)[leaf, factor][expert]


def _stacked(serving: Serving, one: ExpertsAdapter, outer: bool) -> list[Planned]:
    """`experts.<leaf>` with A `(E, r, in)`, B `(E, out, r)`; gate and up with one A as `gate_up_proj`."""
    sizes = serving.sizes(one)
    together = not one.settings.split_gate_up
    if together:
        out_features, in_features = sizes.pop("up_proj")
        sizes = {"gate_up_proj": (2 * out_features, in_features), "down_proj": sizes["down_proj"]}
    result = []
    for leaf, (out_features, in_features) in sizes.items():
        for factor in FACTORS:
            shared = outer and factor == ("lora_B" if leaf == "down_proj" else "lora_A")
            shape = (serving.rank, in_features) if factor == "lora_A" else (out_features, serving.rank)
            dtype = serving.dtype(one, leaf, factor)
            make = partial(_stack, serving, one, leaf, factor, shared)
            count = 1 if shared else one.spec.num_experts
            result.append(planned(f"{keys.PREFIX}{one.name}.{leaf}.{factor}.weight", (count, *shape), dtype, make))
    return result


def _stack(serving: Serving, one: ExpertsAdapter, leaf: str, factor: str, shared: bool) -> Tensor:
    stacks = serving.stacks(one)
    if leaf != "gate_up_proj":
        value = stacks[leaf, factor]
    elif factor == "lora_A":
        value = stacks["gate_proj", factor]
    else:  # all gates, then all ups, whatever their order in the base
        value = torch.cat([stacks["gate_proj", factor], stacks["up_proj", factor]], dim=1)
    return value[:1].contiguous() if shared else value


def _usage(adapter: NativeAdapter, serving: Serving) -> list[str]:
    base = adapter.config.base_model_name_or_path or "<base model>"
    return [
        "```console",
        f"$ python -m sglang.launch_server --model-path {base} --enable-lora \\",
        f"    --lora-paths adapter=<this folder> --max-lora-rank {serving.rank} --lora-strict-loading",
        "```",
    ]


def read(adapter: ForeignAdapter) -> Converted:
    """The other way, bit for bit where this package wrote it and the tensors were not changed since."""
    return read_served(adapter, "sglang")


def _recognises(adapter: ForeignAdapter) -> str | None:
    stacked = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])\.lora_[AB]\.weight$")
    found = [key for key, one in adapter.tensors.entries.items() if stacked.search(key) and len(one.shape) == 3]
    return f"a stack of experts, {found[0]}" if found else None


FORMAT = Format("sglang", CONSUMER, export=export, read=read, recognises=_recognises)

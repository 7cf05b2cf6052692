"""Stock PEFT's `target_parameters` -> native, from all layouts that stock PEFT has written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config_input import check_ranks_and_alphas
from ...patterns import value_of
from .foreign import ForeignAdapter
from .pairs import Found, Pair, to_native
from .plan import Converted
from .stock_layout import LAYOUTS, NOTE, ROLES, from_stock, layout_of_version, role
from .stock_wrappers import Wrapper, wrappers

_REFUSED = {
    "use_dora": "DoRA on expert parameters does not exist in stock PEFT",
    "fan_in_fan_out": "it has no meaning on expert parameters",
    "lora_bias": "expert adapters have no bias",
}


def read(adapter: ForeignAdapter, assume_layout: str | None = None) -> Converted:
    """See the module. Args: assume_layout: one of `LAYOUTS` or `ROLES`, where shapes and `peft_version` do not tell."""
    if assume_layout is not None and assume_layout not in (*LAYOUTS, *ROLES):
        raise ValueError(f"assume_layout={assume_layout!r}: expected one of {', '.join((*LAYOUTS, *ROLES))}")
    return to_native(adapter, find_pairs(adapter, assume_layout, contiguous_r=False))


def find_pairs(adapter: ForeignAdapter, assume_layout: str | None, contiguous_r: bool) -> Found:
    """The pairs of all expert parameters. Args: contiguous_r: columns of B lie expert after expert."""
    check_lora(adapter)
    found, others = wrappers(adapter)
    swapped = _roles(adapter, found, assume_layout)
    pairs = [_pair(adapter, one, swapped, contiguous_r) for one in found]
    return Found(pairs, others)


def check_lora(adapter: ForeignAdapter) -> None:
    """Raise `ValueError` for a config that is not of LoRA on experts, or has values that cannot be."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter {adapter.name!r}: its peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for option, reason in _REFUSED.items():
        if config.get(option):
            raise ValueError(f"adapter {adapter.name!r}: `{option}` is set, and {reason}")
    check_ranks_and_alphas({"r": None, "lora_alpha": None} | config, f"adapter {adapter.name!r}")


def rank_and_scaling(config: dict[str, Any], name: str) -> tuple[int, float]:
    """What a LoRA config says of the linear or parameter of a name."""
    rank = value_of(config.get("rank_pattern"), name, config["r"])
    alpha = value_of(config.get("alpha_pattern"), name, config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pair(adapter: ForeignAdapter, one: Wrapper, swapped: bool, contiguous_r: bool) -> Pair:
    name = f"{one.module}.{one.parameter}"
    rank, scaling = rank_and_scaling(adapter.config, name)
    a, b = (adapter.shape(one.keys[factor]) for factor in ("lora_A", "lora_B"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
        raise ValueError(
            f"adapter {adapter.name!r}: {one.keys['lora_A']} and {one.keys['lora_B']}: found shapes {a} and {b}, "
            f"expected (E * {rank}, in) and (out, {rank} * E) of rank {rank}"
        )
    experts = a[0] // rank
    if one.experts is not None and experts != one.experts:
        raise ValueError(
            f"adapter {adapter.name!r}: {one.keys['lora_A']}: found shape {a}, expected {one.experts * rank} rows: "
            f"rank {rank} for each of the {one.experts} experts of the base"
        )
    files = {"lora_A": "lora_B", "lora_B": "lora_A"} if swapped else {"lora_A": "lora_A", "lora_B": "lora_B"}
    dtypes = {factor: _dtype(adapter, one.keys[file]) for factor, file in files.items()}
    in_features, out_features = (b[0], a[1]) if swapped else (a[1], b[0])

    def factor_of(factor: str) -> Tensor:
        matrix = adapter.tensors.read(one.keys[files[factor]])
        return from_stock(matrix, files[factor], rank, swapped, contiguous_r)

    ranks, scalings = (rank,) * experts, (scaling,) * experts
    return Pair(one.module, one.slot, ranks, scalings, in_features, out_features, dtypes, factor_of)


def _dtype(adapter: ForeignAdapter, key: str) -> torch.dtype:
    found = adapter.tensors.entries[key].dtype
    if found is None or not found.is_floating_point:
        raise ValueError(f"adapter {adapter.name!r}: {key}: found dtype {found}, expected a floating one")
    return found


def _roles(adapter: ForeignAdapter, found: list[Wrapper], assume_layout: str | None) -> bool:
    """Whether A lies on the output: told by shapes where they differ, else by the version. One answer for the file."""
    answers: dict[bool, str] = {}
    for one in found:
        if one.sizes is None:
            continue
        key = one.keys["lora_A"]
        shape = (adapter.shape(key)[-1], adapter.shape(one.keys["lora_B"])[0])
        if shape not in (one.sizes, one.sizes[::-1]):
            raise ValueError(
                f"adapter {adapter.name!r}: {key} and lora_B beside it: found sizes {shape}, expected {one.sizes} (in "
                f"and out of {one.parameter} in the base), or the other way round"
            )
        if one.sizes[0] != one.sizes[1]:
            answers[shape != one.sizes] = key
    for name in dict.fromkeys(one.module for one in found) if not answers else ():
        answer = _by_both(adapter, [one for one in found if one.module == name])
        if answer is not None:
            answers[answer] = name
    if len(answers) > 1:
        raise ValueError(
            f"adapter {adapter.name!r}: {answers[True]} has lora_A on the output, {answers[False]} on the input: "
            "no version of PEFT writes that"
        )
    answer = next(iter(answers), None)
    if answer is not None:
        _check_assumed(adapter, found, assume_layout, answer)
        return answer
    assume_layout = assume_layout or adapter.tensors.metadata.get(NOTE)
    return ROLES[assume_layout] if assume_layout in ROLES else _by_layout(adapter, found[0], assume_layout)


def _by_both(adapter: ForeignAdapter, pair: list[Wrapper]) -> bool | None:
    """Of a gate_up and a down projection: the hidden size is the input of one and the output of the other."""
    by_slot = {one.slot: one for one in pair}
    if set(by_slot) != {"gate_up_proj", "down_proj"}:
        return None
    sizes = {
        slot: (adapter.shape(one.keys["lora_A"])[-1], adapter.shape(one.keys["lora_B"])[0])
        for slot, one in by_slot.items()
    }
    (gate_a, gate_b), (down_a, down_b) = sizes["gate_up_proj"], sizes["down_proj"]
    straight = gate_a == down_b and gate_b == 2 * down_a
    swapped = gate_b == down_a and gate_a == 2 * down_b
    if straight or swapped:
        return swapped
    raise ValueError(
        f"adapter {adapter.name!r}: {pair[0].module}: sizes {sizes['gate_up_proj']} of gate_up_proj and "
        f"{sizes['down_proj']} of down_proj fit each other in no layout; expected (H, 2 I) and (I, H), or both reversed"
    )


def _check_assumed(adapter: ForeignAdapter, found: list[Wrapper], layout: str | None, answer: bool) -> None:
    for one in found:
        if layout is None or (one.stack is None and layout not in ROLES):
            continue
        assumed = ROLES[layout] if layout in ROLES else one.stack is not None and one.stack.swapped(layout)
        if assumed != answer:
            raise ValueError(
                f"adapter {adapter.name!r}: {one.keys['lora_A']}: found shape {adapter.shape(one.keys['lora_A'])}, "
                f"which assume_layout={layout!r} contradicts. Shapes tell its layout: leave the option out."
            )


def _by_layout(adapter: ForeignAdapter, one: Wrapper, assumed: str | None) -> bool:
    name = f"adapter {adapter.name!r}: {one.module}.{one.parameter}"
    if one.sizes is None:
        adapter.require_base(f"the shapes of {one.parameter} alone do not tell which size is its input")
    version = adapter.config.get("peft_version")
    layout = assumed or layout_of_version(version)
    if layout is None:
        raise ValueError(
            f"{name} is square, so shapes do not tell its layout, and its config says peft_version={version!r}. Say "
            f"which PEFT saved it with `assume_layout=` (`--assume-layout`): one of {', '.join(map(repr, LAYOUTS))}."
        )
    if one.stack is None:
        raise ValueError(
            f"{name} is square, and this version of transformers holds these experts as a list, which does not tell "
            "how stock PEFT saw them. Convert it under transformers 5, or say it with `assume_layout=`: "
            f"{' or '.join(ROLES)}."
        )
    if assumed is None and one.stack.depends_on_transformers(layout):
        raise ValueError(
            f"{name} is square, so shapes do not tell its layout, and what PEFT {version} wrote for this class depends "
            "on the version of transformers it was trained with. Say it with `assume_layout=` (`--assume-layout`): "
            f"with this one {role(one.stack.swapped(layout))}, else {role(not one.stack.swapped(layout))}."
        )
    return one.stack.swapped(layout)

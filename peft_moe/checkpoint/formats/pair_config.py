"""The native config of a foreign adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...config import MoELoraConfig
from ...layouts import TARGETS
from ...patterns import check_patterns, matches
from ...settings import layer_number
from .. import native
from .foreign import native_config
from .fuse import alpha_for, target_of

if TYPE_CHECKING:
    from .pairs import Found


def config_of(foreign: Mapping[str, Any], found: Found, values: Mapping[str, list[tuple[int, float]]]) -> MoELoraConfig:
    """The config of the native adapter: what holds of the foreign one, and what the tensors say of the experts.

    Args: values: module -> rank and scaling of each expert that has factors.
    """
    rslora = bool(foreign.get("use_rslora"))
    wanted = {name: [(rank, alpha_for(scaling, rank, rslora)) for rank, scaling in one] for name, one in values.items()}
    rank = Counter(one[0] for ones in wanted.values() for one in ones).most_common(1)[0][0]
    alpha = Counter(one[1] for ones in wanted.values() for one in ones).most_common(1)[0][0]
    targets = {target_of(pair.slot) for pair in found.pairs}
    fields: dict[str, Any] = {
        "expert_r": rank,
        "expert_alpha": alpha,
        "expert_rank_pattern": _pattern(found, {n: [one[0] for one in ones] for n, ones in wanted.items()}, rank),
        "expert_alpha_pattern": _pattern(found, {n: [one[1] for one in ones] for n, ones in wanted.items()}, alpha),
        "target_experts": [one for one in TARGETS if one in targets],
        "expert_indices": _indices(found, wanted),
        "inference_mode": True,
    }
    full = [native.full_key(key).removeprefix(native.PREFIX) for key in found.others]
    linears = [key.partition(".lora_")[0] for key in full if ".lora_" in key]
    fields["target_modules"] = _targets(foreign.get("target_modules"), linears)
    for option in ("rank_pattern", "alpha_pattern"):
        fields[option] = _of_linears(foreign.get(option) or {}, linears)
    return native_config(foreign, **(fields | found.fields))


def _pattern(found: Found, values: dict[str, list[Any]], default: Any) -> dict[str, Any]:
    """Regexes of `<module>.<expert>` for the values that are not the default."""
    patterns = {}
    for name, ones in values.items():
        experts = found.indices.get(name) or range(len(ones))
        if len(set(ones)) == 1:
            if ones[0] != default:
                patterns[rf"{re.escape(name)}\.\d+"] = ones[0]
            continue
        for value in dict.fromkeys(ones):
            own = "|".join(str(expert) for expert, one in zip(experts, ones, strict=True) if one == value)
            if value != default:
                patterns[rf"{re.escape(name)}\.({own})"] = value
    return patterns


def _targets(targets: Any, linears: list[str]) -> Any:
    """`target_modules` without what named linears of experts alone."""
    if not linears:
        return []
    if isinstance(targets, list) and all(isinstance(one, str) for one in targets):
        return [one for one in targets if any(name == one or name.endswith(f".{one}") for name in linears)]
    return targets


def _of_linears(patterns: dict[str, Any], linears: list[str]) -> dict[str, Any]:
    """Patterns that match a linear; those of experts alone go, as the native config has options of its own for them."""
    check_patterns(patterns, "rank_pattern or alpha_pattern")
    return {key: value for key, value in patterns.items() if any(matches(key, one) for one in linears)}


def _indices(found: Found, modules: Mapping[str, Any]) -> Any:
    """`expert_indices`: one list where all modules agree, else by layer."""
    if not found.indices and not found.some_modules:
        return None
    lists = {name: list(found.indices.get(name) or range(len(modules[name]))) for name in modules}
    if len({tuple(one) for one in lists.values()}) == 1 and not found.some_modules:
        return next(iter(lists.values()))
    by_layer: dict[int, list[int]] = {}
    for name, indices in lists.items():
        number = layer_number(name)
        if number is None or by_layer.setdefault(number, indices) != indices:
            raise ValueError(f"{name}: its experts {indices} cannot be told apart by the number of its layer")
    return by_layer

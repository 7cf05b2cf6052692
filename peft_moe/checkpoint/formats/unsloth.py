"""Unsloth: stock PEFT's tensors, whose `lora_B` lies in one of two orders.

Until September 2026 its forward read the columns of an expert's B as neighbours ("contiguous_r", which it calls
`grouped_by_expert`); in PEFT's order the expert index is fastest ("expert_fastest", `rank_major`). Both have one shape,
and the older files have no mark. Newer ones name their order in `lora_B_layout` of the config. Nothing in a base model
decides it: both readings are adapters of the same base.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .foreign import ForeignAdapter
from .native import NativeAdapter
from .pairs import Pair, to_native
from .plan import Converted, Format
from .stock_export import convert
from .stock_import import find_pairs
from .stock_layout import LAYOUTS
from .stock_wrappers import wrappers

MARK = "lora_B_layout"
ORDERS = {"expert_fastest": "rank_major", "contiguous_r": "grouped_by_expert"}
CONSUMER = "Unsloth"


def export(adapter: NativeAdapter, layout: str = "expert_fastest") -> Converted:
    """Stock PEFT's tensors with Unsloth's mark. Args: layout: "contiguous_r" is for Unsloth before September 2026."""
    if layout not in ORDERS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(ORDERS)}")
    found = convert(adapter, contiguous_r=layout == "contiguous_r")
    found.config[MARK] = ORDERS[layout]
    found.usage = [
        "```python",
        "from unsloth import FastLanguageModel",
        "",
        'model, tokenizer = FastLanguageModel.from_pretrained("<this folder>")',
        "```",
    ]
    if layout == "contiguous_r":
        found.facts.append("the order of `lora_B` is that of Unsloth before September 2026; PEFT would misread it")
    return found


def read(adapter: ForeignAdapter, assume_layout: str | None = None) -> Converted:
    """See the module. Args: assume_layout: one of `ORDERS`, one of `LAYOUTS`, or one of each with a comma between."""
    given = [one.strip() for one in (assume_layout or "").split(",") if one.strip()]
    orders = [one for one in given if one in ORDERS]
    layouts = [one for one in given if one in LAYOUTS]
    if len(orders) > 1 or len(layouts) > 1 or len(orders) + len(layouts) < len(given):
        raise ValueError(
            f"assume_layout={assume_layout!r}: expected one of {', '.join(ORDERS)}; for square parameters also one of "
            f"{', '.join(LAYOUTS)}, with a comma between"
        )
    order = _order(adapter, orders[0] if orders else None)
    layout = layouts[0] if layouts else None
    if order is not None:
        return to_native(adapter, find_pairs(adapter, layout, contiguous_r=order == "contiguous_r"))
    found = find_pairs(adapter, layout, contiguous_r=False)
    if all(pair.rank == 1 or len(pair.ranks) == 1 for pair in found.pairs):
        return to_native(adapter, found)  # both orders are the same
    hint = _hint(adapter, found.pairs)
    raise ValueError(
        f"adapter {adapter.name!r}: its config has no `{MARK}`, and nothing else in an adapter or its base tells the "
        "order of lora_B. Unsloth wrote 'contiguous_r' until September 2026, when its files began to have that mark; "
        "PEFT without Unsloth always writes 'expert_fastest'. Say which with `assume_layout=` (`--assume-layout`); if "
        f"you do not know, convert it both ways: the wrong one has a clearly higher loss on the training data.{hint}"
    )


def _order(adapter: ForeignAdapter, assumed: str | None) -> str | None:
    stated: Any = adapter.config.get(MARK)
    if stated is None:
        return assumed
    known = {mark: order for order, mark in ORDERS.items()}
    if stated not in known:
        raise ValueError(
            f"adapter {adapter.name!r}: `{MARK}` is {stated!r} in its config, expected one of {list(known)}"
        )
    if assumed not in (None, known[stated]):
        raise ValueError(
            f"adapter {adapter.name!r}: assume_layout={assumed!r} contradicts `{MARK}` in its config, {stated!r}"
        )
    return known[stated]


def _hint(adapter: ForeignAdapter, pairs: list[Pair]) -> str:
    """B starts at zero and stays there for an expert that saw no token: its columns are zero in one of the orders."""
    votes = dict.fromkeys(ORDERS, 0)
    for pair, one in zip(pairs, wrappers(adapter)[0], strict=True):
        zero = (adapter.tensors.read(one.keys["lora_B"]) == 0).all(dim=0)
        if zero.any() and not zero.all():
            votes["expert_fastest"] += _whole(zero.view(pair.rank, -1).T)
            votes["contiguous_r"] += _whole(zero.view(-1, pair.rank))
    likely = [order for order, count in votes.items() if count and sum(votes.values()) == count]
    if not likely:
        return ""
    return (
        f" A hint, no proof: in {votes[likely[0]]} tensors the columns of zeros are those of whole experts only if "
        f"they are read as {likely[0]!r}."
    )


def _whole(zero: Tensor) -> bool:
    """Args: zero: `(E, r)`, which columns are zero. Whether all of an expert's are, or none."""
    return bool((zero.all(dim=1) == zero.any(dim=1)).all())


def _recognises(adapter: ForeignAdapter) -> str | None:
    if adapter.config.get("peft_type") != "LORA" or not adapter.config.get("target_parameters"):
        return None
    base = adapter.stated_base or ""
    return marked(adapter) or (f"its base is {base!r}" if base.lower().startswith("unsloth/") else None)


def marked(adapter: ForeignAdapter) -> str | None:
    """What in a config only Unsloth writes; `None`: nothing."""
    if adapter.config.get(MARK) is not None:
        return f"its config has `{MARK}`"
    mapping = adapter.config.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
        return "its config has `unsloth_fixed`"
    return None


FORMAT = Format("unsloth", CONSUMER, export=export, read=read, recognises=_recognises)

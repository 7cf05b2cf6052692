"""Ranks that a config asks for, against the sizes of what they are asked of: before memory is allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .patterns import value_of

_SIZES = ("in_features", "out_features")
_SMALL = 1024  # costs little whatever the weight is, and servers pad ranks to their own sizes


def check_rank(rank: int, in_features: int, out_features: int, name: str) -> None:
    """Raise `ValueError` for a rank far beyond any that a weight can have, before memory is asked for it."""
    most = max(_SMALL, 4 * (in_features + out_features))
    if rank > most:
        raise ValueError(
            f"{name}: the config asks for rank {rank} on a weight of {out_features} x {in_features}, whose rank is at "
            f"most {min(in_features, out_features)}; at most {most} is accepted there"
        )


def check_ranks(model: nn.Module, config: Any, targeted: Callable[[str], Any]) -> None:
    """Raise `ValueError` for a targeted linear or embedding whose rank is out of all proportion."""
    for name, module in model.named_modules():
        base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        first, second = ("num_embeddings", "embedding_dim") if isinstance(base, nn.Embedding) else _SIZES
        sizes = getattr(base, first, None), getattr(base, second, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int) and targeted(name):
            check_rank(value_of(config.rank_pattern, name, config.r), sizes[0], sizes[1], name)

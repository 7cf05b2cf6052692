"""What requantization does to a merge: measured, and said once it eats a sizeable part of the adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("peft_moe")

#: Share of the delta's norm that rounding may eat before a merge warns.
SIZEABLE = 0.25


@dataclass
class Change:
    """Squared norms, summed over experts: of the rounding error, and of the deltas."""

    error: Tensor | float = 0.0
    delta: Tensor | float = 0.0

    @classmethod
    def of(cls, stored: Tensor, exact: Tensor, delta: Tensor) -> Change:
        """From what is stored now, the exact sum and the delta, all of one shape."""
        error, size = (value.double().square().sum() for value in (stored - exact, delta))
        return cls(error, size)

    def __add__(self, other: Change) -> Change:
        return Change(self.error + other.error, self.delta + other.delta)

    @property
    def share(self) -> float:
        """Norm of the rounding error over that of the deltas; 0 without deltas."""
        error, delta = (float(torch.as_tensor(value)) for value in (self.error, self.delta))
        return (error / delta) ** 0.5 if delta > 0 else 0.0


def report(name: str, change: Change) -> None:
    """Warn, with the measured share, if requantization ate a sizeable part of the merged deltas."""
    if change.share > SIZEABLE:
        logger.warning(
            "%s: after the merge the requantized weights differ from the exact sum by %.0f%% of the adapter's own "
            "change. Merge into 16 bits to keep it: `merge_and_unload(dtype=torch.bfloat16)`.",
            name,
            100 * change.share,
        )

"""The statistics that a 4-bit parameter carries; imported with the first of them, since it needs bitsandbytes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import QuantState


class CarriedState(QuantState):
    """A view of a record's statistics: the same tensors, moved on its own, and never to the meta device.

    A parameter takes its statistics along wherever it goes. Offloading moves it to the meta device and back, and what
    has been there is lost.
    """

    def to(self, device: Any) -> None:
        """Move the statistics."""
        if device is None or torch.device(device).type != "meta":  # None: a cast
            super().to(device)


def carried(state: QuantState) -> CarriedState:
    """The view of a record's state."""
    found: Any = copy.copy(state)
    found.__class__ = CarriedState
    found.state2 = copy.copy(state.state2)
    return found

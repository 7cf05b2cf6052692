"""The activation between the two projections of an expert, with its backward.

An activation maps `(S, N)` to `(S, I)` row by row. Gated swish, which nearly every model uses, has a closed form; any
other callable is differentiated by autograd while the backward runs, so nothing but its input is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu


class GatedSwish(NamedTuple):
    """`gate * sigmoid(alpha * gate) * (up + shift)`, after clamping gate from above and up on both sides.

    Attributes: limit: of the clamping; `None`: no clamping. interleaved: rows hold gate and up in turn, not [gate; up].
    """

    alpha: float = 1.0
    shift: float = 0.0
    limit: float | None = None
    interleaved: bool = False


SILU_GATED = GatedSwish()

Activation = GatedSwish | Callable[[Tensor], Tensor]


def _gate_and_up(form: GatedSwish, pre: Tensor) -> tuple[Tensor, Tensor]:
    return (pre[..., ::2], pre[..., 1::2]) if form.interleaved else pre.chunk(2, dim=-1)  # type: ignore[return-value]


def activate(activation: Activation, pre: Tensor) -> Tensor:
    """Args: pre: `(S, N)`, output of the first projection. Returns `(S, I)`."""
    if not isinstance(activation, GatedSwish):
        return activation(pre)
    gate, up = _gate_and_up(activation, pre)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    swish = silu(gate) if activation.alpha == 1.0 else gate * torch.sigmoid(activation.alpha * gate)
    return swish * (up + activation.shift if activation.shift else up)


def activate_backward(activation: Activation, pre: Tensor, grad: Tensor) -> Tensor:
    """Gradient `(S, N)` with respect to `pre`, given the gradient `(S, I)` of the output."""
    if not isinstance(activation, GatedSwish):
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            (found,) = torch.autograd.grad(activation(leaf), leaf, grad)
        return found
    gate, up = _gate_and_up(activation, pre)
    gate_moves = up_moves = None
    if activation.limit is not None:
        gate_moves, up_moves = gate <= activation.limit, up.abs() <= activation.limit
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    sigmoid = torch.sigmoid(activation.alpha * gate)
    swish = gate * sigmoid
    d_gate = grad * (up + activation.shift) * (sigmoid + activation.alpha * swish * (1 - sigmoid))
    d_up = grad * swish
    if gate_moves is not None and up_moves is not None:
        d_gate, d_up = d_gate * gate_moves, d_up * up_moves
    return torch.stack((d_gate, d_up), -1).flatten(-2) if activation.interleaved else torch.cat((d_gate, d_up), -1)

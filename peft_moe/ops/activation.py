"""The activation between the two projections of an expert, with its backward.

An activation maps `(S, N)` to `(S, I)` row by row. Gated SiLU, which nearly every model uses, has a closed form; any
other callable is differentiated by autograd while the backward runs, so nothing but its input is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

SILU_GATED = "silu_gated"  # rows [gate; up]: silu(gate) * up

Activation = str | Callable[[Tensor], Tensor]


def activate(activation: Activation, pre: Tensor) -> Tensor:
    """Args: pre: `(S, N)`, output of the first projection. Returns `(S, I)`."""
    if not isinstance(activation, str):
        return activation(pre)
    gate, up = pre.chunk(2, dim=-1)
    return silu(gate) * up


def activate_backward(activation: Activation, pre: Tensor, grad: Tensor) -> Tensor:
    """Gradient `(S, N)` with respect to `pre`, given the gradient `(S, I)` of the output."""
    if not isinstance(activation, str):
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            (found,) = torch.autograd.grad(activation(leaf), leaf, grad)
        return found
    gate, up = pre.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    d_gate = grad * up * (sigmoid + swish * (1 - sigmoid))
    return torch.cat((d_gate, grad * swish), dim=-1)

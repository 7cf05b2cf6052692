"""What the ops should return, in float64, one token, one choice and one expert at a time.

Nothing here is shared with the package. Gradients are autograd's own, through these loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Gate = Callable[[Tensor], Tensor]  # (N,) -> (I,)


@dataclass
class Stack:
    """One projection of all experts: weight (E, N, K), bias (E, N) or None, a (E, R, K) and b (E, N, R) or None."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def double(self) -> Stack:
        """Float64 leaves; the adapter's require gradients."""
        wide = [None if one is None else one.detach().double() for one in (self.weight, self.bias, self.a, self.b)]
        for adapter in wide[2:]:
            if adapter is not None:
                adapter.requires_grad_()
        return Stack(*wide)

    def __call__(self, expert: int, row: Tensor) -> Tensor:
        out = self.weight[expert] @ row
        if self.bias is not None:
            out = out + self.bias[expert]
        if self.a is not None and self.b is not None:
            out = out + self.b[expert] @ (self.a[expert] @ row)
        return out


def silu_gate(pre: Tensor) -> Tensor:
    """The first half gates the second."""
    half = pre.shape[0] // 2
    gate, up = pre[:half], pre[half:]
    return gate / (1 + torch.exp(-gate)) * up


def swish_plus_one(pre: Tensor) -> Tensor:
    """GPT-OSS: gate and up alternate and are clamped."""
    gate, up = pre[0::2].clamp(max=0.8), pre[1::2].clamp(-0.8, 0.8)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


def softcapped(pre: Tensor) -> Tensor:
    """Alternating as well, without a kink: for dtypes in which a value near a clamp may fall on either side."""
    gate, up = torch.tanh(pre[0::2]), torch.tanh(pre[1::2])
    return (up + 1) * gate / (1 + torch.exp(-gate))


def squared_relu(pre: Tensor) -> Tensor:
    """Nemotron-H: no gate."""
    return pre.clamp(min=0) ** 2


def moe(x: Tensor, weights: Tensor, index: Sequence[Sequence[int]], up: Stack, down: Stack, gate: Gate) -> Tensor:
    """sum_j w[t, j] * expert(index[t][j], x[t]); an index past the experts adds nothing. All float64, (T, H)."""
    experts = up.weight.shape[0]
    rows = []
    for token, choices in enumerate(index):
        out = torch.zeros(down.weight.shape[1], dtype=torch.float64)
        for choice, expert in enumerate(choices):
            if expert < experts:
                out = out + weights[token, choice] * down(expert, gate(up(expert, x[token])))
        rows.append(out)
    return torch.stack(rows) if rows else torch.zeros(0, down.weight.shape[1], dtype=torch.float64) + 0 * x.sum()


def products(rows: Tensor, matrices: Tensor, owners: Sequence[int]) -> Tensor:
    """rows[s] @ matrices[owners[s]], (S, N), for matrices (E, K, N)."""
    out = torch.zeros(len(owners), matrices.shape[2], dtype=torch.float64)
    for number, owner in enumerate(owners):
        out[number] = rows[number].double() @ matrices[owner].double()
    return out


def outers(a: Tensor, b: Tensor, owners: Sequence[int], experts: int) -> Tensor:
    """sum over the rows of an expert of the outer product a[s] b[s]ᵀ, (E, N, K)."""
    out = torch.zeros(experts, a.shape[1], b.shape[1], dtype=torch.float64)
    for number, owner in enumerate(owners):
        out[owner] += torch.outer(a[number].double(), b[number].double())
    return out

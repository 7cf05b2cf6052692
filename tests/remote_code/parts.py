"""Parts that several remote-code-like blocks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def choose_in_groups(scores: Tensor, top_k: int, groups: int, kept_groups: int, masked: float) -> Tensor:
    """Indices `(T, k)` of the best experts among the best groups, a group being as good as its two best experts.

    Args: scores `(T, E)`; masked: what the experts of the other groups score.
    """
    tokens, experts = scores.shape
    per_group = scores.view(tokens, groups, experts // groups)
    best_groups = per_group.topk(2, dim=-1).values.sum(dim=-1).topk(kept_groups, dim=-1).indices
    out = torch.ones(tokens, groups, dtype=torch.bool, device=scores.device).scatter(1, best_groups, False)
    return per_group.masked_fill(out.unsqueeze(-1), masked).view(tokens, experts).topk(top_k, dim=-1).indices

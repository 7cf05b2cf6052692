"""Blocks that look like the known ones and compute something else: none of them may run grouped."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .bailing import BailingBlock, BailingGate
from .deepseek_v3 import DeepseekBlock


class WithAuxiliaryLoss(BailingBlock):
    """Keeps the auxiliary loss of its gate: running its inference path in training would lose it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        topk_idx, topk_weight, self.aux_loss = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        return self.moe_infer(flat, topk_idx, topk_weight).view(*hidden_states.shape)


class WithTwoGates(BailingBlock):
    """Routes images by a second gate."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.image_gate = BailingGate(config)

    def forward(self, hidden_states: Tensor, image_mask: Tensor | None = None) -> Tensor:
        topk_idx, topk_weight, _ = (self.gate if image_mask is None else self.image_gate)(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        return self.moe_infer(flat, topk_idx, topk_weight).view(*hidden_states.shape)


class WithCapacity(DeepseekBlock):
    """Drops the tokens that an expert has no room for."""

    capacity = 2

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(topk_ids == i)
            token, slot = token[: self.capacity], slot[: self.capacity]
            out[token] += expert(x[token]) * topk_weight[token, slot, None].to(x.dtype)
        return out


class WithExpertParallelism(DeepseekBlock):
    """Holds the first half of the experts; the rest are None and live on another rank."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.ep_size = 2
        self.experts_per_rank = len(self.experts) // 2
        for i in range(self.experts_per_rank, len(self.experts)):
            self.experts[i] = None


class WithRanks(DeepseekBlock):
    """Has every expert and still exchanges tokens with another rank."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.ep_size = 2


class WithHoles(DeepseekBlock):
    """One expert is None although no rank is said to hold it."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.experts[1] = None


class WithNormalisedExpert(nn.Module):
    """Normalises its input: more than projections around an activation."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WithStrangeExperts(DeepseekBlock):
    """Experts with the usual names and an unusual forward."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.experts = nn.ModuleList(
            WithNormalisedExpert(config.hidden_size, config.moe_intermediate_size) for _ in self.experts
        )


class WithMixedExperts(DeepseekBlock):
    """One expert is of another class."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.experts[2] = WithNormalisedExpert(config.hidden_size, config.moe_intermediate_size)


class WithFlatRouting(DeepseekBlock):
    """Hands its experts flattened indices and weights with another meaning of the arguments."""

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_ids: Tensor, flat_weights: Tensor, top_k: int = 2) -> Tensor:
        return super().moe_infer(x, flat_ids.view(-1, top_k), flat_weights.view(-1, top_k))


REFUSED = (
    WithAuxiliaryLoss,
    WithTwoGates,
    WithCapacity,
    WithExpertParallelism,
    WithRanks,
    WithHoles,
    WithStrangeExperts,
    WithMixedExperts,
    WithFlatRouting,
)

"""Bailing's (Ling's) block: a loop over all experts in training, `moe_infer` otherwise, router logits in the result."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import GatedMLP


class BailingGate(nn.Module):
    """Softmax in fp32 over logits in the activations' dtype; returns the logits too."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor, sort: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.view(-1, hidden_states.shape[-1]), self.weight)
        topk_weight, topk_idx = torch.topk(logits.softmax(dim=-1, dtype=torch.float32), self.top_k, sorted=sort)
        if self.top_k > 1 and self.norm_topk_prob:
            topk_weight = topk_weight / topk_weight.sum(dim=-1, keepdim=True)
        return topk_idx, topk_weight, logits


class BailingBlock(nn.Module):
    """Returns `(hidden states, (router logits, chosen experts))`, the latter two `(B, S, E)` and `(B, S, k)`."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            [GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = BailingGate(config)
        if config.num_shared_experts is not None:
            self.shared_experts = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before = hidden_states
        batch, length, width = hidden_states.shape
        topk_idx, topk_weight, router_logits = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        if self.training:
            flat = topk_idx.view(-1)
            repeated = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
            y = torch.empty_like(repeated)
            for i, expert in enumerate(self.experts):
                y[flat == i] = expert(repeated[flat == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
            y = y.to(hidden_states.dtype).view(batch, length, width)
        else:
            y = self.moe_infer(hidden_states, topk_idx, topk_weight).view(batch, length, width)
        if self.config.num_shared_experts is not None:
            y = y + self.shared_experts(before)
        return y, (router_logits.view(batch, length, -1), topk_idx.view(batch, length, -1))

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        order = topk_ids.view(-1).argsort()
        rows = x[order // topk_ids.shape[1]]
        hits = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        hits.scatter_(1, topk_ids, 1)
        outputs = []
        end = 0
        for i, count in enumerate(hits.sum(dim=0).cpu().numpy()):
            start, end = end, end + count
            if count > 0:
                outputs.append(self.experts[i](rows[start:end]).to(x.device))
        outs = torch.cat(outputs, dim=0)
        placed = torch.empty_like(outs)
        placed[order] = outs
        weighted = placed.view(*topk_ids.shape, -1).type(topk_weight.dtype).mul_(topk_weight.unsqueeze(dim=-1))
        return weighted.sum(dim=1).type(placed.dtype)

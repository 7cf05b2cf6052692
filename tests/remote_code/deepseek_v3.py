"""The block of DeepSeek-V3's remote code: its gate refuses training mode, and in training mode it has no result."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import GatedMLP, choose_in_groups


class DeepseekGate(nn.Module):
    """Sigmoid scores, a correction bias for the choice only, groups, renormalised and scaled weights in fp32."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.topk_method = config.topk_method
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        flat = hidden_states.view(batch * length, width)
        scores = F.linear(flat.float(), self.weight.float()).sigmoid()
        if self.topk_method != "noaux_tc":
            raise NotImplementedError(self.topk_method)
        assert not self.training
        topk_idx = choose_in_groups(
            scores + self.e_score_correction_bias, self.top_k, self.config.n_group, self.config.topk_group, 0.0
        )
        topk_weight = scores.gather(1, topk_idx)
        if self.config.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight * self.config.routed_scaling_factor


class DeepseekBlock(nn.Module):
    """Routed experts in inference mode only, plus shared experts. Returns a tensor."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.ep_size = 1
        self.ep_rank = 0
        self.experts_per_rank = config.n_routed_experts
        self.experts = nn.ModuleList(
            [GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = DeepseekGate(config)
        if config.n_shared_experts is not None:
            self.shared_experts = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        before = hidden_states
        shape = hidden_states.shape
        topk_idx, topk_weight = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        if not self.training:
            y = self.moe_infer(hidden_states, topk_idx, topk_weight).view(*shape)
        if self.config.n_shared_experts is not None:
            y = y + self.shared_experts(before)
        return y

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        tokens, top_k = topk_ids.shape
        order = topk_ids.view(-1).argsort()
        hits = topk_ids.new_zeros(tokens, len(self.experts)).scatter_(1, topk_ids, 1).sum(dim=0)
        rows = x[order // top_k].split(hits.tolist())
        first = self.ep_rank * self.experts_per_rank
        outs = torch.cat([self.experts[first + i](part) for i, part in enumerate(rows) if part.shape[0] > 0])
        per_choice = torch.empty_like(outs)
        per_choice[order] = outs
        weighted = per_choice.view(tokens, top_k, -1).type(topk_weight.dtype).mul_(topk_weight.unsqueeze(-1))
        return weighted.sum(dim=1).type(outs.dtype)

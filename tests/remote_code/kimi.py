"""Kimi's block: inference only, experts in a smaller latent space, a gate that updates its scores in place."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import GatedMLP, choose_in_groups


class LatentExpert(nn.Module):
    """`w2(silu(w1(x)) * w3(x))`, or with `situ` an activation of the concatenated gate and up."""

    def __init__(self, config: SimpleNamespace, hidden_size: int):
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(hidden_size, config.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(config.moe_intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, config.moe_intermediate_size, bias=False)
        self.act_fn = TanhGate() if config.hidden_act == "situ" else nn.SiLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.config.hidden_act == "situ":
            return self.w2(self.act_fn(torch.cat([self.w1(hidden_states), self.w3(hidden_states)], dim=-1)))
        return self.w2(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states))


class TanhGate(nn.Module):
    """`(..., 2 I)` gate and up -> `(..., I)`: tanh(gate) * sigmoid(gate) * up."""

    def forward(self, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return torch.tanh(gate) * torch.sigmoid(gate) * up


class KimiGate(nn.Module):
    """As DeepSeek-V3's, but the correction bias is added in place, so it reaches the weights too."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        _, _, width = hidden_states.shape
        scores = F.linear(hidden_states.view(-1, width).float(), self.weight.float()).sigmoid()
        assert not self.training
        for_choice = scores.view(-1, self.weight.shape[0])
        for_choice += self.e_score_correction_bias
        topk_idx = choose_in_groups(for_choice, self.top_k, self.config.n_group, self.config.topk_group, 0.0)
        topk_weight = scores.gather(1, topk_idx)
        topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight * self.config.routed_scaling_factor


class KimiBlock(nn.Module):
    """Refuses training mode itself; the experts sit between a down and an up projection. Returns a tensor."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.ep_size = 1
        self.use_latent_moe = config.routed_expert_hidden_size is not None
        self.latent_moe_use_norm = config.latent_moe_use_norm
        width = config.routed_expert_hidden_size or config.hidden_size
        self.experts = nn.ModuleList([LatentExpert(config, width) for _ in range(config.n_routed_experts)])
        self.gate = KimiGate(config)
        if config.n_shared_experts is not None:
            self.shared_experts = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        if self.use_latent_moe:
            self.routed_expert_down_proj = nn.Linear(config.hidden_size, width, bias=False)
            self.routed_expert_up_proj = nn.Linear(width, config.hidden_size, bias=False)
            if self.latent_moe_use_norm:
                self.routed_expert_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        before = hidden_states
        shape = hidden_states.shape
        topk_idx, topk_weight = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        if self.use_latent_moe:
            hidden_states = self.routed_expert_down_proj(hidden_states)
        if not self.training:
            y = self.moe_infer(hidden_states, topk_idx, topk_weight)
        else:
            raise NotImplementedError("this block does not train")
        if self.use_latent_moe:
            if self.latent_moe_use_norm:
                y = self.routed_expert_norm(y)
            y = self.routed_expert_up_proj(y)
        y = y.view(*shape)
        if self.config.n_shared_experts is not None:
            y = y + self.shared_experts(before)
        return y

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        order = topk_ids.view(-1).argsort()
        counts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        counts.scatter_(1, topk_ids, 1)
        outputs, start = [], 0
        for i, count in enumerate(counts.sum(dim=0).cpu().numpy()):
            if count == 0:
                continue
            outputs.append(self.experts[i](x[order[start : start + count] // topk_ids.shape[1]]))
            start += count
        outs = torch.cat(outputs, dim=0)
        back = torch.empty_like(outs)
        back[order] = outs
        back = back.view(*topk_ids.shape, -1).type(topk_weight.dtype).mul_(topk_weight.unsqueeze(dim=-1))
        return back.sum(dim=1).type(outs.dtype)

"""Blocks whose experts are a bare container of MLPs (transformers 4): what the whole block should return, in float64.

Shapes: B pictures or sequences of N tokens, T = B * N, H hidden, k experts a token.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tests.oracle import Deltas, dict_expert, mlp_list_oracle, part_linears_oracle, route_oracle

# Softmax over all logits of a plain linear router, then the best k; divided by their sum: always, never, or as
# `block.norm_topk_prob` says.
ALWAYS_NORMALISED = {"MixtralSparseMoeBlock", "MiniMaxSparseMoeBlock", "HunYuanMoEV1Moe"}
NEVER_NORMALISED = {"JambaSparseMoeBlock"}


def block_oracle(block: nn.Module, args: tuple, deltas: Deltas | None = None) -> Tensor:
    """The output (B, N, H) of `block(*args)` in eval mode, routing and shared experts included.

    deltas: as in `tests.oracle`, per expert of `block.experts`.
    """
    x = args[0]
    if hasattr(block, "fc1"):  # VitPose: one half of the output from a shared linear, the other from the expert
        hidden = block.act(_double(block.fc1)(x.double()))
        routed = part_linears_oracle(block.experts, (hidden, args[1].view(-1, 1, 1)), deltas)
        return torch.cat([_double(block.fc2)(hidden), routed], dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    idx, w = route(block, *args)
    if isinstance(block.experts, nn.ModuleDict):
        routed = route_oracle(rows, idx, w, dict_expert(block.experts, deltas or {}))
    else:
        routed = mlp_list_oracle(block.experts, rows, idx, w, deltas)
    return (routed + _shared(block, rows)).view(x.shape)


@torch.no_grad()
def route(block: nn.Module, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chosen experts (T, k) int64 and their weights (T, k) for the block input x (B, N, H), in eval mode.

    padding_mask: what NLLB's block receives as its second argument.
    """
    name = type(block).__name__
    rows = x.reshape(-1, x.shape[-1]).double()
    router = block.router if hasattr(block, "router") else block.gate
    if name == "NllbMoeSparseMLP":
        probabilities = router(x, padding_mask)[1]
        idx = torch.arange(probabilities.shape[-1]).expand_as(probabilities)
        return idx, probabilities.double() * (1.0 - block.moe_token_dropout)
    if name == "SwitchTransformersSparseMLP":
        # The weight is applied to every token; one beyond its expert's capacity is multiplied by a row of zeros.
        mask, probabilities, _ = router(x)
        mask, probabilities = mask.flatten(0, 1), probabilities.flatten(0, 1).double()
        return mask.argmax(-1, keepdim=True), probabilities * mask.sum(-1, keepdim=True)
    if name == "PhimoeSparseMoeBlock":
        return _sparse_mixer(rows @ router.weight.double().T, block.router_jitter_noise)
    if name == "Ernie4_5_MoeSparseMoeBlock":
        scores = (rows @ router.weight.double().T).softmax(-1)
        idx = (scores + block.moe_statics.e_score_correction_bias.double()).topk(block.top_k, dim=-1).indices
        w = scores.gather(1, idx)
        return idx, w / w.sum(-1, keepdim=True).clamp(min=block.norm_min)
    linear = router if isinstance(router, nn.Linear) else getattr(router, "wg", None)
    if linear is None:  # DeepSeek, GLM, dots, Longcat: the router is a module that returns the choice itself
        return router(x)
    w, idx = (rows @ linear.weight.double().T).softmax(-1).topk(block.top_k, dim=-1)
    if name in ALWAYS_NORMALISED or (name not in NEVER_NORMALISED and block.norm_topk_prob):
        w = w / w.sum(-1, keepdim=True)
    return idx, w


def _sparse_mixer(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Phi's top-2: each choice weighs its softmax share among the logits within 2 * epsilon (relative) of the best."""
    chosen, weights, open_logits = [], [], logits
    for _ in range(2):
        best, idx = open_logits.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * epsilon
        weights.append(open_logits.masked_fill(far, float("-inf")).softmax(-1).gather(1, idx))
        chosen.append(idx)
        open_logits = logits.scatter(1, idx, float("-inf"))
    return torch.cat(chosen, dim=1), torch.cat(weights, dim=1)


def _shared(block: nn.Module, rows: Tensor) -> Tensor:
    """The experts every token goes through, (T, H) float64; zero where there are none."""
    rows = rows.double()
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        shared = getattr(block, name, None)
        if shared is not None:
            out = _double(shared)(rows)
            gate = getattr(block, "shared_expert_gate", None)
            return out if gate is None else torch.sigmoid(_double(gate)(rows)) * out
    return torch.zeros_like(rows)


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()

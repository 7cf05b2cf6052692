"""Blocks of transformers 4 that keep their experts as stacked parameters but dispatch to them in a Python loop.

As in `blocks_native`, each function is a `BlockForward`. Their routers compute host-side counts for the dispatch
(`tolist`, `histc`, `.cpu()`); the choice of experts and its weights are computed here from the same modules without
them.

Shapes: T = batch x sequence tokens, H hidden size, k experts per token, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks_common import Block, linear_output_dtype, sum_dtype
from .spec import RunExperts


def granite_moe_forward(block: Block, run_experts: RunExperts, layer_input: Tensor) -> tuple[Tensor, Tensor]:
    """GraniteMoE, its shared and hybrid relatives: top-k of the logits, then softmax over the k.

    Returns `(B, S, H)`, logits `(T, E)` in fp32.
    """
    shape = layer_input.shape
    x = layer_input.reshape(-1, shape[-1])
    router = block.router
    logits = router.layer(x).float()
    top_logits, idx = logits.topk(router.top_k, dim=1)
    weights = torch.softmax(top_logits, dim=1).type_as(x)
    accumulate = torch.promote_types(linear_output_dtype(x), weights.dtype)
    return run_experts(x, idx, weights, accumulate_dtype=accumulate).reshape(shape), logits


def aria_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> Tensor:
    """Aria: top-k of the logits, softmax over the k in their dtype, shared experts. Returns `(B, S, H)`."""
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.router(x)
    top_logits, idx = torch.topk(logits, k=block.config.moe_topk, dim=1)
    weights = F.softmax(top_logits, dim=-1)
    dtype = torch.promote_types(x.dtype, weights.dtype)
    routed = run_experts(x, idx, weights, accumulate_dtype=sum_dtype(dtype)).to(dtype)
    return routed.reshape(shape) + block.shared_experts(hidden_states)

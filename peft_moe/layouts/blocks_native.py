"""The blocks of transformers 4 with a `ModuleList` of experts, with the experts' loop replaced by one call.

Each function is a `BlockForward`: it takes the block, `run_experts` and the arguments of the block's own forward, and
returns what that forward returns. Everything but the loop over experts is the block's: it calls the block's own
router and shared experts, draws the same random numbers in the same order, and keeps the dtypes of each step.

Shapes: T = batch x sequence tokens, H hidden size, k experts per token, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks_common import Block, linear_output_dtype, sum_dtype
from .spec import RunExperts


def _softmax_top_k(logits: Tensor, top_k: int, normalise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Indices and weights, both `(T, k)`: softmax in fp32 over the experts, the k largest, the weights in `dtype`."""
    weights, idx = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return idx, weights.to(dtype)


def _jitter_(hidden_states: Tensor, noise: float) -> None:
    """Multiplies the block's input in place, as the original does: the caller's tensor changes too."""
    hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - noise, 1.0 + noise)


def mixtral_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Mixtral, MiniMax: input jitter, softmax top-k always renormalised. Returns `(B, S, H)`, logits `(T, E)`."""
    shape = hidden_states.shape
    if block.training and block.jitter_noise > 0:
        _jitter_(hidden_states, block.jitter_noise)
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.gate(x)
    idx, weights = _softmax_top_k(logits, block.top_k, True, x.dtype)
    return run_experts(x, idx, weights).reshape(shape), logits


def qwen_moe_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3-MoE, Qwen3-Omni thinker, OLMoE, FlexOlmo: softmax top-k, renormalised where the block says so.

    Returns `(B, S, H)`, logits `(T, E)`.
    """
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.gate(x)
    idx, weights = _softmax_top_k(logits, block.top_k, block.norm_topk_prob, x.dtype)
    return run_experts(x, idx, weights).reshape(shape), logits


def qwen_moe_shared_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen2-MoE, Qwen3-Next, Qwen3-Omni talker: as Qwen3-MoE, plus one shared expert behind a sigmoid gate.

    Returns `(B, S, H)`, logits `(T, E)`.
    """
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.gate(x)
    idx, weights = _softmax_top_k(logits, block.top_k, block.norm_topk_prob, x.dtype)
    routed = run_experts(x, idx, weights)
    shared = block.shared_expert(x)
    shared = F.sigmoid(block.shared_expert_gate(x)) * shared
    return (routed + shared).reshape(shape), logits


def jamba_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Jamba: softmax top-k, never renormalised, the router is `block.router`. Returns `(B, S, H)`, logits `(T, E)`."""
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.router(x)
    idx, weights = _softmax_top_k(logits, block.top_k, False, x.dtype)
    return run_experts(x, idx, weights).reshape(shape), logits


def phimoe_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """PhiMoE: input jitter, then sparsemixer (which samples in training). Returns `(B, S, H)`, logits `(T, E)`."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    shape = hidden_states.shape
    if block.training and block.input_jitter_noise > 0:
        _jitter_(hidden_states, block.input_jitter_noise)
    x = hidden_states.reshape(-1, shape[-1])
    logits = block.gate(x)
    weights, idx = sparsemixer(logits, jitter_eps=block.router_jitter_noise, training=block.training)
    return run_experts(x, idx, weights).reshape(shape), logits


def ernie_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Ernie 4.5: fp32 router outside autocast, correction bias for the choice only, clamped renormalisation.

    Returns `(B, S, H)`, logits `(T, E)` in fp32.
    """
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    shared = block.shared_experts(x) if block.shared_experts is not None else None
    device_type = x.device.type if x.device.type != "mps" else "cpu"
    with torch.autocast(device_type=device_type, enabled=False):
        logits = block.gate(x.float())
        scores = F.softmax(logits, dim=1, dtype=torch.float)
        _, idx = torch.topk(block.moe_statics(scores), block.top_k, dim=-1)
        weights = torch.gather(scores, dim=-1, index=idx)
        weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=block.norm_min)
        weights = weights.to(x.dtype)
    routed = run_experts(x, idx, weights)
    if shared is not None:
        routed = routed + shared
    return routed.reshape(shape), logits


def hunyuan_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> Tensor:
    """HunYuan V1: shared MLP beside a renormalised softmax top-k; its gate takes `(B, S, H)`. Returns `(B, S, H)`."""
    shape = hidden_states.shape
    shared = block.shared_mlp(hidden_states)
    logits = block.gate(hidden_states)
    x = hidden_states.reshape(-1, shape[-1])
    idx, weights = _softmax_top_k(logits, block.top_k, True, x.dtype)
    return run_experts(x, idx, weights).reshape(shape) + shared


def deepseek_v2_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> Tensor:
    """DeepSeek-V2: the weighted sum in the weights' dtype, rounded to the experts' own output dtype.

    Returns `(B, S, H)`.
    """
    shape = hidden_states.shape
    idx, weights = block.gate(hidden_states)
    x = hidden_states.reshape(-1, shape[-1])
    routed = run_experts(x, idx, weights, accumulate_dtype=sum_dtype(weights.dtype)).to(linear_output_dtype(x))
    return routed.reshape(shape) + block.shared_experts(hidden_states)


def deepseek_v3_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> Tensor:
    """DeepSeek-V3, dots.llm1, GLM-4-MoE, GLM-4V-MoE: accumulation in the weights' dtype. Returns `(B, S, H)`."""
    shape = hidden_states.shape
    idx, weights = block.gate(hidden_states)
    x = hidden_states.reshape(-1, shape[-1])
    routed = run_experts(x, idx, weights, accumulate_dtype=weights.dtype).to(x.dtype)
    return routed.reshape(shape) + block.shared_experts(hidden_states)


def longcat_forward(block: Block, run_experts: RunExperts, hidden_states: Tensor) -> Tensor:
    """LongCat-Flash: indices past the MLP experts are identities, whose contribution is `w * x`. Returns `(B, S, H)`.

    `run_experts` sees the MLP experts alone: an identity's index becomes the index that means "no expert".
    """
    shape = hidden_states.shape
    num_experts = block.config.n_routed_experts
    idx, weights = block.router(hidden_states)
    x = hidden_states.reshape(-1, shape[-1])
    routed = run_experts(x, idx.clamp(max=num_experts), weights, accumulate_dtype=weights.dtype)
    identity = weights.masked_fill(idx < num_experts, 0).sum(dim=-1, keepdim=True)
    return (routed + x * identity).to(x.dtype).reshape(shape)

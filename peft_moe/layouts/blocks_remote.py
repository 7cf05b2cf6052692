"""Blocks of remote code in the DeepSeek lineage: DeepSeek-V3, Kimi (also its latent MoE), Bailing/Ling.

Their forward routes, hands `(tokens, expert indices, weights)` to `self.moe_infer`, and adds what surrounds it: latent
projections and a norm, shared experts, router logits in the result. `moe_infer` runs without gradients, and in training
mode the forward raises, forgets its result or loops over the experts. So the block's own forward is run as it is in
inference mode, on a stand-in for `self` whose `moe_infer` is `run_experts`: routing, surroundings and return contract
are the block's own by construction, and gradients flow.

That is right only while the forward does nothing else. `moe_infer_forward` is therefore offered (by
`is_moe_infer_block`) for blocks whose forward and `moe_infer` use no name outside a known vocabulary: an auxiliary
loss, a second router, a scale or a communication call of their own keeps them unknown.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .blocks_common import Block, linear_output_dtype, sum_dtype
from .blocks_experts import mlp_experts
from .blocks_gates import call_gate, code_names, plain_function
from .spec import RunExperts

_TENSOR_NAMES = frozenset(
    "shape size dtype device view reshape flatten unsqueeze to type sum contiguous len tuple list enumerate"
    " range".split()
)
#: Names that the forward of such a block uses, in inference and in training.
_FORWARD_NAMES = _TENSOR_NAMES | frozenset(
    "gate moe_infer training experts shared_experts config n_shared_experts num_shared_experts num_experts_per_tok"
    " top_k torch empty_like repeat_interleave NotImplementedError"
    " use_latent_moe latent_moe_use_norm routed_expert_down_proj routed_expert_norm routed_expert_up_proj".split()
)
#: Names that its `moe_infer` uses: sort the tokens by expert, run each expert, put back, weight, sum; and, behind
#: `ep_size > 1`, which `is_moe_infer_block` excludes, the exchange between ranks.
_INFER_NAMES = _TENSOR_NAMES | frozenset(
    "experts ep_rank ep_size experts_per_rank torch new_zeros zeros scatter_ argsort cpu numpy tolist item append cat"
    " new_empty empty_like mul_ mul long int32 np dist all_to_all_single all_to_all split no_grad".split()
)


def is_moe_infer_block(block: nn.Module) -> bool:
    """Whether `moe_infer_forward` computes what this block's forward means."""
    cls = type(block)
    forward, infer = plain_function(cls, "forward"), plain_function(cls, "moe_infer")
    gate = getattr(block, "gate", None)
    if forward is None or infer is None or not isinstance(gate, nn.Module):
        return False
    if _required_parameters(forward) != 2 or _required_parameters(infer) != 4 or _named_parameters(infer) != 4:
        return False
    forward_names, infer_names = code_names(forward.__code__), code_names(infer.__code__)
    return (
        {"gate", "moe_infer"} <= forward_names <= _FORWARD_NAMES
        and {"experts", "argsort"} <= infer_names <= _INFER_NAMES
        and getattr(block, "ep_size", 1) == 1
        and getattr(block, "ep_rank", 0) == 0
        and mlp_experts(getattr(block, "experts", None)) > 0
    )


def moe_infer_forward(block: nn.Module, run_experts: RunExperts, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward in inference mode, its experts run by `run_experts`, with gradients in any mode.

    Args: those of the block's forward, `(B, S, H)` hidden states first. Returns what the block returns.
    """
    return type(block).forward(_InferenceView(block, run_experts), *args, **kwargs)  # type: ignore[arg-type]


class _InferenceView:
    """`self` for the block's forward: never training, experts run by `run_experts`, everything else the block's."""

    training = False

    def __init__(self, block: Block, run_experts: RunExperts):
        self._block = block
        self._run_experts = run_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def gate(self, *args: Any, **kwargs: Any) -> Any:
        return call_gate(self._block.gate, *args, **kwargs)

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        """`(T, H)`, `(T, k)`, `(T, k)` -> `(T, H)` in the experts' output dtype, summed at least in fp32."""
        out = self._run_experts(x, topk_ids, topk_weight, accumulate_dtype=sum_dtype(topk_weight.dtype))
        return out.to(linear_output_dtype(x))


def _named_parameters(function: FunctionType) -> int:
    return len(inspect.signature(function).parameters)


def _required_parameters(function: FunctionType) -> int:
    """Number of positional parameters without a default, `self` included; -1 with keyword-only ones required."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return -1 if any(p.kind is p.KEYWORD_ONLY for p in required) else len(required)

"""How a base calls its experts: from the arguments of its forward to tokens, indices and weights, and back.

Each function is `(base, runner, *args, **kwargs)` with the arguments of the base's own forward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .spec import logical_shape


class Runner(Protocol):
    """What a layout may ask of the layer that adapts it."""

    def run_experts(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        accumulate_dtype: torch.dtype | None = None,
        copies: int = 1,
    ) -> Tensor:
        """See `layouts.spec.RunExperts`; `copies`: how often all tokens stand in x, one copy after the other."""

    def run_projection(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """`(S, in)` rows sorted by expert, `(E,)` int32 ends -> `(S, out)` of the module's only projection."""


def _experts(base: Any, name: str) -> int:
    shape = logical_shape(base, name)
    assert shape is not None
    return shape[0]


def tokens_index_weights(base: Any, runner: Runner, *args: Any, **kwargs: Any) -> Tensor:
    """`(hidden_states, top_k_index, top_k_weights)`, under any names; hidden states of 2 or 3 dimensions."""
    hidden, index, weights = _three(args, kwargs)
    if hidden.dim() == 2:
        return runner.run_experts(hidden, index, weights)
    out = runner.run_experts(hidden.reshape(-1, hidden.shape[-1]), index, weights)
    return out.view(hidden.shape)


def _three(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices and weights, told apart by kind: only indices are integers."""
    values = [*args, *kwargs.values()]
    if len(values) != 3 or not all(isinstance(value, Tensor) for value in values):
        raise TypeError(
            "the experts expect hidden states, expert indices and routing weights, found "
            f"{[type(value).__name__ for value in values]}"
        )
    hidden = kwargs.get("hidden_states", values[0])
    rest = [value for value in values if value is not hidden]
    integers = [value for value in rest if not value.is_floating_point()]
    floats = [value for value in rest if value.is_floating_point()]
    if len(integers) != 1 or len(floats) != 1:
        raise TypeError(
            f"the experts expect one integer and one floating tensor after the hidden states, found dtypes "
            f"{[value.dtype for value in rest]}"
        )
    return hidden, integers[0], floats[0]


def tokens_scattered_weights(base: Any, runner: Runner, *args: Any, **kwargs: Any) -> Tensor:
    """As above with weights `(T, E)`, zero where not chosen (stacked experts of transformers 4)."""
    hidden, index, weights = _three(args, kwargs)
    chosen = weights.gather(1, index.clamp(max=weights.shape[1] - 1))
    out = runner.run_experts(hidden.reshape(-1, hidden.shape[-1]), index, chosen)
    return out.view(hidden.shape[0], -1, hidden.shape[-1])


def dbrx_4(base: Any, runner: Runner, x: Tensor, weights: Tensor, top_weights: Tensor, top_experts: Tensor) -> Tensor:
    """DBRX of transformers 4: `weights` (all of them) is unused by the base too."""
    return runner.run_experts(x.reshape(-1, x.shape[-1]), top_experts, top_weights).view(x.shape)


def every_expert_dense(base: Any, runner: Runner, hidden_states: Tensor) -> Tensor:
    """Llama4: `(E * T, H)`, every expert's copy of all tokens, already multiplied by the router's scores."""
    experts = _experts(base, "gate_up_proj")
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    index = torch.arange(experts, device=rows.device).repeat_interleave(rows.shape[0] // experts).unsqueeze(-1)
    return runner.run_experts(rows, index, rows.new_ones(index.shape), copies=experts)


def identity_experts(
    base: Any, runner: Runner, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """LongcatFlash: indices past the routed experts mean the identity, `w * x`."""
    experts = _experts(base, "down_proj")
    is_identity = top_k_index >= experts
    index = torch.where(is_identity, experts, top_k_index)
    out = runner.run_experts(hidden_states, index, top_k_weights)
    kept = torch.where(is_identity, top_k_weights, 0).sum(dim=-1, keepdim=True)
    return out + (hidden_states * kept).to(out.dtype)


def sorted_rows(base: Any, runner: Runner, rows: Tensor, counts: Any) -> Tensor:
    """Parallel linears: rows sorted by expert and how many each expert has (a list, or a tensor)."""
    counts = torch.as_tensor(counts, device=rows.device)
    return runner.run_projection(rows, counts.cumsum(0).to(torch.int32))

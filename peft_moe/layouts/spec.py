"""How a base model holds its experts, as data.

A layout describes one experts module by an `ExpertsSpec`; the rest of the package reads only that. Orientation, bias,
interleaving and the way the base calls its experts end here: adapters always see `(E, out, in)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.activation import GatedSwish

TARGETS = ("gate_up_proj", "down_proj")


def logical_shape(module: Any, path: str) -> tuple[int, ...] | None:
    """The shape of the parameter at a dotted path below a module; `None` if there is none.

    Of packed parameters the shape that was packed: their module keeps a record of it, or they themselves do.
    """
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner) if owner else module
    parameter = getattr(holder, name, None)
    packed = getattr(holder, "packed_weights", {}).get(name) or getattr(parameter, "quant_state", None)
    if not isinstance(parameter, Tensor):
        return None
    return tuple(parameter.shape if packed is None else packed.shape)


class RunExperts(Protocol):
    """The routed experts as a function, which a layout calls with what the base's router decided."""

    def __call__(
        self, x: Tensor, index: Tensor, weights: Tensor, accumulate_dtype: torch.dtype | None = None
    ) -> Tensor:
        """`(T, H)`, `(T, k)` indices (`num_experts`: none), `(T, k)` weights -> `(T, H)` in `accumulate_dtype`."""


@dataclass(frozen=True)
class Part:
    """One tensor of the base that holds some rows of a projection.

    Attributes:
        path: dotted name below the experts module; for a list of expert modules, below each of them.
        transposed: held as `(in, out)` instead of `(out, in)`.
        flat: all experts in one matrix `(E * out, in)`; with `transposed`, `(E * in, out)`.
    """

    path: str
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True)
class ProjectionSpec:
    """One projection of all experts.

    Attributes:
        name: its key in the adapter: `gate_up_proj`, `up_proj` (experts without a gate) or `down_proj`.
        target: the name by which `target_experts` selects it, one of `TARGETS`.
        out_features, in_features: of one expert.
        parts: the tensors of the base, whose rows follow each other.
        bias: dotted names of the biases, one a part; empty: none.
        gate: how gate and up rows lie in the output: "concatenated", "interleaved", or `None` without a gate.
    """

    name: str
    target: str
    out_features: int
    in_features: int
    parts: tuple[Part, ...]
    bias: tuple[str, ...] = ()
    gate: str | None = None

    def gate_rows(self, up: bool) -> slice:
        """The rows of the gate (or of up) in the output of this projection."""
        if self.gate == "interleaved":
            return slice(int(up), None, 2)
        half = self.out_features // 2
        return slice(half, None) if up else slice(0, half)


@dataclass(frozen=True)
class ExpertsSpec:
    """One experts module.

    Attributes:
        num_experts: E, from shapes.
        projections: in the order in which data passes them; all of them, or one where the base calls them singly.
        call: `(base, runner, *args, **kwargs)`, the forward of stacked experts, see `layouts.calls`. `None`, and no
            `block_forward`: the base runs itself and each expert's linears are adapted one by one.
        activation: `(base, pre) -> hidden`, between the two projections; `None`: there is only one.
        closed_form: the activation as `ops.activation` knows it, if it has one there.
        post_norm: name of a norm on each expert's output, before the routing weight.
        experts: names of the expert modules where the base is a list of modules; empty for stacked parameters.
        block_forward: `(block, run, *args, **kwargs)`, the forward of the block around a list of expert modules with
            its experts replaced by `run`; `None` for stacked experts and unknown blocks.
        sentinels: whether indices `>= num_experts` occur in normal use.
        compute_dtype: dtype in which the base multiplies, where it is not that of its weights.
        refused: why this module cannot be adapted; `None` if it can.
    """

    num_experts: int
    projections: tuple[ProjectionSpec, ...]
    call: Callable[..., Any] | None
    activation: Callable[[Any, Tensor], Tensor] | None = None
    closed_form: GatedSwish | None = None
    post_norm: str | None = None
    experts: tuple[str, ...] = ()
    block_forward: Callable[..., Any] | None = None
    sentinels: bool = False
    compute_dtype: torch.dtype | None = None
    refused: str | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether the base runs itself, its linears adapted one by one."""
        return self.call is None and self.block_forward is None

    def projection(self, name: str) -> ProjectionSpec:
        """The projection with this key. Raises `KeyError`."""
        for projection in self.projections:
            if projection.name == name:
                return projection
        raise KeyError(name)

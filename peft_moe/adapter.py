"""The parameters of the adapters of one projection, and the factors the ops multiply with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compat import BaseTunerLayer
from .layouts import ExpertsSpec, ProjectionSpec
from .ops.backends import padded_rank
from .settings import AdapterSettings


class ProjectionAdapter(nn.Module, BaseTunerLayer):
    """The parameters of all adapters on one projection (or on its gate or up half).

    Shapes: see `AdapterSettings.shapes`.
    The layer that holds it computes; this module only keeps the parameters where PEFT looks for them.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    other_param_names = ()
    weight = bias = None  # the base's are with the layer that holds this module

    def __init__(self, merged_adapters: list[str]) -> None:
        nn.Module.__init__(self)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters = merged_adapters  # the layer's own list, so that PEFT's status agrees

    def factors(self) -> list[nn.Parameter]:
        """All parameters; `parameters()` walks all modules by name, which costs more than a kernel on a small batch."""
        found: list[Any] = []
        for child in self._modules.values():
            found += child._parameters.values()  # type: ignore[union-attr]
        return [factor for factor in found if factor is not None]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the layer that holds this module merges all its projections together."""

    def unmerge(self) -> None:
        """Nothing: see `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the layer that holds this module moves it."""

    def extra_repr(self) -> str:
        shapes = (f"{name}: A {tuple(a.shape)}, B {tuple(self.lora_B[name].shape)}" for name, a in self.lora_A.items())
        return "; ".join(shapes)


def pad(packed: Tensor, settings: AdapterSettings) -> Tensor:
    """`(sum of r, N)` of ragged experts -> `(E', rank, N)`, zeros beyond each expert's rank. Differentiable."""
    zeros = packed.new_zeros(len(settings.ranks) * settings.rank, packed.shape[1])
    filled = zeros.index_copy(0, settings.constant("rows", packed.device), packed)
    return filled.view(len(settings.ranks), settings.rank, packed.shape[1])


def pack(padded: Tensor, settings: AdapterSettings) -> Tensor:
    """`(E', rank, N)` -> `(sum of r, N)`: the inverse of `pad`."""
    return padded.flatten(0, 1)[settings.constant("rows", padded.device)]


def _parameter(parameters: nn.ParameterDict, name: str) -> Tensor:
    """`parameters[name]`, which asks three times over and costs as much as a kernel launch.

    By item, as `nn.Module` asks: DeepSpeed's ZeRO-3 has a dict there that gathers what is asked for.
    """
    held: dict[str, Any] = parameters._parameters
    return held[name] if name in held else parameters[name]


def slot_factors(
    adapter: ProjectionAdapter,
    name: str,
    settings: AdapterSettings,
    scaling: float | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A `(E', r, in)` and B `(E', out, r)` of one slot, shared factors expanded, the scaling folded into B.

    Args:
        scaling: the nominal one of the adapter; that of each expert is relative to it. `None`: nothing is folded in.
        dtype: in which to scale, so that a 16-bit B is not rounded once more; `None`: that of the parameters.
    """
    a, b = _parameter(adapter.lora_A, name), _parameter(adapter.lora_B, name)
    if dtype is not None:
        a, b = a.to(dtype), b.to(dtype)
    if settings.ragged:
        a, b = pad(a, settings), pad(b, settings).transpose(1, 2)
    elif settings.share_experts is not None:
        experts = max(a.shape[0], b.shape[0], len(settings.ranks))
        a, b = (factor if factor.shape[0] == experts else factor.expand(experts, -1, -1) for factor in (a, b))
    if scaling is None:
        return a, b
    nominal: Any = scaling * settings.factor  # a tensor once PEFT prepared the model for compiled hot-swapping
    if isinstance(nominal, Tensor) or nominal != 1.0:
        b = b * nominal
    if settings.scaling is not None:
        b = b * settings.constant("scaling", b.device)
    return a, b


def factors(
    adapters: dict[str, ProjectionAdapter],
    name: str,
    settings: AdapterSettings,
    scaling: float | None,
    projection: ProjectionSpec,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A `(E', r', in)` and B `(E', out, r')` of one projection; r' is 2r where gate and up have an A each."""
    slots = settings.slots(projection)
    pairs = [slot_factors(adapters[slot], name, settings, scaling, dtype) for slot in slots]
    if len(pairs) == 1:
        return pairs[0]
    (gate_a, gate_b), (up_a, up_b) = pairs
    gate_rows = torch.cat((gate_b, torch.zeros_like(gate_b)), dim=2)
    up_rows = torch.cat((torch.zeros_like(up_b), up_b), dim=2)
    if projection.gate == "interleaved":
        b = torch.stack((gate_rows, up_rows), dim=2).flatten(1, 2)
    else:
        b = torch.cat((gate_rows, up_rows), dim=1)
    return torch.cat((gate_a, up_a), dim=1), b


def for_ops(
    a: Tensor, b: Tensor, settings: AdapterSettings, spec: ExpertsSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Factors of the adapted experts -> of all experts, in the compute dtype: zeros where an expert has no adapter."""
    a, b = a.to(dtype), b.to(dtype)
    if settings.experts is not None:
        index = settings.constant("experts", a.device)
        a = a.new_zeros(spec.num_experts, *a.shape[1:]).index_copy(0, index, a)
        b = b.new_zeros(spec.num_experts, *b.shape[1:]).index_copy(0, index, b)
    return a, b


def join_and_pad(pairs: list[tuple[Tensor, Tensor]], backend: str) -> tuple[Tensor, Tensor]:
    """Several adapters as one: ranks side by side, zero-padded to what the backend can address."""
    a = pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs], dim=1)
    b = pairs[0][1] if len(pairs) == 1 else torch.cat([b for _, b in pairs], dim=2)
    missing = padded_rank(a.shape[1], a.dtype, backend) - a.shape[1]
    if missing:
        a = nn.functional.pad(a, (0, 0, 0, missing))
        b = nn.functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous()


def magnitude(
    adapters: dict[str, ProjectionAdapter], name: str, settings: AdapterSettings, projection: ProjectionSpec
) -> Tensor:
    """DoRA's magnitudes `(E', out)` of one projection."""
    slots = settings.slots(projection)
    parts = [adapters[slot].lora_magnitude_vector[name] for slot in slots]
    if len(parts) == 1:
        return parts[0]
    if projection.gate == "interleaved":
        return torch.stack(parts, dim=2).flatten(1, 2)
    return torch.cat(parts, dim=1)

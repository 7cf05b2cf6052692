"""Dense deltas of adapters, read from the parameters by name.

`W + sum of scaling * B A` written into a copy of the base is the reference of these tests: it shares no code with the
package.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import first_floating
from tests.zoo.views import weight_views

#: (path of the experts module, "up" or "down") -> `(E, out, in)` float64
Deltas = dict[tuple[str, str], Tensor]


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """The first floating output of a model."""
    return first_floating(model(**inputs, **options))


@torch.no_grad()
def randomise(model: nn.Module, adapter: str, seed: int = 0, scale: float = 0.5) -> None:
    """Give every factor of an adapter, on experts and on linears, normal values."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.removesuffix(".weight").endswith((f".lora_A.{adapter}", f".lora_B.{adapter}")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def deltas(
    model: nn.Module,
    adapter: str,
    scaling: float | Sequence[float],
    experts: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    num_experts: int = 4,
    ranks: Sequence[int] | None = None,
) -> Deltas:
    """`scaling * B A` of every experts module that an adapter is on.

    scaling: of all adapted experts, or one each. experts: the adapted ones, of all layers or by layer; `None`: all.
    ranks: of the adapted experts where they differ: the rows of A `(sum of r, in)` and B `(sum of r, out)` follow
    each other.
    """
    parameters = dict(model.named_parameters())
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, a in parameters.items():
        path, _, name = key.removeprefix("base_model.model.").rpartition(".lora_A.")
        owner, _, slot = path.rpartition(".")
        if name != adapter:
            continue
        b = parameters[key.replace(".lora_A.", ".lora_B.")]
        if ranks is None:
            count = max(a.shape[0], b.shape[0])
            products = b.detach().double() @ a.detach().double()  # a factor that all experts share is broadcast
        else:
            count = len(ranks)
            pairs = zip(b.detach().double().split(list(ranks)), a.detach().double().split(list(ranks)), strict=True)
            products = torch.stack([rows_b.T @ rows_a for rows_b, rows_a in pairs])
        if isinstance(experts, Mapping):
            chosen = list(experts[next(int(part) for part in owner.split(".") if part.isdigit())])
        else:
            chosen = list(range(num_experts) if experts is None else experts)
        assert len(chosen) == count, key
        scales = torch.as_tensor(scaling, dtype=torch.float64).expand(count)[:, None, None]
        out = torch.zeros(num_experts, *products.shape[1:], dtype=torch.float64)
        out[chosen] = scales * products
        found.setdefault((owner, "down" if slot == "down_proj" else "up"), {})[slot] = out
    joined = {}
    for where, slots in found.items():
        pair = [slots[slot] for slot in ("gate_proj", "up_proj") if slot in slots]
        joined[where] = torch.cat(pair, dim=1) if len(pair) == 2 else next(iter(slots.values()))
    return joined


def add(*many: Deltas) -> Deltas:
    """The sum of several adapters' deltas."""
    total: Deltas = {}
    for one in many:
        for where, value in one.items():
            total[where] = total[where] + value if where in total else value
    return total


@torch.no_grad()
def with_deltas(base: nn.Module, written: Deltas) -> nn.Module:
    """A copy of a base model with deltas added to its experts."""
    reference = copy.deepcopy(base)
    for (owner, projection), value in written.items():
        rows = weight_views(reference.get_submodule(owner), 64)["down_proj" if projection == "down" else "gate_up_proj"]
        for expert, parts in enumerate(rows[: value.shape[0]]):
            for part, change in zip(parts, value[expert].split([part.shape[0] for part in parts]), strict=True):
                part += change.to(part.dtype)
    return reference

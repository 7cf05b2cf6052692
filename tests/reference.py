"""A reference for adapted models that shares no code with the package: the base model with the deltas written in.

The expected output is that of the base's own forward on changed weights; the expected gradients of A and B follow by
the chain rule from the dense weight gradients that the base's own backward gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.views import weight_views

SLOTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class Factors:
    """One projection of one experts module: A (E, r, in), B (E, out, r), and where its weights lie in the reference."""

    key: str
    a: Tensor
    b: Tensor
    rows: list[list[Tensor]]


def adapter_factors(model: nn.Module, reference: nn.Module, adapter: str = "default") -> list[Factors]:
    """The factors of every expert projection of a PEFT model, matched to the weights of the reference by name."""
    parameters = dict(model.named_parameters())
    found = []
    for key, a in parameters.items():
        module_name, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_A.")
        owner, _, slot = module_name.rpartition(".")
        if rest != adapter or slot not in SLOTS:
            continue
        b = parameters[key.replace("lora_A", "lora_B")]
        hidden = b.shape[1] if slot == "down_proj" else a.shape[2]
        views = weight_views(reference.get_submodule(owner), hidden)
        where = "weight" if "weight" in views else ("down_proj" if slot == "down_proj" else "gate_up_proj")
        rows = views[where]
        if where == "weight" and rows[0][0].shape[1] != a.shape[2]:  # a parallel linear held (in, out)
            rows = [[part.T for part in parts] for parts in rows]
        found.append(Factors(key, a, b, rows))
    return found


def write_deltas(factors: list[Factors], scaling: float) -> None:
    """Add scaling * B A to the reference's weights."""
    with torch.no_grad():
        for one in factors:
            for expert, parts in enumerate(one.rows[: one.a.shape[0]]):
                delta = scaling * one.b[expert].double() @ one.a[expert].double()
                for part, rows in zip(parts, delta.split([part.shape[0] for part in parts]), strict=True):
                    part += rows.to(part.dtype)


def expected_gradients(factors: list[Factors], dense: dict[int, Tensor], scaling: float) -> list[tuple[Tensor, Tensor]]:
    """(dA, dB) of each projection. dense: for every storage of the reference (by data_ptr) its gradient tensor."""
    found = []
    for one in factors:
        d_a, d_b = torch.zeros_like(one.a, dtype=torch.float64), torch.zeros_like(one.b, dtype=torch.float64)
        for expert, parts in enumerate(one.rows[: one.a.shape[0]]):
            grad = torch.cat([_same_view(part, dense) for part in parts]).double()
            d_a[expert] = scaling * one.b[expert].double().T @ grad
            d_b[expert] = scaling * grad @ one.a[expert].double().T
        found.append((d_a, d_b))
    return found


def _same_view(view: Tensor, dense: dict[int, Tensor]) -> Tensor:
    """The part of a gradient that lies where `view` lies in its parameter."""
    grad = dense[view.untyped_storage().data_ptr()]
    return grad.as_strided(view.shape, view.stride(), view.storage_offset())


def dense_gradients(reference: nn.Module) -> dict[int, Tensor]:
    """Storage of each parameter -> its gradient, zeros where it got none; the same strides as the parameter."""
    found = {}
    for parameter in reference.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[parameter.untyped_storage().data_ptr()] = grad.contiguous()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, both in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))

"""The adapted model written out densely: the base's own forward on weights that are a function of the adapter.

Every expert's weight is computed in float64 from the adapter's parameters, one expert at a time, and handed to the base
through `torch.func.functional_call`, so that autograd gives the gradients of whatever parametrisation is tried. Nothing
of the package is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import relative
from tests.zoo import first_floating

PREFIX = "base_model.model."
FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")


@dataclass
class Options:
    """What the adapter was asked to be.

    scaling: of an expert, given the layer and its number. experts: the adapted ones of a layer, `None` for all.
    ranks: of the adapted experts of a layer where they differ (their rows then follow each other), else `None`.
    """

    scaling: Callable[[int, int], float] = lambda layer, expert: 2.0
    experts: Callable[[int], Sequence[int] | None] = lambda layer: None
    ranks: Callable[[int], Sequence[int] | None] = lambda layer: None
    dora: bool = False


def layer_of(owner: str) -> int:
    """`model.layers.3.mlp.experts` -> 3."""
    return next(int(part) for part in owner.split(".") if part.isdigit())


def adapter_keys(model: nn.Module) -> dict[tuple[str, str], dict[str, str]]:
    """(experts module, slot) -> {factor: key} of a model with one adapter, `default`, on its experts."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key, _ in model.named_parameters():
        parts = key.removeprefix(PREFIX).split(".")
        if len(parts) > 3 and parts[-1] == "default" and parts[-2] in FACTORS and parts[-4] == "experts":
            found.setdefault((".".join(parts[:-3]), parts[-3]), {})[parts[-2]] = key
    return found


def split_by_expert(a: Tensor, b: Tensor, ranks: Sequence[int] | None, count: int) -> list[tuple[Tensor, Tensor]]:
    """(A (r, in), B (out, r)) of every adapted expert."""
    if ranks is not None:
        return [(x, y.T) for x, y in zip(a.split(list(ranks)), b.split(list(ranks)), strict=True)]
    return [(a[e if len(a) > 1 else 0], b[e if len(b) > 1 else 0]) for e in range(count)]


class Dense:
    """The base with the adapter of `model` written in, differentiable in the adapter's parameters.

    base: the model before it was adapted, any dtype; a float64 copy is kept. `leaves`: key -> float64 leaf.
    `weights`: name of a base parameter -> its float64 value with the adapter.
    """

    def __init__(self, base: nn.Module, model: nn.Module, options: Options | None = None) -> None:
        self.base, self.options = copy.deepcopy(base).double(), options or Options()
        self.base.config._experts_implementation = "eager"  # of transformers 5: a loop, which knows float64
        parameters = dict(model.named_parameters())
        self.keys = adapter_keys(model)
        assert self.keys, "no adapter on any expert"
        self.leaves = {
            key: parameters[key].detach().clone().double().requires_grad_()
            for keys in self.keys.values()
            for key in keys.values()
        }
        self.weights: dict[str, Tensor] = {}
        for owner in {owner for owner, _ in self.keys}:
            for slot in ("gate_up_proj", "down_proj"):
                self._write(owner, slot)

    def _names(self, owner: str, slot: str, expert: int) -> list[str]:
        """The base parameters that hold one expert of a list; empty for stacked experts."""
        if not isinstance(self.base.get_submodule(owner), nn.ModuleList):
            return []
        parts = ("gate_proj", "up_proj") if slot == "gate_up_proj" else ("down_proj",)
        return [f"{owner}.{expert}.{part}.weight" for part in parts]

    def _transposed(self, owner: str) -> bool:
        return type(self.base.get_submodule(owner)).__name__ == "GptOssExperts"

    def _write(self, owner: str, slot: str) -> None:
        parameters = dict(self.base.named_parameters())
        stack = parameters.get(f"{owner}.{slot}")
        if stack is None:
            count = len(self.base.get_submodule(owner))
            old = [torch.cat([parameters[name] for name in self._names(owner, slot, e)]) for e in range(count)]
        else:
            old = [one.T if self._transposed(owner) else one for one in stack]
        new = [self._expert(owner, slot, expert, weight.detach()) for expert, weight in enumerate(old)]
        if stack is not None:
            self.weights[f"{owner}.{slot}"] = torch.stack([one.T if self._transposed(owner) else one for one in new])
            return
        for expert, weight in enumerate(new):
            names = self._names(owner, slot, expert)
            self.weights.update(zip(names, weight.chunk(len(names)), strict=True))

    def _expert(self, owner: str, slot: str, expert: int, weight: Tensor) -> Tensor:
        """One expert's (out, in) weight with the adapter."""
        halves = [(slot, slice(None))]
        if (owner, "gate_proj") in self.keys and slot == "gate_up_proj":
            half, both = weight.shape[0] // 2, self._transposed(owner)  # GPT-OSS alternates gate and up
            halves = [
                ("gate_proj", slice(0, None, 2) if both else slice(0, half)),
                ("up_proj", slice(1, None, 2) if both else slice(half, None)),
            ]
        weight = weight.clone()
        for name, rows in halves:
            if (owner, name) in self.keys:
                weight[rows] = self._adapted(owner, name, expert, weight[rows].clone())
        return weight

    def _adapted(self, owner: str, slot: str, expert: int, weight: Tensor) -> Tensor:
        layer, factors = layer_of(owner), self.keys[owner, slot]
        chosen = self.options.experts(layer)
        chosen = range(self.expert_count(owner)) if chosen is None else list(chosen)
        if expert not in chosen:
            return weight
        position = list(chosen).index(expert)
        pairs = split_by_expert(
            self.leaves[factors["lora_A"]], self.leaves[factors["lora_B"]], self.options.ranks(layer), len(chosen)
        )
        a, b = pairs[position]
        changed = weight + self.options.scaling(layer, expert) * b @ a
        if not self.options.dora:
            return changed
        norms = torch.stack([row.norm() for row in changed.detach()])
        return changed * (self.leaves[factors["lora_magnitude_vector"]][position] / norms)[:, None]

    def expert_count(self, owner: str) -> int:
        """E of an experts module."""
        module = self.base.get_submodule(owner)
        return len(module) if isinstance(module, nn.ModuleList) else len(module.down_proj)

    def output(self, inputs: Mapping[str, Any]) -> Tensor:
        """The first floating output of the base with the adapter."""
        return first_floating(functional_call(self.base, self.weights, kwargs=dict(inputs)))

    def gradients(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Key -> gradient of `objective`."""
        grads = torch.autograd.grad(objective(self.output(inputs)), list(self.leaves.values()))
        return dict(zip(self.leaves, grads, strict=True))


def objective(output: Tensor) -> Tensor:
    """A fixed random projection of a model's output, in float64."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (output.double() * direction).sum() / output.numel() ** 0.5


def gradients(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Key -> gradient of `objective` of every trainable parameter, from a backward of the model itself."""
    model.zero_grad()
    objective(first_floating(model(**inputs))).backward()
    return {key: one.grad.detach().clone() for key, one in model.named_parameters() if one.grad is not None}


def assert_matches(model: nn.Module, dense: Dense, inputs: Mapping[str, Any], close: float = 2e-5) -> None:
    """Output, gradients, merged weights and the base after unmerging are those of `dense`. float32 models."""
    expected = dense.output(inputs).detach()
    with torch.no_grad():
        assert relative(first_floating(dense.base(**inputs)), expected) > 1e-3, "the adapter does nothing"
        assert relative(first_floating(model(**inputs)), expected) < close
    found = gradients(model, inputs)
    wanted = dense.gradients(inputs)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert gradient.any(), key
        assert relative(found[key], gradient) < 50 * close, key

    bytes_before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    merged = {key.replace(".base_layer", "").removeprefix(PREFIX): value for key, value in model.named_parameters()}
    for name, weight in dense.weights.items():
        assert relative(merged[name], weight) < 1e-6, name
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), expected) < close
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, bytes_before[key]), key

"""Frozen models with lists of experts, and whether their experts run grouped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peft_moe.frozen import FrozenExperts
from tests.model.tiny import BUILDERS, text

FOUR = int(transformers.__version__.split(".")[0]) < 5
#: A model with a list of experts whose own forward can train.
LIST = "qwen3_moe" if FOUR else "bailing"
#: And one with stacked experts, where transformers has it.
MODELS = [LIST] if FOUR else [LIST, "qwen3_moe"]


def build(name: str = LIST) -> nn.Module:
    """Frozen; in training mode where a block gives no gradients in the other."""
    if name == "bailing":
        from tests.weights.quantized import _list

        return _list().requires_grad_(False).train()
    return BUILDERS[name]().requires_grad_(False)


def inputs(model: nn.Module) -> dict[str, Any]:
    return {**text(model), "use_cache": False} if model.config.model_type == "qwen3_moe" else text(model)


def output(model: nn.Module, **options: Any) -> Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model(**inputs(base), **options).logits


@contextmanager
def counted() -> Iterator[list[str]]:
    """The paths of the experts that run grouped within the block, call by call."""
    calls: list[str] = []
    original = FrozenExperts.run_experts

    def run_experts(self: FrozenExperts, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self.name)
        return original(self, *args, **kwargs)

    FrozenExperts.run_experts = run_experts  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        FrozenExperts.run_experts = original  # type: ignore[method-assign]


def calls_of(model: nn.Module, **options: Any) -> tuple[Tensor, int]:
    """(output, how many blocks ran grouped)."""
    with counted() as calls:
        return output(model, **options), len(calls)


def blocks(model: nn.Module) -> int:
    return sum(1 for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts")


def pair(name: str = LIST) -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    model = build(name)
    return model, copy.deepcopy(model)


def first_block(model: nn.Module) -> Any:
    path = next(name for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts")
    return model.get_submodule(path.rpartition(".")[0])


def lists_share_storage(model: nn.Module) -> bool:
    """Whether the weights of the first block's experts lie one after the other."""
    weights = [p for p in first_block(model).experts.parameters()]
    ends = [p.data_ptr() + p.numel() * p.element_size() for p in weights]
    return any(end == following.data_ptr() for end, following in zip(ends, weights[1:], strict=False))


def with_embeddings(model: nn.Module) -> nn.Module:
    """Let gradients flow: the embeddings train."""
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def gradient(model: nn.Module, result: Tensor) -> Tensor:
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    (result.float() * direction).mean().backward()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_input_embeddings().weight.grad.clone()


def expert_linear(model: nn.Module) -> Any:
    """The first linear of the second expert of the first block."""
    return next(one for one in first_block(model).experts[1].modules() if isinstance(one, nn.Linear))

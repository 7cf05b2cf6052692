"""What changed since the last call, seen when a graph is traced: no call before it looks at the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_moe import attached, disable_grouped_experts, enable_grouped_experts
from tests.grouped.cases import FOUR, calls_of, counted, first_block, inputs, output, pair, with_embeddings

NATIVE = "qwen3_moe"  # the block of remote code does not compile whole


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def experts_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, one) for name, one in model.named_parameters() if ".experts." in name]


def adapter(model: nn.Module) -> PeftModel:
    """Of one expert's linear, or of stacked experts; the modules are changed in place."""
    target = {"target_modules": ["experts.1.gate_proj"]} if FOUR else {"target_parameters": ["experts.gate_up_proj"]}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **{"target_modules": [], **target}))


def other_parameters(model: nn.Module) -> None:
    for name, old in experts_of(model):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(old.detach() * 2, requires_grad=False))


def other_memory(model: nn.Module) -> None:
    for _, one in experts_of(model):
        one.data = one.data * 2


def other_dtype(model: nn.Module) -> None:
    model.bfloat16()


def compiled(model: nn.Module) -> Tensor:
    return torch.compile(model, backend="aot_eager")(**inputs(model)).logits


@pytest.mark.parametrize("change", [adapter, other_parameters, other_memory, other_dtype])
def test_a_change_just_before_compiling(change: Callable[[nn.Module], object]) -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    before = output(model)
    change(model), change(reference)
    found, expected = compiled(model), output(reference)
    close = {"rtol": 2e-2, "atol": 2e-2} if change is other_dtype else {"rtol": 1e-5, "atol": 1e-5}
    assert found.dtype == expected.dtype
    assert_close(found, expected, **close)
    if change is not other_dtype:
        assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3), "a change that can be told"


def test_an_adapter_that_comes_and_goes_after_compiling() -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    run = torch.compile(model, backend="aot_eager")
    before = output(reference)
    assert_close(run(**inputs(model)).logits, before, rtol=1e-5, atol=1e-5)
    adapted = [adapter(one) for one in (model, reference)]
    expected = output(reference)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3), "a change that can be told"
    assert_close(run(**inputs(model)).logits, expected, rtol=1e-5, atol=1e-5)
    for one in adapted:
        one.unload()
    assert_close(run(**inputs(model)).logits, before, rtol=1e-5, atol=1e-5)
    state = attached.state
    disable_grouped_experts(model)
    assert attached._hook is None
    adapter(model)
    assert attached.state == state


def test_weights_unfrozen_just_before_compiling() -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    output(model)
    grads = []
    for one, run in ((model, compiled), (reference, output)):
        weight = experts_of(with_embeddings(one))[-1][1].requires_grad_(True)
        run(one).square().sum().backward()
        assert weight.grad is not None and weight.grad.any()
        grads.append(weight.grad)
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_compiled_model_follows_disable_and_writes() -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    run = torch.compile(model, backend="aot_eager")
    run(**inputs(model))
    with torch.no_grad():
        for one in (model, reference):
            for _, weight in experts_of(one):
                weight.mul_(2)
    assert_close(run(**inputs(model)).logits, output(reference), rtol=1e-5, atol=1e-5)
    disable_grouped_experts(model)
    with counted() as calls:
        assert_close(run(**inputs(model)).logits, output(reference), rtol=1e-5, atol=1e-5)
    assert not calls and calls_of(model)[1] == 0


def test_the_environment_turns_it_off_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    monkeypatch.setenv("PEFT_MOE_GROUPED", "0")
    with counted() as calls:
        assert_close(compiled(model), output(reference), rtol=1e-5, atol=1e-5)
    assert not calls


class Only(nn.Module):
    """The hidden states that a block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        found = self.block(x)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """Without Dynamo there are no weights to look at, only fakes of them."""
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    x = torch.randn(1, 5, model.config.hidden_size)
    program = torch.export.export(Only(first_block(model)), (x,), strict=strict)
    assert_close(program.module()(x), Only(first_block(reference))(x), rtol=1e-5, atol=1e-5)

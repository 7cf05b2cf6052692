"""What grouped frozen experts must notice, at every call, and give way to."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_model
from torch import nn
from torch.testing import assert_close

from peft_moe import BnbExpertsConfig, disable_grouped_experts, enable_grouped_experts, grouped, quantize_experts
from peft_moe.grouped import GroupedForward
from tests.grouped.cases import (
    LIST,
    MODELS,
    blocks,
    build,
    calls_of,
    expert_linear,
    first_block,
    gradient,
    lists_share_storage,
    output,
    pair,
    with_embeddings,
)

close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    grouped._said.clear()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "peft_moe"]


@pytest.mark.parametrize("name", MODELS)
def test_enable_and_disable(name: str) -> None:
    model, reference = pair(name)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    names = [key for key, _ in model.named_parameters()]
    report = enable_grouped_experts(model)
    assert len(report.grouped) == blocks(model) and all(one.new for one in report.blocks)
    assert f"{blocks(model)} of {blocks(model)} blocks" in str(report)
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(reference), **close)
    again = enable_grouped_experts(model)
    assert again.grouped == report.grouped and not any(one.new for one in again.blocks)
    assert calls_of(model)[1] == blocks(model)
    assert [key for key, _ in model.named_parameters()] == names
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert sorted(disable_grouped_experts(model)) == sorted(report.grouped)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert not lists_share_storage(model)
    found, calls = calls_of(model)
    assert calls == 0 and torch.equal(found, output(reference))
    assert disable_grouped_experts(model) == []


def test_a_forward_that_came_later_is_left_alone() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    block = first_block(model)
    ours = block.forward
    seen = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return ours(*args, **kwargs)

    block.forward = theirs
    assert calls_of(model)[1] == blocks(model)
    seen.clear()
    assert len(disable_grouped_experts(model)) == blocks(model)
    assert block.forward is theirs
    found, calls = calls_of(model)
    assert seen and calls == 0 and not lists_share_storage(model), "theirs calls ours, which passes on"
    assert_close(found, output(reference), **close)
    block.forward = ours  # as who patched it puts it back
    assert calls_of(model)[1] == 0
    assert len(enable_grouped_experts(model).grouped) == blocks(model)
    assert calls_of(model)[1] == blocks(model)


def test_a_forward_that_came_first_is_left_alone() -> None:
    model = build()
    block = first_block(model)
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    report = enable_grouped_experts(model)
    assert "replaced by someone else" in next(iter(report.left_alone.values()))
    assert len(report.grouped) == blocks(model) - 1


def test_an_expert_adapter_that_comes_later_is_not_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """On one projection of one expert, and gone again."""
    model, reference = pair()
    enable_grouped_experts(model)
    before = output(model)
    path = next(n for n, one in model.named_modules() if one is expert_linear(model))
    config = LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
    adapted, expected = [(torch.manual_seed(1), get_peft_model(one, config))[1] for one in (model, reference)]
    with caplog.at_level(logging.WARNING, "peft_moe"):
        found, calls = calls_of(adapted)
        calls_of(adapted)
    assert calls == blocks(model) - 1
    assert_close(found, output(expected), **close)
    assert not torch.allclose(found, before, **close)
    assert len([one for one in messages(caplog) if "carries an adapter" in one]) == 1
    report = enable_grouped_experts(adapted)
    assert len(report.left_alone) == 1 and "carries an adapter" in next(iter(report.left_alone.values()))
    unloaded = adapted.unload()
    found, calls = calls_of(unloaded)
    assert calls == blocks(model)
    assert_close(found, before, **close)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_unfrozen_get_their_gradients(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, reference = pair(name)
    enable_grouped_experts(model)
    output(model)
    for one in (model, reference):
        last = [p for key, p in one.named_parameters() if ".experts." in key][-1]
        last.requires_grad_(True)
        with_embeddings(one)
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1
    assert_close(gradient(model, found), gradient(reference, output(reference)), **close)
    trained = [p.grad for key, p in model.named_parameters() if ".experts." in key][-1]
    expected = [p.grad for key, p in reference.named_parameters() if ".experts." in key][-1]
    assert_close(trained, expected, **close)
    with torch.no_grad():
        assert calls_of(model)[1] == blocks(model), "without gradients it runs grouped"
    model.requires_grad_(False)
    assert calls_of(model)[1] == blocks(model)
    assert [one for one in messages(caplog) if "require gradients" in one]


def test_another_parameter_in_the_place_of_one() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    for one in (model, reference):
        linear = expert_linear(one)
        linear.weight = nn.Parameter(linear.weight.detach() * 3, requires_grad=False)
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(reference), **close)


def test_weights_written_and_moved() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    for one in (model, reference):
        one.load_state_dict({key: value * 1.1 for key, value in one.state_dict().items()})
    assert_close(output(model), output(reference), **close)
    model.double(), reference.double()
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(reference), rtol=1e-6, atol=1e-8)  # a gate may round to fp32


def test_hooks_on_an_expert_are_called() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    seen: list[int] = []
    handles = [
        expert_linear(one).register_forward_hook(lambda module, args, out: (seen.append(1), out * 2)[1])
        for one in (model, reference)
    ]
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1 and seen
    assert_close(found, output(reference), **close)
    for handle in handles:
        handle.remove()
    assert calls_of(model)[1] == blocks(model)


def test_a_forward_of_its_own_on_a_linear() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    for one in (model, reference):
        linear = expert_linear(one)
        linear.forward = lambda x, linear=linear: type(linear).forward(linear, x) + 1
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1
    assert_close(found, output(reference), **close)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("late", [False, True])
def test_every_expert_and_every_projection_is_looked_at(late: bool) -> None:
    """The last linear of the last expert computes in its own way, from the start or later."""
    model, reference = pair()
    if late:
        enable_grouped_experts(model)
        output(model)
    for one in (model, reference):
        linear = [m for m in first_block(one).experts.modules() if isinstance(m, nn.Linear)][-1]
        linear.__class__ = Doubling
    if not late:
        report = enable_grouped_experts(model)
        assert "Doubling, whose forward may do more than multiply" in next(iter(report.left_alone.values()))
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1
    assert_close(found, output(reference), **close)


def test_offloaded_experts_run_through_their_hooks() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    cpu_offload(model, execution_device="cpu")
    report = enable_grouped_experts(model)
    assert not report.grouped and ("meta device" in str(report) or "offloaded" in str(report))
    found, calls = calls_of(model)
    assert calls == 0
    assert_close(found, output(reference), **close)


@pytest.mark.parametrize("first", ["hooks", "grouped"])
def test_hooks_that_move_inputs_alone(first: str) -> None:
    """As `device_map` puts them on every module: the experts run grouped, and both can be taken out in any order."""
    model, reference = pair()

    def hook() -> None:
        for module in list(model.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if first == "hooks":
        hook()
        assert len(enable_grouped_experts(model).grouped) == blocks(model)
    else:
        enable_grouped_experts(model)
        hook()
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(reference), **close)
    other = copy.deepcopy(model)
    disable_grouped_experts(model)
    assert calls_of(model)[1] == 0
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(output(model), output(reference))
    assert not any(isinstance(value, GroupedForward) for m in model.modules() for value in vars(m).values())
    remove_hook_from_module(other, recurse=True)
    assert calls_of(other)[1] == blocks(other)
    disable_grouped_experts(other)
    assert torch.equal(output(other), output(reference))


class Doubled(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def test_a_hook_in_the_place_of_one_that_moves_inputs() -> None:
    """As many attributes as before, under the same names."""
    model, reference = pair()
    for one in (model, reference):
        for module in list(one.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    enable_grouped_experts(model)
    assert calls_of(model)[1] == blocks(model)
    for one in (model, reference):
        add_hook_to_module(expert_linear(one), Doubled())
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1
    assert_close(found, output(reference), **close)


def test_experts_on_several_devices() -> None:
    model = build()
    expert_linear(model).to("meta")
    report = enable_grouped_experts(model)
    assert "meta device" in next(iter(report.left_alone.values()))


def test_an_input_of_another_dtype_meets_the_block_itself() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    for one in (model, reference):
        first_block(one).experts.to(torch.bfloat16)
    for one in (model, reference):
        with pytest.raises(RuntimeError, match="dtype"):
            output(one)


def test_another_list_in_the_place_of_the_experts() -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    for one in (model, reference):
        block = first_block(one)
        block.experts = nn.ModuleList(reversed([copy.deepcopy(expert) for expert in block.experts]))
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(reference), **close)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name: str) -> None:
    model = build(name)
    enable_grouped_experts(model)
    expected = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if name != "bailing" else None):
        if other is None:
            continue
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".experts." in key:
                    parameter.mul_(1.0)
        found, calls = calls_of(other)
        assert calls == blocks(other)
        assert_close(found, expected, **close)
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                if ".experts." in key:
                    parameter.zero_()
        assert_close(output(model), expected, **close)


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    monkeypatch.setenv("PEFT_MOE_GROUPED", "0")
    found, calls = calls_of(model)
    assert calls == 0 and torch.equal(found, output(reference))
    report = enable_grouped_experts(build())
    assert set(report.left_alone.values()) == {"PEFT_MOE_GROUPED=0"} and not report.blocks[0].enabled


def test_a_call_asks_without_a_loop_over_experts() -> None:
    """As many calls of Python functions for 64 experts as for 4."""

    def count(experts: int) -> int:
        model = build()
        block = first_block(model)
        block.experts = nn.ModuleList(copy.deepcopy(block.experts[0]) for _ in range(experts))
        enable_grouped_experts(model)
        forward = block.forward
        assert forward.ready(torch.zeros(1)) is not None
        found = 0

        def tracer(frame: Any, event: str, arg: Any) -> None:
            nonlocal found
            found += event == "call"

        sys.setprofile(tracer)
        try:
            forward.ready(torch.zeros(1))
            for store in forward.experts.stores.values():
                store.frozen()
        finally:
            sys.setprofile(None)
        return found

    assert count(4) == count(64) < 100


def test_four_bit_experts_that_require_gradients() -> None:
    """Codes cannot train: without the check a grouped forward would hide it."""
    model = build()
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}
    quantize_experts(model, BnbExpertsConfig(load_in_4bit=True, **settings))
    if hasattr(first_block(model).experts, "__len__"):
        enable_grouped_experts(model)
        assert calls_of(model)[1] == blocks(model)
        next(p for key, p in model.named_parameters() if ".experts." in key).requires_grad_(True)
        assert first_block(model).forward.ready(torch.zeros(1, 1)) is None


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="dequantize='always' is unknown"):
        enable_grouped_experts(build(), dequantize="always")
    with pytest.raises(ValueError, match="experts_backend='fast' is unknown"):
        enable_grouped_experts(build(), experts_backend="fast")


def test_unknown_blocks_are_left_alone_with_the_reason() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = copy.deepcopy(first_block(build(LIST)).experts)

    report = enable_grouped_experts(nn.ModuleDict({"mlp": Block()}))
    assert report.left_alone == {"mlp.experts": "it is not a known block of experts"}


def test_tools_that_save_find_every_tensor(tmp_path: Path) -> None:
    """They take tensors of one storage for tied ones."""
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    Accelerator(cpu=True).save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(reference.state_dict())
    assert all(torch.equal(saved[key], value) for key, value in reference.state_dict().items())
    save_model(model, str(tmp_path / "again.safetensors"))
    assert set(load_file(tmp_path / "again.safetensors")) == set(saved)
    torch.save(first_block(model).experts[0].state_dict(), tmp_path / "one.pt")
    size = sum(value.numel() * value.element_size() for value in first_block(model).experts[0].parameters())
    assert (tmp_path / "one.pt").stat().st_size < 2 * size + 8192


@pytest.mark.parametrize("late", [False, True])
def test_experts_that_share_a_module_or_a_weight(late: bool) -> None:
    for kind in ("module", "weight"):
        model, reference = pair()
        if late:
            enable_grouped_experts(model)
            output(model)
        for one in (model, reference):
            experts = first_block(one).experts
            if kind == "module":
                experts[2] = experts[1]
            else:
                linears = [[m for m in experts[i].modules() if isinstance(m, nn.Linear)] for i in (1, 2)]
                linears[1][0].weight = linears[0][0].weight
        report = enable_grouped_experts(model)
        assert len(report.left_alone) == 1, kind
        with torch.no_grad():
            for one in (model, reference):
                expert_linear(one).weight.mul_(3)
        found, calls = calls_of(model)
        assert calls == blocks(model) - 1
        assert_close(found, output(reference), **close)


@pytest.mark.parametrize("late", [False, True])
def test_an_expert_with_another_activation(late: bool) -> None:
    model, reference = pair()
    if late:
        enable_grouped_experts(model)
        output(model)
    for one in (model, reference):
        expert = first_block(one).experts[3]
        name = next(name for name, child in expert.named_children() if not isinstance(child, nn.Linear))
        setattr(expert, name, nn.GELU())
    assert "differ in activation" in next(iter(enable_grouped_experts(model).left_alone.values()))
    found, calls = calls_of(model)
    assert calls == blocks(model) - 1
    assert_close(found, output(reference), **close)


def test_another_forward_on_the_class_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    enable_grouped_experts(model)
    output(model)
    kind = type(first_block(model).experts[0])
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) + x)
    found, calls = calls_of(model)
    assert calls == 0
    assert_close(found, output(reference), **close)
    assert not enable_grouped_experts(model).grouped


class Wrapped(torch.Tensor):
    """As quantizers hold weights: a subclass with its own way to multiply."""


def test_weights_of_a_class_that_no_store_reads() -> None:
    model = build()
    linear = expert_linear(model)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)
    assert "Wrapped" in next(iter(enable_grouped_experts(model).left_alone.values()))


def test_second_derivatives_raise() -> None:
    model = build()
    enable_grouped_experts(model)
    x = torch.randn(1, 5, first_block(model).experts[0].gate_proj.in_features, requires_grad=True)
    out = first_block(model)(x)
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_options_of_a_later_call_hold() -> None:
    model = build()
    enable_grouped_experts(model)
    report = enable_grouped_experts(model, dequantize="cache", experts_backend="loop")
    forward = first_block(model).forward
    assert forward.experts.backend == "loop" and next(iter(forward.experts.stores.values())).keep_built
    assert len(report.grouped) == blocks(model) and not any(one.new for one in report.blocks)


def test_packed_experts_on_a_cpu_run_by_themselves_without_gradients() -> None:
    """One token needs few experts; grouped, all are dequantized."""
    model = quantize_experts(build(), BnbExpertsConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    enable_grouped_experts(model)
    assert calls_of(model)[1] == blocks(model)
    with torch.no_grad():
        forward = first_block(model).forward
        assert forward.ready(torch.zeros(1, 1, 64)) is None

"""Blocks as remote code has them: known by how they are built, trained although they refuse to, or left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from peft_moe.layouts import blocks_gates
from peft_moe.layouts.blocks import find_block_forward
from tests.remote_code import BailingBlock, DeepseekBlock, KimiBlock, RemoteConfig, RemoteForCausalLM
from tests.remote_code.lookalikes import REFUSED
from tests.remote_code.parts import choose_in_groups

from .block_cases import by_loop, by_mask, tokens

exact = {"rtol": 1e-6, "atol": 1e-6}
VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "deepseek": (DeepseekBlock, {}),
    "deepseek-no-shared": (DeepseekBlock, {"n_shared_experts": None}),
    "kimi": (KimiBlock, {}),
    "kimi-latent": (KimiBlock, {"routed_expert_hidden_size": 16}),
    "kimi-latent-norm": (KimiBlock, {"routed_expert_hidden_size": 16, "latent_moe_use_norm": True}),
    "kimi-situ": (KimiBlock, {"routed_expert_hidden_size": 16, "hidden_act": "situ"}),
    "bailing": (BailingBlock, {}),
    "bailing-no-shared": (BailingBlock, {"n_shared_experts": None, "norm_topk_prob": False}),
}
each = pytest.mark.parametrize("name", list(VARIANTS))


def build(name: str) -> nn.Module:
    cls, settings = VARIANTS[name]
    return fill(cls(RemoteConfig(**settings)))


def fill(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return block


def hidden(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """The block's hidden states from its parameters alone, differentiable, in the dtype of `x`."""
    config, flat = block.config, x.flatten(0, 1)
    logits = flat @ block.gate.weight.T
    if isinstance(block, BailingBlock):
        weights, idx = logits.softmax(dim=-1).topk(config.num_experts_per_tok)
        if config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    else:
        scores = logits.sigmoid()
        biased = scores + block.gate.e_score_correction_bias
        idx = choose_in_groups(biased, config.num_experts_per_tok, config.n_group, config.topk_group, 0.0)
        weights = (biased if isinstance(block, KimiBlock) else scores).gather(1, idx)
        weights = weights / weights.sum(dim=-1, keepdim=True) * config.routed_scaling_factor
    latent = block.routed_expert_down_proj(flat) if hasattr(block, "routed_expert_down_proj") else flat
    routed = torch.zeros_like(latent)
    for token in range(len(flat)):
        for slot in range(idx.shape[1]):
            out = block.experts[int(idx[token, slot])](latent[token]) * weights[token, slot]
            routed = routed + F.one_hot(torch.tensor(token), len(flat)).to(out.dtype).unsqueeze(1) * out
    if hasattr(block, "routed_expert_norm"):
        routed = block.routed_expert_norm(routed)
    if hasattr(block, "routed_expert_up_proj"):
        routed = block.routed_expert_up_proj(routed)
    if hasattr(block, "shared_experts"):
        routed = routed + block.shared_experts(flat)
    return routed.view_as(x)


@each
def test_inference_is_the_blocks_own(name: str) -> None:
    block = build(name).eval()
    forward = find_block_forward(block)
    with torch.no_grad():
        want, got = block(tokens()), forward(block, by_loop(block), tokens())
    assert type(got) is type(want)
    assert_close(hidden(got), hidden(want), **exact)
    if isinstance(want, tuple):
        assert torch.equal(got[1][0], want[1][0]) and torch.equal(got[1][1], want[1][1])
        assert len(got) == len(want) == 2 and type(got[1]) is type(want[1])


@each
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(name: str, training: bool) -> None:
    """Outputs and every gradient, in both modes, against the block written out by hand in float64."""
    block = build(name).train(training)
    oracle = copy.deepcopy(block).double()
    leaf, leaf64 = tokens().requires_grad_(), tokens().double().requires_grad_()
    got, want = hidden(find_block_forward(block)(block, by_loop(block), leaf * 1.0)), by_hand(oracle, leaf64 * 1.0)
    assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    seen = torch.linspace(-1, 1, got.numel()).view_as(got)
    (got * seen).sum().backward()
    (want * seen.double()).sum().backward()
    assert_close(leaf.grad, leaf64.grad.float(), rtol=1e-4, atol=1e-5)
    assert block.gate.weight.grad.abs().sum() > 0
    for (label, ours), theirs in zip(block.named_parameters(), oracle.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), label
        else:
            assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5, msg=lambda m, label=label: label + m)
    assert all(module.training is training for module in block.modules())


def test_what_the_originals_cannot_do() -> None:
    """The reason for all this: each of these blocks fails in training, or trains nothing in inference mode."""
    x = tokens()
    with pytest.raises(AssertionError):
        build("deepseek").train()(x)
    with pytest.raises((AssertionError, NotImplementedError)):
        build("kimi").train()(x)
    block = build("deepseek").eval()
    block(x).sum().backward()
    assert all(parameter.grad is None for parameter in block.experts.parameters())


@each
def test_the_same_in_both_modes(name: str) -> None:
    block = build(name)
    forward = find_block_forward(block)
    with torch.no_grad():
        results = [hidden(forward(block.train(mode), by_loop(block), tokens())) for mode in (False, True)]
    assert torch.equal(*results)


@each
def test_bf16_contract(name: str) -> None:
    block = build(name).bfloat16().eval()
    x = tokens().bfloat16()
    with torch.no_grad():
        want, got = block(x), find_block_forward(block)(block, by_loop(block), x)
    assert (hidden(got).dtype, hidden(got).shape) == (hidden(want).dtype, hidden(want).shape)
    assert F.cosine_similarity(hidden(got).float().flatten(), hidden(want).float().flatten(), dim=0) > 0.9999
    if isinstance(want, tuple):
        assert torch.equal(got[1][0], want[1][0]) and torch.equal(got[1][1], want[1][1])


@each
def test_autocast_contract(name: str) -> None:
    block = build(name).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = block(tokens()), find_block_forward(block)(block, by_loop(block), tokens())
    assert (hidden(got).dtype, hidden(got).shape) == (hidden(want).dtype, hidden(want).shape)
    assert F.cosine_similarity(hidden(got).float().flatten(), hidden(want).float().flatten(), dim=0) > 0.999


@each
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_whole(name: str, training: bool) -> None:
    block = build(name).train(training)
    forward, experts = find_block_forward(block), by_mask(block)
    torch._dynamo.reset()
    blocks_gates._traits.clear()  # as in a process that was handed the forward and never looked for it
    compiled = torch.compile(lambda x: hidden(forward(block, experts, x)), fullgraph=True, backend="aot_eager")
    grads, outputs = [], []
    for function in (compiled, lambda x: hidden(forward(block, experts, x))):
        block.zero_grad()
        leaf = tokens().requires_grad_()
        outputs.append(function(leaf))
        outputs[-1].square().sum().backward()
        grads.append([leaf.grad, block.gate.weight.grad.clone()])
        assert all(module.training is training for module in block.modules())
    assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek", "kimi"])
def test_the_mode_survives_exceptions(name: str) -> None:
    block = build(name).train()
    with pytest.raises(ValueError):  # the gate wants three dimensions
        find_block_forward(block)(block, by_loop(block), tokens().flatten(0, 1))
    assert all(module.training for module in block.modules())


def test_the_gate_is_called_as_a_module() -> None:
    """Hooks on the gate (offloading, recording of logits) run."""
    block, calls = build("deepseek").train(), []
    block.gate.register_forward_pre_hook(lambda gate, args: calls.append(gate.training))
    find_block_forward(block)(block, by_loop(block), tokens())
    assert calls == [False] and block.gate.training


def test_a_gate_that_trains_by_another_method_keeps_its_mode() -> None:
    """Only what refuses to train is called in inference mode."""

    class Gate(nn.Module):
        topk_method = "greedy"

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32))
            self.modes: list[bool] = []

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            if self.topk_method == "noaux_tc":
                assert not self.training
            self.modes.append(self.training)
            weights, idx = (hidden_states.flatten(0, 1) @ self.weight.T).softmax(dim=-1).topk(2)
            return idx, weights

    block = build("deepseek").train()
    block.gate = Gate()
    for method, mode in (("greedy", True), ("noaux_tc", False)):
        block.gate.topk_method = method
        find_block_forward(block)(block, by_loop(block), tokens())
        assert block.gate.modes.pop() is mode


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_look_alikes_are_refused(cls: type[nn.Module]) -> None:
    assert find_block_forward(cls(RemoteConfig())) is None


@pytest.mark.parametrize("attribute", ["gate", "experts"])
def test_missing_parts_are_refused(attribute: str) -> None:
    block = build("deepseek")
    assert find_block_forward(block) is not None
    delattr(block, attribute)
    assert find_block_forward(block) is None


def test_other_modules_are_refused() -> None:
    block = build("kimi-latent")
    for name, module in block.named_modules():
        assert (find_block_forward(module) is not None) is (name == "")


@each
def test_picklable(name: str) -> None:
    block = build(name)
    forward = find_block_forward(block)
    assert pickle.loads(pickle.dumps(forward)) is forward
    assert find_block_forward(copy.deepcopy(block)) is forward


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi", "bailing"])
def test_a_whole_model_trains(name: str) -> None:
    """The blocks' forwards replaced on a small language model: its loss falls, with gradient checkpoints too."""
    torch.manual_seed(0)
    model = RemoteForCausalLM(RemoteConfig(block=name)).train()
    for layer in model.layers:
        patch(layer.mlp, find_block_forward(layer.mlp))
    ids = torch.randint(0, model.config.vocab_size, (4, 12))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".experts." in n], lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3

    layer, x = model.layers[0], torch.randn(2, 6, model.config.hidden_size, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_close(torch.autograd.grad(again.sum(), x)[0], plain, **exact)


def patch(block: nn.Module, forward: Callable[..., Any]) -> None:
    block.forward = lambda *args, **kwargs: forward(block, by_loop(block), *args, **kwargs)

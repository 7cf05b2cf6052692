"""Models of remote code: blocks that cannot train as they are train here; unknown blocks are adapted one by one."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.reference import adapter_factors, relative, write_deltas
from tests.remote_code.model import BLOCKS, RemoteConfig, RemoteForCausalLM


def build(block: str) -> RemoteForCausalLM:
    torch.manual_seed(0)
    model = RemoteForCausalLM(RemoteConfig(block=block)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def attach(model: nn.Module, **options: Any) -> PeftModel:
    config = MoELoraConfig(r=3, lora_alpha=6, target_modules=[], init_lora_weights=False, **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_trains_and_equals_the_changed_base(block: str, tmp_path: Any) -> None:
    base = build(block)
    reference = copy.deepcopy(base)
    ids = torch.randint(0, 48, (2, 6), generator=torch.Generator().manual_seed(3))
    model = attach(base)
    layers = [module for module in model.modules() if isinstance(module, MoELoraLayer)]
    assert layers and all(layer.spec.block_forward is not None for layer in layers)
    write_deltas(adapter_factors(model, reference), scaling=2.0)
    with torch.no_grad():
        expected = reference(ids).logits
        assert relative(model(ids).logits, expected) < 1e-5

    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if not losses:
            used = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(grad is not None and grad.any() for grad in used)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(ids).logits
        assert relative(PeftModel.from_pretrained(build(block), tmp_path)(ids).logits, trained) < 1e-6
        merged = model.merge_and_unload()
        assert relative(merged(ids).logits, trained) < 1e-5
    assert not any("forward" in vars(module) for module in merged.modules()), "a forward stayed behind"


class UnknownBlock(nn.Module):
    """Every expert on every token, weighted by a softmax: no known block does this."""

    def __init__(self, width: int = 16, inner: int = 12, experts: int = 3) -> None:
        super().__init__()

        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
                self.down_proj = nn.Linear(inner, width)
                self.act_fn = nn.GELU()

            def forward(self, x: Tensor) -> Tensor:
                return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(dim=-1)
        return sum(expert(x) * weights[..., i, None] for i, expert in enumerate(self.experts))


class UnknownModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "unknown"}
        self.block = UnknownBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("options", [{}, {"split_gate_up": True}, {"use_dora": True}, {"expert_indices": [0, 2]}])
def test_unknown_block_one_by_one(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    base = UnknownModel()
    x = torch.randn(2, 5, 16)
    before = base(x).detach()
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        model = attach(base, **options)
    found = model(x)
    assert relative(found, before) > 1e-3
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(x), before)
        model.merge_adapter()
        assert relative(model(x), found) < 1e-5
        model.unmerge_adapter()
        assert relative(model(x), found) < 1e-6
        merged = model.merge_and_unload()
        assert relative(merged(x), found) < 1e-5
    assert not any(module._forward_hooks for module in merged.modules()), "a hook stayed behind"


def test_unknown_block_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class BlockOfItsOwn(UnknownBlock):
        pass

    base = UnknownModel()
    base.block = BlockOfItsOwn()
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        attach(base)
        attach(copy.deepcopy(UnknownModel()))
    lines = [record.message for record in caplog.records if re.search(r"BlockOfItsOwn.*one by one", record.message)]
    assert len(lines) == 1

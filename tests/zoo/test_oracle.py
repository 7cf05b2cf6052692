"""The oracle with deltas returns what the real experts return once those deltas are written into their weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import experts_oracle, lora_delta
from tests.zoo import ENTRIES, first_floating
from tests.zoo.blocks import block_oracle
from tests.zoo.capture import Call, capture
from tests.zoo.test_zoo import ON_V5, experts_modules, relative_error

# By projection, then by expert: the 2-D weights (out, in) whose rows, one under the other, are that projection.
Views = dict[str, list[list[Tensor]]]

NAMES = [name for name in ENTRIES if name != "doge"]  # its experts have no weight matrices


def stack(weight: Tensor) -> list[list[Tensor]]:
    return [[expert] for expert in weight]


def weight_views(module: nn.Module, hidden: int) -> Views:
    """Writable views into the base weights; which way a stack lies is told by the side that is `hidden` wide."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        experts = [expert for expert in module.children() if list(expert.parameters())]
        if isinstance(experts[0], nn.Linear):
            return {"down_proj": [[expert.weight] for expert in experts]}
        first = {"gate_proj": ["gate_proj", "up_proj"], "w1": ["w1", "w3"], "fc1": ["fc1"], "wi": ["wi"]}
        second = {"gate_proj": "down_proj", "w1": "w2", "fc1": "fc2", "wi": "wo"}
        kind = next(name for name in first if hasattr(experts[0], name))
        return {
            "gate_up_proj": [[getattr(expert, name).weight for name in first[kind]] for expert in experts],
            "down_proj": [[getattr(expert, second[kind]).weight] for expert in experts],
        }
    if hasattr(module, "input_linear"):
        return {"gate_up_proj": stack(module.input_linear.weight), "down_proj": stack(module.output_linear.weight)}
    if hasattr(module, "mlp"):  # DBRX
        w1, v1, w2 = (p.view(-1, module.mlp.ffn_hidden_size, hidden) for p in module.mlp.parameters())
        pairs = [list(pair) for pair in zip(w1, v1, strict=True)]
        return {"gate_up_proj": pairs, "down_proj": stack(w2.transpose(1, 2))}
    if hasattr(module, "weight"):
        return {"weight": stack(module.weight)}
    if hasattr(module, "fc1"):
        first, second = module.fc1.weight, module.fc2.weight
    else:
        first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
        second = module.down_proj
    assert first.shape[1] != first.shape[2] and second.shape[1] != second.shape[2], "a square stack has no telling side"
    return {
        "gate_up_proj": stack(first if first.shape[2] == hidden else first.transpose(1, 2)),
        "down_proj": stack(second if second.shape[1] == hidden else second.transpose(1, 2)),
    }


@torch.no_grad()
def changed_weights(views: Views) -> dict[str, Tensor]:
    """Adds random deltas to the base through `views`; returns them as (E, out, in) float64."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for key, experts in views.items():
        rows, columns = sum(part.shape[0] for part in experts[0]), experts[0][0].shape[1]
        delta = 0.05 * torch.randn(len(experts), rows, columns, generator=generator)
        for expert, parts in enumerate(experts):
            for part, change in zip(parts, delta[expert].split([p.shape[0] for p in parts]), strict=True):
                part += change
        deltas[key] = delta.double()
    return deltas


@torch.no_grad()
def changed_call(call: Call) -> tuple[dict[str, Tensor], Tensor]:
    """The deltas, and what a copy of the called module returns with them in its weights."""
    module = copy.deepcopy(call.module)
    inner = module.experts if isinstance(getattr(module, "experts", None), nn.ModuleList | nn.ModuleDict) else module
    deltas = changed_weights(weight_views(inner, call.args[0].shape[-1]))
    arguments = [value.clone() if torch.is_tensor(value) else value for value in call.args]
    return deltas, first_floating(module(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_deltas_are_the_change_of_the_weights(name):
    entry = ENTRIES[name]
    model = entry.build()
    modules = experts_modules(model, entry.experts_path)
    bare = all(type(module) in {nn.ModuleList, nn.ModuleDict} for module in modules.values())
    paths = [path.removesuffix(".experts") if bare else path for path in modules]
    oracle = block_oracle if bare else experts_oracle
    for call in capture(model, entry.inputs(model), "|".join(map(re.escape, paths))):
        deltas, actual = changed_call(call)
        with torch.no_grad():
            expected = oracle(call.module, call.args, deltas)
            unchanged = oracle(call.module, call.args)
        assert relative_error(actual, expected) < 1e-5, call.name
        assert relative_error(unchanged, expected) > 1e-2, call.name


@pytest.mark.skipif(not ON_V5, reason="transformers 4 has no index for absent experts")
def test_an_index_past_the_last_expert_adds_nothing():
    model = ENTRIES["qwen3_moe"].build()
    call = capture(model, ENTRIES["qwen3_moe"].inputs(model), ENTRIES["qwen3_moe"].experts_path)[0]
    x, idx, w = call.args
    nowhere, silent = idx.clone(), w.clone()
    nowhere[::2, 0], silent[::2, 0] = call.module.num_experts, 0.0
    with torch.no_grad():
        assert torch.equal(experts_oracle(call.module, (x, nowhere, w)), experts_oracle(call.module, (x, idx, silent)))


@pytest.mark.parametrize("scaling", [2.0, torch.tensor([0.5, 1.0, 3.0])])
def test_lora_delta(scaling):
    A, B = torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    expected = torch.einsum("eor,eri->eoi", B.double(), A.double())
    expected *= torch.as_tensor(scaling, dtype=torch.float64).view(-1, 1, 1)
    torch.testing.assert_close(lora_delta(A, B, scaling), expected, rtol=1e-12, atol=1e-12)

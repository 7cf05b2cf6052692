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
from tests.zoo.views import Views, weight_views

NAMES = [name for name in ENTRIES if name != "doge"]  # its experts have no weight matrices


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

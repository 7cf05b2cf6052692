"""The catalogue is complete, every model runs, and the oracle returns what its experts return."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
import transformers
from torch import nn

from tests.oracle import experts_oracle
from tests.zoo import BROKEN_UPSTREAM, ENTRIES, first_floating, loss
from tests.zoo.blocks import block_oracle
from tests.zoo.capture import capture
from tests.zoo.entry import entry

NAMES = list(ENTRIES)
ON_V5 = int(transformers.__version__.split(".")[0]) >= 5


def experts_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if re.fullmatch(pattern, path)}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation from `expected` in units of its largest entry."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_runs(name):
    listed = ENTRIES[name]
    model = listed.build()
    assert experts_modules(model, listed.experts_path), f"{listed.experts_path!r} matches no module"
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) * 4 < 20e6
    with torch.no_grad():
        output = first_floating(model(**listed.inputs(model)))
    assert torch.isfinite(output).all() and output.std() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_builds_are_equal(name):
    first, second = ENTRIES[name].build().state_dict(), ENTRIES[name].build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_reaches_the_experts(name):
    listed = ENTRIES[name]
    model = listed.build()
    loss(model, listed.inputs(model)).backward()
    for path, module in experts_modules(model, listed.experts_path).items():
        norms = [p.grad.norm().item() for p in module.parameters() if p.grad is not None]
        assert norms and max(norms) > 1e-2, path


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_the_real_experts(name):
    listed = ENTRIES[name]
    model = listed.build()
    modules = experts_modules(model, listed.experts_path)
    bare = all(type(module) in {nn.ModuleList, nn.ModuleDict} for module in modules.values())
    # A bare container has no forward: compare the block around it.
    paths = {path.removesuffix(".experts") if bare else path for path in modules}
    calls = capture(model, listed.inputs(model), "|".join(map(re.escape, paths)))
    assert {call.name for call in calls} == paths, "the inputs do not reach every experts module"
    for call in calls:
        with torch.no_grad():
            expected = (block_oracle if bare else experts_oracle)(call.module, call.args)
        assert relative_error(first_floating(call.output), expected) < 1e-5, call.name


@pytest.mark.skipif(not ON_V5, reason="transformers 4 has no experts interface")
def test_every_class_of_the_experts_interface_is_listed():
    decorated = re.compile(r"^@use_experts_implementation\b[^\n]*(?:\n[^\nc][^\n]*)*\nclass (\w+)", re.MULTILINE)
    sources = pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    upstream = {name for source in sources for name in decorated.findall(source.read_text(encoding="utf-8"))}
    assert len(upstream) > 50
    known = set()
    for listed in ENTRIES.values():
        known |= {type(module).__name__ for module in experts_modules(listed.build(), listed.experts_path).values()}
    assert upstream - known == set()


@pytest.mark.skipif(ON_V5, reason="Doge's mixture runs on transformers 5")
def test_doge_is_still_broken_upstream():
    assert set(BROKEN_UPSTREAM) == {"doge"}
    doge = entry("doge", "DogeForCausalLM", r"model\.layers\.\d+\.mlp", kind="other", is_moe=True, num_experts=16)
    model = doge.build()
    with pytest.raises(TypeError, match="dropout"):
        model(**doge.inputs(model))

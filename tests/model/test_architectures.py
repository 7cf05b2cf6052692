"""Every architecture: forward, gradients, save, reload, merge, unmerge, against the base with deltas written in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.zoo import ENTRIES, first_floating, loss

NAMES = [name for name in ENTRIES if name != "doge"]
SCALING = 2.0


def attach(model: torch.nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = MoELoraConfig(r=3, lora_alpha=6, target_modules=[], init_lora_weights=False, **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str, tmp_path: Any) -> None:
    entry = ENTRIES[name]
    base = entry.build()
    inputs = entry.inputs(base)
    reference = copy.deepcopy(base).requires_grad_(True)
    original = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        before = first_floating(base(**inputs))

    model = attach(base)
    layers = [module for module in model.modules() if isinstance(module, MoELoraLayer)]
    assert layers, "no experts were adapted"
    assert {parameter.requires_grad for key, parameter in model.named_parameters() if "lora_" not in key} == {False}

    # Forward and gradients: the base's own forward and backward on changed weights.
    factors = adapter_factors(model, reference)
    assert len(factors) == sum(len(layer.projections) for layer in layers)
    write_deltas(factors, SCALING)
    expected = first_floating(reference(**inputs))
    found = first_floating(model(**inputs))
    assert relative(found, before) > 1e-3, "the adapter does nothing"
    assert relative(found, expected) < 2e-5
    loss(reference, inputs).backward()
    loss(model, inputs).backward()
    gradients = expected_gradients(factors, dense_gradients(reference), SCALING)
    parameters = dict(model.named_parameters())
    for one, (d_a, d_b) in zip(factors, gradients, strict=True):
        for key, expected_gradient in ((one.key, d_a), (one.key.replace("lora_A", "lora_B"), d_b)):
            gradient = parameters[key].grad
            assert gradient is not None
            scale = max(float(expected_gradient.norm()), 1e-12)
            assert float((gradient.double() - expected_gradient).norm()) / scale < 1e-3, key
            for expert in range(gradient.shape[0]):
                if not expected_gradient[expert].any():
                    assert not gradient[expert].any(), f"{key}: expert {expert} saw no token but has a gradient"

    # Save and reload on a fresh base.
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(entry.build(), tmp_path)
    with torch.no_grad():
        assert relative(first_floating(reloaded(**inputs)), found) < 1e-6

    # Disabled, merged, unmerged.
    with torch.no_grad():
        with model.disable_adapter():
            assert relative(first_floating(model(**inputs)), before) < 1e-6
        model.merge_adapter()
        assert relative(first_floating(model(**inputs)), expected) < 2e-5
        model.unmerge_adapter()
        after = {key.replace(".base_layer", ""): value for key, value in model.base_model.model.state_dict().items()}
        for key, value in original.items():
            assert torch.equal(after[key], value), f"{key} is not what it was before the merge"
        merged = model.merge_and_unload()
        assert relative(first_floating(merged(**inputs)), expected) < 2e-5
    assert list(merged.state_dict()) == list(original)
    assert not any(isinstance(module, MoELoraLayer) for module in merged.modules())

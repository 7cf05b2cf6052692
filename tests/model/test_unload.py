"""After a merge: whose forward runs, what is left in the model, in its files and in its copies."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.model.merge_cases import LINEARS, NAMES, adapted, add, assert_same_bits, base_weights, build, output
from tests.reference import relative
from tests.zoo import ENTRIES

# --- the base's own forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_calls_the_forward_of_the_base(name, monkeypatch):
    model = adapted(name)
    layer = model.base_model.expert_layers[0]
    block_path = layer.name.rpartition(".")[0] if isinstance(layer.base_layer, nn.ModuleList) else layer.name
    owner = model.base_model.model.get_submodule(block_path)
    owner = owner.base_layer if isinstance(owner, MoELoraLayer) else owner
    calls = []
    original = type(owner).forward

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return original(module, *args, **kwargs)

    output(model, name)
    monkeypatch.setattr(type(owner), "forward", spy)
    output(model, name)
    assert calls == [], "with an adapter the experts run grouped"
    model.merge_adapter()
    monkeypatch.setenv("PEFT_MOE_GROUPED", "0")  # else a list of experts runs grouped still
    output(model, name)
    assert any(one is owner for one in calls)
    calls.clear()
    model.unmerge_adapter()
    output(model, name)
    assert calls == []
    with model.disable_adapter():
        output(model, name)
    assert any(one is owner for one in calls)
    calls.clear()
    merged = model.merge_and_unload()
    output(merged, name)
    assert any(one is owner for one in calls)


# --- after unloading -----------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> tuple[list[tuple[str, type]], list[str], list[tuple[int, bool]]]:
    """Module tree, keys, and what hangs on each module."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    hooks = [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]
    return modules, list(model.state_dict()), hooks


@pytest.mark.parametrize("name", [*NAMES, "jamba", "llama4_text"])
def test_nothing_is_left_behind(name):
    original = describe(build(name))
    model = adapted(name)
    expected = output(model, name)
    merged = model.merge_and_unload(safe_merge=True)
    assert describe(merged) == original
    assert relative(output(merged, name), expected) < 1e-5
    assert not any(isinstance(module, MoELoraLayer) for module in merged.modules())
    # The result takes an adapter again, as any base does.
    again = get_peft_model(merged, MoELoraConfig(r=2, target_modules=[]))
    assert relative(output(again, name), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_unload(name):
    plain = build(name)
    expected, before = output(plain, name), base_weights(plain)
    unloaded = adapted(name).unload()
    assert describe(unloaded) == describe(plain)
    assert_same_bits(base_weights(unloaded), before)
    assert torch.equal(output(unloaded, name), expected)


def test_merge_and_unload_of_chosen_adapters():
    model = adapted()
    add(model, "second")
    model.set_adapter("second")
    expected = output(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert relative(output(merged), expected) < 1e-5


def test_merge_and_unload_after_a_merge():
    model = adapted()
    expected = output(model)
    model.merge_adapter()
    merged = model.merge_and_unload()
    assert relative(output(merged), expected) < 1e-5


READ = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM
    for path in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
        for parameter in model.parameters():  # out of the mapped file: where a matrix starts may decide its last bit
            parameter.data = parameter.data.clone()
        saved = torch.load(f"{path}/expected.pt")
        with torch.no_grad():
            found = model(**saved["inputs"]).logits
        apart = (found - saved["logits"]).double().norm() / saved["logits"].double().norm()
        print(json.dumps([path, float(apart), str(found.dtype)]))
    assert not any(name.startswith(("peft_moe", "tests")) for name in sys.modules)
"""


def test_a_merged_model_reloads_in_stock_transformers(tmp_path):
    """In a process that never imports this package; each file holds every tensor once."""
    paths = []
    for name in (*NAMES, "mixtral"):
        for dtype in (torch.float32, torch.bfloat16):
            path = tmp_path / f"{name}-{dtype}"
            build(name, dtype).save_pretrained(path / "base")
            base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=dtype, attn_implementation="eager")
            torch.manual_seed(4)
            config = MoELoraConfig(r=3, target_modules=LINEARS, init_lora_weights=False)
            model = get_peft_model(base, config).eval()
            output(model, name)  # houses the weights of a list of experts in one stack
            merged = model.merge_and_unload()
            merged.save_pretrained(path)
            inputs = ENTRIES[name].inputs(merged)
            torch.save({"inputs": inputs, "logits": output(merged, name)}, path / "expected.pt")
            before, after = (load_file(one / "model.safetensors") for one in (path / "base", path))
            own = merged.state_dict()
            assert all(torch.equal(value, own[key]) for key, value in after.items() if key in own)
            assert {key: (one.shape, one.dtype) for key, one in after.items()} == {
                key: (one.shape, one.dtype) for key, one in before.items()
            }
            sizes = [(one / "model.safetensors").stat().st_size for one in (path / "base", path)]
            assert abs(sizes[0] - sizes[1]) < 512
            paths.append(str(path))
    command = [sys.executable, "-c", textwrap.dedent(READ), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [path for path, _, _ in found] == paths
    for path, apart, dtype in found:
        assert apart == 0 and dtype in path, (path, apart, dtype)


# --- copies --------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
@pytest.mark.parametrize("name", [*NAMES, "deepseek_v3"])
def test_copies_are_independent(name, copied, merged):
    model = adapted(name, torch.bfloat16)
    plain = base_weights(model)
    expected = output(model, name)
    if merged:
        model.merge_adapter()
        expected = output(model, name)
    other = copied(model)
    assert torch.equal(output(other, name), expected)
    weights = base_weights(model)
    # What happens to the copy, and the way its experts run, stays with the copy.
    if not merged:
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                if "lora_" in key:
                    parameter.zero_()
        assert torch.equal(output(model, name), expected)
        assert not torch.equal(output(other, name), expected)
        other.merge_adapter()
    other.unmerge_adapter()
    assert_same_bits(base_weights(other), plain)
    assert_same_bits(base_weights(model), weights)
    other.unload()
    assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("unload", [False, True])
def test_a_file_holds_every_weight_once(unload):
    """The weights of listed experts are views of one stack, which must not be written once a view."""
    model = adapted()
    output(model)
    model = model.merge_and_unload() if unload else model
    size = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    for what in (model, model.state_dict()):
        file = io.BytesIO()
        torch.save(what, file)
        assert size < file.tell() < 1.5 * size


def test_weights_have_a_storage_of_their_own_again():
    """After unloading: `pickle` writes the whole storage of every view, many times the model for a list of experts."""
    model = adapted()
    output(model)
    merged = model.merge_and_unload()
    size = sum(one.numel() * one.element_size() for one in merged.state_dict().values())
    assert len(pickle.dumps(merged)) < 1.5 * size


def test_merging_from_a_directory(tmp_path: Path):
    """What a user does: adapter from disk, merge, save."""
    model = adapted()
    expected = output(model)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(build(), tmp_path).merge_and_unload(safe_merge=True)
    assert relative(output(merged), expected) < 1e-5

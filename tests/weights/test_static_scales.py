"""Static scales of activations: they come along, change nothing that is computed, and are saved as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moe.checkpoint.packed import packed_config
from tests.model.tiny import config, experts_of
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.weights.checkpoints import dense_twin, read, write_fp8
from tests.weights.quantized import channel_linear, fp8_linear, fp8_list, fp8_stacked
from tests.zoo import ENTRIES, first_floating, loss

V5 = int(transformers.__version__.split(".")[0]) >= 5
KINDS = ["block", "number", "channel", "tensor"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=packed_config(str(folder)), dtype=dtype).eval()


def static_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key.endswith(("activation_scale", "input_scale"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_read_trained_merged_and_saved(name: str, kind: str, tmp_path: Path) -> None:
    """Stacked on transformers 5, a list on transformers 4 (qwen3_moe)."""
    base = ENTRIES[name].build()
    inputs = ENTRIES[name].inputs(base)
    written, exact = write_fp8(base, tmp_path / "fp8", kind=kind, static=True)
    assert static_of(written)
    loaded = load(tmp_path / "fp8", torch.bfloat16)
    assert {value.dtype for value in static_of(dict(loaded.named_parameters())).values()} == {torch.float32}
    model = load(tmp_path / "fp8")
    before = {key: value.clone() for key, value in static_of(dict(model.named_parameters())).items()}
    assert any(".experts." in key for key in before) and any("self_attn" in key for key in before)
    twin = dense_twin(base, exact, tmp_path / "dense")
    with torch.no_grad():
        plain = first_floating(twin(**inputs))
        assert relative(first_floating(model(**inputs)), plain) < 2e-5
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert set(again) == set(written)
    for key, value in written.items():
        assert again[key].dtype == value.dtype and again[key].shape == value.shape, key
        assert torch.equal(again[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key

    adapted = get_peft_model(model, config())
    assert not [key for key, value in static_of(dict(adapted.named_parameters())).items() if value.requires_grad]
    factors = adapter_factors(adapted, twin)
    write_deltas(factors, 2.0)
    twin.requires_grad_(True)
    loss(adapted, inputs).backward()
    loss(twin, inputs).backward()
    gradients = expected_gradients(factors, dense_gradients(twin), 2.0)
    parameters = dict(adapted.named_parameters())
    for one, (d_a, d_b) in zip(factors, gradients, strict=True):
        assert relative(parameters[one.key].grad, d_a) < 1e-4
        assert relative(parameters[one.key.replace("lora_A", "lora_B")].grad, d_b) < 1e-4

    with torch.no_grad():
        expected = first_floating(twin(**inputs))
        merged = adapted.merge_and_unload()
        found = first_floating(merged(**inputs))
        assert relative(found, expected) < 0.5 * relative(plain, expected)
    for key, value in before.items():
        assert torch.equal(merged.get_parameter(key), value), key
    merged.save_pretrained(tmp_path / "merged")
    for key, value in static_of(written).items():
        assert torch.equal(read(tmp_path / "merged")[key], value), key
    with torch.no_grad():
        assert relative(first_floating(load(tmp_path / "merged")(**inputs)), found) < 1e-6


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_merged_into_16_bits_they_go(kind: str, tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    _, exact = write_fp8(base, tmp_path / "fp8", kind=kind, static=True)
    twin = dense_twin(base, exact, tmp_path / "dense")
    adapted = get_peft_model(load(tmp_path / "fp8"), config(layers_to_transform=[0], layers_pattern="layers"))
    merged = adapted.merge_and_unload(dtype=torch.float32)
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in twin.named_parameters()}
    merged.save_pretrained(tmp_path / "merged")
    assert set(read(tmp_path / "merged")) == set(read(tmp_path / "dense"))


def test_a_checkpoint_may_lack_them(tmp_path: Path) -> None:
    """`static` in its config, and no such scales: they are not needed."""
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    written, exact = write_fp8(base, tmp_path / "fp8", static=True)
    from tests.weights.checkpoints import save_shards

    missing = set(static_of(written))
    save_shards({key: value for key, value in written.items() if key not in missing}, tmp_path / "fp8")
    model = load(tmp_path / "fp8")
    assert not static_of(dict(model.named_parameters()))
    with torch.no_grad():
        expected = first_floating(dense_twin(base, exact, tmp_path / "dense")(**inputs))
        assert relative(first_floating(model(**inputs)), expected) < 2e-5


@pytest.mark.skipif(not V5, reason="stacks in a file: transformers 5")
@pytest.mark.parametrize("kind", ["block", "number"])
def test_stacks_in_the_file(kind: str, tmp_path: Path) -> None:
    """One static scale an expert for gate and up together, as stacked checkpoints have them."""
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    written, _ = write_fp8(base, tmp_path, kind=kind, static=True)
    from tests.weights.checkpoints import save_shards
    from tests.weights.quantized import encode_stack

    tensors = {key: value for key, value in written.items() if ".experts." not in key}
    for layer, block in enumerate(base.model.layers):
        for leaf in ("gate_up_proj", "down_proj"):
            weight, front = getattr(block.mlp.experts, leaf), f"model.layers.{layer}.mlp.experts.{leaf}"
            size = (32, 32) if kind == "block" else tuple(weight.shape[1:])
            codes, scales, values = encode_stack(weight.data, size)
            weight.data.copy_(values)
            tensors |= {front: codes, f"{front}_scale_inv": scales.float()}
            tensors[f"{front}_activation_scale"] = torch.rand(weight.shape[0]) + 0.5
    for key, value in tensors.items():
        if "self_attn" in key and key.endswith("_proj.weight"):
            scale = written[f"{key}_scale_inv"]
            spread = scale if scale.dim() == 0 else scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            exact = value.float() * (spread if scale.dim() == 0 else spread[: value.shape[0], : value.shape[1]])
            base.get_parameter(key).data.copy_(exact)
    save_shards(tensors, tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(base(**inputs))) < 2e-5
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert set(again) == set(tensors)
    for key, value in tensors.items():
        assert torch.equal(again[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


@pytest.mark.skipif(not V5, reason="FP8Experts: transformers 5")
def test_stock_stacks_that_hold_them() -> None:
    """`FP8Experts` with `activation_scheme="static"`, as stock transformers holds it on a GPU."""
    base, twin = fp8_stacked("qwen3_moe")
    inputs = ENTRIES["qwen3_moe"].inputs(twin)
    for module in base.modules():
        if type(module).__name__ == "FP8Experts":
            module.activation_scheme = "static"
            for leaf in ("gate_up_proj", "down_proj"):
                number = nn.Parameter(torch.rand(module.num_experts) + 0.5)
                module.register_parameter(f"{leaf}_activation_scale", number)
    before = {key: value.clone() for key, value in static_of(base.state_dict()).items()}
    model = get_peft_model(base, config())
    assert not [key for key, value in static_of(dict(model.named_parameters())).items() if value.requires_grad]
    write_deltas(adapter_factors(model, twin), 2.0)
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
        model.merge_adapter()
        found = static_of({key.replace(".base_layer", ""): value for key, value in model.state_dict().items()})
        for key, value in before.items():
            assert torch.equal(found[f"base_model.model.{key}"], value), key
        model.unmerge_adapter()
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not static_of(dict(merged.named_parameters()))
    with torch.no_grad():
        assert relative(first_floating(merged(**inputs)), first_floating(twin(**inputs))) < 2e-5


@pytest.mark.parametrize("kind", ["activation_scale", "input_scale"])
def test_lists_that_hold_them(kind: str) -> None:
    def convert(linear: nn.Linear) -> nn.Module:
        new = fp8_linear(linear) if kind == "activation_scale" else channel_linear(linear)
        new.register_parameter(kind, nn.Parameter(torch.tensor(0.7)))
        return new

    base, twin = fp8_list(convert)
    inputs = {"input_ids": torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))}
    model = get_peft_model(base, config())
    stores = [store for layer in experts_of(model) for store in layer.stores.values()]
    assert stores and all(store.packed for store in stores)
    write_deltas(adapter_factors(model, twin), 2.0)
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
        model.merge_adapter()
        held = static_of(model.state_dict())
        assert held and all(value == 0.7 for value in held.values())
        model.unmerge_adapter()
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not static_of(dict(merged.named_parameters()))

"""Experts whose weights are offloaded by accelerate, or lie on another device: run through hooks, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_moe import quantize_experts
from tests.model.tiny import config, experts_of
from tests.quantize_cases import config as bnb_config
from tests.quantize_cases import small
from tests.reference import relative
from tests.weights.quantized import fp8_linear, fp8_list
from tests.weights.test_mxfp4 import load, write_gpt_oss
from tests.zoo import ENTRIES, first_floating

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def _loaded_fp8(folder: Path) -> nn.Module:
    from tests.weights.checkpoints import write_fp8

    write_fp8(ENTRIES["qwen3_moe"].build(), folder)
    return load(folder)


def _loaded_mxfp4(folder: Path) -> nn.Module:
    write_gpt_oss(folder)
    return load(folder)


def _bnb(kind: str) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    return quantize_experts(small(), bnb_config(kind))


#: A stack on transformers 5 (qwen3_moe is a list on 4), a stack on both, and lists on both.
BASES: dict[str, Callable[[Path], nn.Module]] = {
    "dense": lambda folder: ENTRIES["qwen3_moe"].build(),
    "dense, gpt_oss": lambda folder: ENTRIES["gpt_oss"].build(),
    "dense list": lambda folder: fp8_list(fp8_linear)[1],
    "nf4": lambda folder: _bnb("nf4"),
    "int8": lambda folder: _bnb("int8"),
    "fp8": _loaded_fp8,
    "fp8 list": lambda folder: fp8_list(fp8_linear)[0],
    "mxfp4": _loaded_mxfp4,
}
OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(
        model, str(folder / "offload"), execution_device=torch.device("cpu")
    ),
    "dispatch": lambda model, folder: accelerate.dispatch_model(
        model, {name: "disk" if "layers" in name else "cpu" for name, _ in _parts(model)}, main_device="cpu",
        offload_dir=str(folder / "offload"), force_hooks=True,
    ),
}  # fmt: skip


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a `device_map`: layers, and what stands beside them."""
    found = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other, _ in found)
        if not inside and (name.rpartition(".")[0].endswith("layers") or not list(module.children())):
            found.append((name, module))
    return found


def inputs() -> dict[str, Any]:
    return {"input_ids": IDS, "use_cache": False}


def run(model: nn.Module) -> Tensor:
    return first_floating(model(**inputs()))


def total(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def adapted(base: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(base, config(**options))


def is_offloaded(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for n, p in model.named_parameters() if ".experts." in n and "lora_" not in n)


@pytest.mark.parametrize("off", OFFLOADS)
@pytest.mark.parametrize("name", BASES)
def test_weights_come_through_their_hooks(name: str, off: str, tmp_path: Path) -> None:
    """Outputs and gradients of an offloaded base are those of the base, in a second call and without adapters, too."""
    base = BASES[name](tmp_path / "base")
    if name in ("nf4", "int8") and isinstance(base.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("a list of packed linears: see below")
    if name == "int8" and off == "dispatch" and not torch.cuda.is_available():
        pytest.skip("accelerate takes int8 weights through a GPU")
    expected = adapted(copy.deepcopy(base))
    OFFLOADS[off](base, tmp_path)
    assert is_offloaded(base)
    model = adapted(base)
    found = dict(model.named_parameters())
    for key, theirs in expected.named_parameters():
        assert "lora_" not in key or torch.equal(found[key], theirs), key
    for one in (model, expected):
        total(run(one)).backward()
    for key, theirs in expected.named_parameters():
        if theirs.grad is not None:
            assert relative(found[key].grad, theirs.grad) < 1e-5 and theirs.grad.abs().sum() > 0, key
    with torch.no_grad():
        assert relative(run(model), run(expected)) < 1e-6
        with model.disable_adapter(), expected.disable_adapter():
            assert relative(run(model), run(expected)) < 1e-6
    assert is_offloaded(model)
    for layer in experts_of(model):
        assert all(getattr(store, "stack", None) is None for store in layer.stores.values())


class _Gathering(dict[str, nn.Parameter]):
    """What DeepSpeed's ZeRO-3 puts in the place of a module's parameters: empty ones, whole once asked for by name."""

    def __init__(self, whole: dict[str, nn.Parameter]) -> None:
        super().__init__({name: nn.Parameter(torch.empty(0)) for name in whole})
        self.whole = {name: parameter.data for name, parameter in whole.items()}

    def __getitem__(self, name: str) -> nn.Parameter:
        found = super().__getitem__(name)
        found.data = self.whole[name]
        return found


def test_adapters_that_are_gathered_where_they_are_asked_for() -> None:
    model = adapted(ENTRIES["qwen3_moe"].build())
    expected = run(model)
    total(expected).backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for layer in experts_of(model):
        for module in layer.modules():
            if isinstance(module, nn.ParameterDict):
                module._parameters = _Gathering(module._parameters)  # type: ignore[assignment]
    found = run(model)
    assert torch.equal(found, expected)
    total(found).backward()
    for name, one in model.named_parameters():
        assert name not in grads or torch.equal(one.grad, grads[name]), name


@pytest.mark.parametrize("name", BASES)
def test_offloaded_adapters_run_and_do_not_train(name: str, tmp_path: Path) -> None:
    """A model that is dispatched with its adapters: their dicts of factors get hooks, too."""
    base = BASES[name](tmp_path / "base")
    if name in ("nf4", "int8") and isinstance(base.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("a list of packed linears: see below")
    expected = adapted(copy.deepcopy(base))
    model = adapted(base)
    OFFLOADS["cpu"](model, tmp_path)
    assert all(p.device.type == "meta" for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        assert relative(run(model), run(expected)) < 1e-6
        assert relative(run(model), run(expected)) < 1e-6
    with pytest.raises(ValueError, match=r"experts: its adapters are offloaded, so they cannot train"):
        run(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lists_of_packed_linears_run_or_are_refused(kind: str, tmp_path: Path) -> None:
    """accelerate moves the statistics of `Linear4bit` to the meta device, too: they are gone."""
    pytest.importorskip("bitsandbytes")
    base = quantize_experts(fp8_list(fp8_linear)[1], bnb_config(kind)).train()
    expected = adapted(copy.deepcopy(base))
    OFFLOADS["cpu"](base, tmp_path)
    if kind == "nf4":
        with pytest.raises(ValueError, match="experts: accelerate cannot load its offloaded weights again"):
            adapted(base)
        return
    with torch.no_grad():
        try:
            found = run(adapted(base))
        except (ValueError, RuntimeError) as error:
            assert "experts" in str(error) or "CUDA" in str(error) or "device" in str(error)
            return
        assert relative(found, run(expected)) < 1e-6


def test_bytes_in_a_floating_storage_are_not_read_after_a_cast(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = quantize_experts(small(), bnb_config("nested"))
    if isinstance(base.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("this transformers holds the experts as a list")
    OFFLOADS["cpu"](base, tmp_path)
    with torch.no_grad(), pytest.raises(ValueError, match="has cast its bytes.*bnb_4bit_quant_storage"):
        run(adapted(base))


@pytest.mark.parametrize("name", ["dense", "dense list"])
def test_merging_into_offloaded_weights_is_kept_or_refused(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    expected = adapted(copy.deepcopy(base))
    OFFLOADS["cpu"](base, tmp_path)
    model = adapted(base)
    with torch.no_grad():
        plain, wanted = None, run(expected)
        with expected.disable_adapter():
            plain = run(expected)
        try:
            model.merge_adapter()
        except ValueError as error:
            assert "what is merged into them would be lost" in str(error)
            assert isinstance(experts_of(model)[0].base_layer, nn.ModuleList)
            assert relative(run(model), wanted) < 1e-6  # nothing was changed
            return
        assert relative(run(model), wanted) < 1e-5
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(run(model), plain)


@pytest.mark.parametrize("name", ["dense", "dense list", "nf4"])
def test_starts_that_change_offloaded_weights_are_refused(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    if name == "nf4" and isinstance(base.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("a list of packed linears: see above")
    OFFLOADS["cpu"](base, tmp_path)
    with pytest.raises(ValueError, match="'olora'.*offloaded"):
        adapted(base, init_lora_weights="olora")


def test_default_starts_on_offloaded_weights(tmp_path: Path) -> None:
    """A is drawn and not left at zero, from which nothing would ever train."""
    base = BASES["dense"](tmp_path)
    OFFLOADS["cpu"](base, tmp_path)
    model = adapted(base, init_lora_weights=True)
    for key, value in model.named_parameters():
        if "lora_" in key:
            assert value.device.type == "cpu" and bool(value.abs().sum() > 0) == ("lora_A" in key), key


@pytest.mark.parametrize("name", BASES)
def test_what_no_hook_loads_is_refused(name: str, tmp_path: Path) -> None:
    """Weights that lie elsewhere than the hidden states, with nothing that would bring them."""
    model = adapted(BASES[name](tmp_path / "base"))
    layer = experts_of(model)[0]
    hidden = torch.randn(4, next(iter(layer.stores.values())).shape[2])
    index, weight = torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.5)
    layer.run_experts(hidden, index, weight)
    layer.base_layer.to_empty(device="meta") if not hasattr(layer.base_layer, "packed_weights") else _to_meta(layer)
    with pytest.raises(ValueError, match=r"hidden states are on cpu, but weights .* on meta.*no hook"):
        layer.run_experts(hidden, index, weight)


def test_adapters_elsewhere_are_refused(tmp_path: Path) -> None:
    model = adapted(BASES["dense"](tmp_path))
    layer = experts_of(model)[0]
    for child in layer.projections.values():
        child.to("meta")
    hidden = torch.randn(4, next(iter(layer.stores.values())).shape[2])
    with torch.no_grad(), pytest.raises(ValueError, match="hidden states are on cpu, but adapters on meta"):
        layer.run_experts(hidden, torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.5))


def test_experts_that_are_divided_are_refused() -> None:
    """A list of which some experts were moved away."""
    for base in fp8_list(fp8_linear):
        model = adapted(base)
        layer = experts_of(model)[0]
        list(layer.base_layer.children())[-1].to("meta")
        hidden = torch.randn(4, next(iter(layer.stores.values())).shape[2])
        with torch.no_grad(), pytest.raises(ValueError, match="several devices|on the meta device"):
            layer.run_experts(hidden, torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.5))


def _to_meta(layer: Any) -> None:
    for key, value in list(layer.base_layer.named_parameters(recurse=False)):
        setattr(layer.base_layer, key, nn.Parameter(value.data.to("meta"), requires_grad=False))

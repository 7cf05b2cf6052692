"""The same adapter in stock PEFT: equal logits, gradients and merged weights.

Stock PEFT adapts stacked experts through `target_parameters`. It holds A as `(E * r, in)` and B as `(out, r * E)` with
the expert index fastest: column j of B belongs to expert j % E. The conversion below is written out here, by index.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from peft_moe import MoELoraConfig
from tests.reference import relative
from tests.zoo import ENTRIES, first_floating, loss
from tests.zoo.builder import build_model

STACKED = int(transformers.__version__.partition(".")[0]) >= 5
pytestmark = pytest.mark.skipif(not STACKED, reason="stock PEFT adapts stacked experts, which transformers 5 has")

BOTH = ("gate_up_proj", "down_proj")
RANK, ALPHA = 3, 7.5


def square(name: str) -> nn.Module:
    """A model in which in and out of gate_up have one size, 2I == H == 64."""
    module, model_class, inner = {
        "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", "moe_intermediate_size"),
        "mixtral": ("mixtral", "MixtralForCausalLM", "intermediate_size"),
        "gpt_oss": ("gpt_oss", "GptOssForCausalLM", "intermediate_size"),
        "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM", "moe_intermediate_size"),
    }[name]
    model = build_model(module, model_class, {inner: 32})
    shapes = {tuple(one.shape[1:]) for key, one in model.named_parameters() if key.endswith("experts.gate_up_proj")}
    assert shapes == {(64, 64)}
    return model


def build(name: str, kind: str) -> nn.Module:
    return square(name) if kind == "square" else ENTRIES[name].build()


def ours(base: nn.Module, targets: tuple[str, ...], **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = MoELoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[], target_experts=list(targets), init_lora_weights=False, **options
    )
    return get_peft_model(base, config)


def stock_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) -> A (E * r, in) and B (out, r * E), number by number where it matters."""
    experts, rank, _ = a.shape
    stock_b = b.new_zeros(b.shape[1], rank * experts)
    for expert in range(experts):
        for row in range(rank):
            stock_b[:, row * experts + expert] = b[expert, :, row]
    return torch.cat(list(a)), stock_b


def stock(base: nn.Module, adapted: PeftModel, targets: tuple[str, ...], **options: Any) -> PeftModel:
    """Stock PEFT on `base` with the values of `adapted`."""
    names = [f"experts.{target}" for target in targets]
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names, **options)
    )
    values = {key.removesuffix(".default"): value.detach() for key, value in adapted.named_parameters()}
    done = 0
    for wrapper, path in wrappers(model):
        a, b = (values[f"{path}.{factor}"] for factor in ("lora_A", "lora_B"))
        pair = zip((wrapper.lora_A.default, wrapper.lora_B.default), stock_factors(a, b), strict=True)
        for linear, value in pair:
            assert linear.weight.shape == value.shape
            linear.weight.data.copy_(value)
        done += 1
    assert done == 2 * len(targets), "two layers were expected"
    return model


def wrappers(model: PeftModel) -> list[tuple[ParamWrapper, str]]:
    """Stock PEFT's wrappers, and the path that the same projection has in our model."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            found.append((module, f"{name.replace('.base_layer', '')}.{module.parameter_name}"))
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected.double()).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["plain", "square"])
@pytest.mark.parametrize("targets", [BOTH, ("gate_up_proj",), ("down_proj",)], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_equal(name: str, targets: tuple[str, ...], kind: str) -> None:
    base = build(name, kind)
    inputs = ENTRIES[name].inputs(base)
    with torch.no_grad():
        before = first_floating(base(**inputs))
    mine = ours(copy.deepcopy(base), targets)
    theirs = stock(base, mine, targets)

    with torch.no_grad():
        found, expected = (first_floating(model(**inputs)) for model in (mine, theirs))
    assert relative(expected, before) > 1e-3, "the adapter does nothing"
    assert close(found, expected)

    for model in (mine, theirs):
        loss(model, inputs).backward()
    grads = {key.removesuffix(".default"): value.grad for key, value in mine.named_parameters()}
    for wrapper, path in wrappers(theirs):
        pair = stock_factors(grads[f"{path}.lora_A"], grads[f"{path}.lora_B"])
        for mine_grad, linear in zip(pair, (wrapper.lora_A.default, wrapper.lora_B.default), strict=True):
            assert relative(mine_grad, linear.weight.grad) < 1e-4, path

    mine, theirs = (model.merge_and_unload().state_dict() for model in (mine, theirs))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert close(mine[key], value), key


@pytest.mark.parametrize("kind", ["plain", "square"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_equal_after_a_round_trip_through_a_file(name: str, kind: str, tmp_path: Path) -> None:
    """What is read back is what stock PEFT has, not what the same wrong reading turns it into and back."""
    base = build(name, kind)
    inputs = ENTRIES[name].inputs(base)
    mine = ours(copy.deepcopy(base), BOTH)
    theirs = stock(copy.deepcopy(base), mine, BOTH)
    mine.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        found, expected = (first_floating(model(**inputs)) for model in (reloaded, theirs))
    assert close(found, expected)
    for wrapper, path in wrappers(theirs):
        values = {key.removesuffix(".default"): value for key, value in reloaded.named_parameters()}
        a, b = stock_factors(values[f"{path}.lora_A"], values[f"{path}.lora_B"])
        assert torch.equal(a, wrapper.lora_A.default.weight) and torch.equal(b, wrapper.lora_B.default.weight)


def test_rslora() -> None:
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    mine = ours(copy.deepcopy(base), BOTH, use_rslora=True)
    theirs = stock(base, mine, BOTH, use_rslora=True)
    with torch.no_grad():
        found, expected = (first_floating(model(**inputs)) for model in (mine, theirs))
    assert close(found, expected)


def test_attention_and_experts_together() -> None:
    """Linears go through PEFT's own layers: with the same values the whole models agree."""
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    torch.manual_seed(1)
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
    mine = get_peft_model(copy.deepcopy(base), MoELoraConfig(init_lora_weights=False, **options))
    theirs = get_peft_model(base, LoraConfig(target_parameters=[f"experts.{target}" for target in BOTH], **options))
    values = {key.removesuffix(".default"): value.detach() for key, value in mine.named_parameters()}
    for wrapper, path in wrappers(theirs):
        a, b = stock_factors(values[f"{path}.lora_A"], values[f"{path}.lora_B"])
        wrapper.lora_A.default.weight.data.copy_(a)
        wrapper.lora_B.default.weight.data.copy_(b)
    linears = [key for key in values if "self_attn" in key and "lora_" in key]
    assert len(linears) == 8
    parameters = dict(theirs.named_parameters())
    for key in linears:
        parameters[key].data.copy_(values[key])
    with torch.no_grad():
        found, expected = (first_floating(model(**inputs)) for model in (mine, theirs))
    assert close(found, expected)
    mine, theirs = (model.merge_and_unload().state_dict() for model in (mine, theirs))
    for key, value in theirs.items():
        assert close(mine[key], value), key

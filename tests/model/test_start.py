"""How adapters start: neutral where they must be, and what each initialisation promises of A, B and the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_moe import MoELoraConfig
from tests.model.dense import Dense, Options, adapter_keys, assert_matches, gradients
from tests.reference import relative
from tests.zoo import ENTRIES, first_floating

MODELS = ["qwen3_moe", "gpt_oss"]
ALL = [True, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", False]
DECOMPOSING = ["pissa", "pissa_niter_4", "olora"]
RANK, SCALING = 4, 1.5

VARIANTS: dict[str, tuple[dict[str, Any], Options]] = {
    "plain": ({}, Options(lambda layer, expert: SCALING)),
    "split": ({"split_gate_up": True}, Options(lambda layer, expert: SCALING)),
    "dora": ({"use_dora": True}, Options(lambda layer, expert: SCALING, dora=True)),
    "dora, split": ({"use_dora": True, "split_gate_up": True}, Options(lambda layer, expert: SCALING, dora=True)),
    "ranks, subset": (
        {"expert_rank_pattern": {r"experts\.2": 2}, "expert_indices": [0, 2]},
        Options(lambda layer, expert: 3.0 if expert == 2 else SCALING, lambda layer: [0, 2], lambda layer: [RANK, 2]),
    ),
    "outer": ({"share_experts": "outer"}, Options(lambda layer, expert: SCALING)),
}


def start(base: nn.Module, init: bool | str, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = MoELoraConfig(
        r=RANK, lora_alpha=RANK * SCALING, target_modules=[], init_lora_weights=init, **options
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(base), config)


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    base = ENTRIES[name].build()
    return base, ENTRIES[name].inputs(base)


def unadapted(model: PeftModel) -> nn.Module:
    """The base as it is now, without the adapter."""
    return copy.deepcopy(model).unload()


def expert_weights(model: nn.Module, owner: str, slot: str) -> list[Tensor]:
    """(out, in) of every expert; for a list, gate over up."""
    module = model.get_submodule(owner)
    if isinstance(module, nn.ModuleList):
        parts = ("gate_proj", "up_proj") if slot == "gate_up_proj" else ("down_proj",)
        return [torch.cat([getattr(expert, part).weight for part in parts]) for expert in module]
    stack = getattr(module, slot)
    return list(stack.mT if type(module).__name__ == "GptOssExperts" else stack)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", ALL, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_start(name: str, init: bool | str, variant: str) -> None:
    options, written = VARIANTS[variant]
    if variant == "outer" and init in DECOMPOSING:
        pytest.skip("refused: tests/test_config.py")
    base, inputs = built(name)
    model = start(base, init, **options)
    plain = unadapted(model)
    with torch.no_grad():
        before, found, residual = (first_floating(one(**inputs)) for one in (base, model, plain))

    neutral = init is not False
    assert (relative(found, before) < 2e-5) is neutral, "the adapter is not neutral" if neutral else "nothing happens"
    assert (relative(residual, before) > 1e-3) is (init in DECOMPOSING), "the base holds the wrong part"
    if init not in DECOMPOSING:
        after = plain.state_dict()
        for key, value in base.state_dict().items():
            assert torch.equal(after[key], value), f"{key} was changed"

    # From the start on, the model is the base as it is now with the adapter written in; and it can learn.
    dense = Dense(plain, model, written)
    with torch.no_grad():
        assert relative(found, dense.output(inputs)) < 2e-5
    wanted, grads = dense.gradients(inputs), gradients(model, inputs)
    moving = {key for key, grad in grads.items() if grad.any()}
    assert moving == {key for key, grad in wanted.items() if grad.norm() > 1e-9}
    assert any("lora_B" in key for key in moving)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one += 0.05 * torch.randn(one.shape)
    assert_matches(model, Dense(plain, model, written), inputs)


@pytest.mark.parametrize("name", MODELS)
def test_default_and_gaussian_spread(name: str) -> None:
    base, _ = built(name)
    for init in (True, "gaussian"):
        parameters = dict(start(base, init).named_parameters())
        for keys in adapter_keys(start(base, init)).values():
            a, b = parameters[keys["lora_A"]], parameters[keys["lora_B"]]
            assert not b.any()
            if init is True:  # as nn.Linear: uniform up to one over the root of the input width
                bound = a.shape[2] ** -0.5
                assert a.abs().max() <= bound and abs(a.std() / (bound / 3**0.5) - 1) < 0.1
            else:
                assert abs(a.std() * RANK - 1) < 0.1 and abs(a.mean() * RANK) < 0.1
            assert all(not torch.equal(a[0], one) for one in a[1:]), "experts start alike"


@pytest.mark.parametrize("name", MODELS)
def test_orthogonal_spans(name: str) -> None:
    """Neither factor is zero, and their product is."""
    base, _ = built(name)
    model = start(base, "orthogonal")
    parameters = dict(model.named_parameters())
    for keys in adapter_keys(model).values():
        a, b = parameters[keys["lora_A"]].detach(), parameters[keys["lora_B"]].detach()
        assert (torch.linalg.matrix_rank(a) == RANK // 2).all() and (torch.linalg.matrix_rank(b) == RANK // 2).all()
        assert (b @ a).abs().max() < 1e-6


@pytest.mark.parametrize("init", DECOMPOSING)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_taken_out(name: str, init: str) -> None:
    """PiSSA takes the largest singular values, OLoRA the first directions of a QR decomposition; the sum stays."""
    base, _ = built(name)
    model = start(base, init)
    plain, parameters = unadapted(model), dict(model.named_parameters())
    for (owner, slot), keys in adapter_keys(model).items():
        factors = zip(parameters[keys["lora_A"]], parameters[keys["lora_B"]], strict=True)
        weights = zip(expert_weights(base, owner, slot), expert_weights(plain, owner, slot), strict=True)
        for (a, b), (weight, rest) in zip(factors, weights, strict=True):
            a, b, weight, rest = (one.detach().double() for one in (a, b, weight, rest))
            assert relative(rest + SCALING * b @ a, weight) < 1e-6
            values = torch.linalg.svdvals(weight)
            best = values[RANK:].norm()
            if init == "olora":
                assert relative(b.T @ b, torch.eye(RANK)) < 1e-5
                assert relative(a, b.T @ weight) < 1e-5 or relative(SCALING * a, b.T @ weight) < 1e-5
            elif init == "pissa":
                assert abs(rest.norm() / best - 1) < 1e-5
                assert relative(torch.linalg.svdvals(SCALING * b @ a)[:RANK], values[:RANK]) < 1e-5
                assert relative(a @ a.T, b.T @ b) < 1e-4, "the root of the values goes to both sides"
            else:
                assert rest.norm() < 1.05 * best, "the randomised decomposition is far from the best"


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", MODELS)
def test_reading_a_decomposing_adapter(name: str, init: str, low_memory: bool, tmp_path: Path) -> None:
    """On a fresh base the residual is made anew, as PEFT does for linears."""
    base, inputs = built(name)
    model = start(base, init)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one += 0.05 * torch.randn(one.shape)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
    with torch.no_grad():
        expected = first_floating(model(**inputs))
        assert relative(expected, first_floating(base(**inputs))) > 1e-3
        assert relative(first_floating(reloaded(**inputs)), expected) < 1e-6


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decomposing_in_low_precision(init: str, dtype: torch.dtype) -> None:
    """Base and adapter together give the weight back to rounding, whatever the scaling."""
    base = ENTRIES["qwen3_moe"].build().to(dtype)
    model = start(base, init)
    dense = Dense(unadapted(model), model, Options(lambda layer, expert: SCALING))
    original = dict(base.named_parameters())
    for key, value in dense.weights.items():
        assert relative(value, original[key]) < torch.finfo(dtype).eps

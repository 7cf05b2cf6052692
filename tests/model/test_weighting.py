"""`add_weighted_adapter`: against the weighted sum of the deltas where it is exact, else against PEFT's own arithmetic
applied to the 2-D factors, or deltas, of each expert."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from tests.model.deltas import Deltas, add, deltas, logits, randomise, with_deltas
from tests.model.tiny import BUILDERS, CLOSE, EXPERTS, MODELS, adapter_parameters, config, experts_of, text
from tests.reference import relative

WEIGHTS = [0.7, -0.4]
EXACT = [("cat", {}), ("svd", {"svd_rank": 24})]
FACTORS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda tensors, weights: task_arithmetic(tensors, weights),
    "ties": lambda tensors, weights: ties(tensors, weights, 0.5),
    "magnitude_prune": lambda tensors, weights: magnitude_prune(tensors, weights, 0.5),
}


def pair(name: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[nn.Module, PeftModel]:
    """A base and a model with the adapters `x` and `y`, filled with random values."""
    base = BUILDERS[name]()
    model = get_peft_model(copy.deepcopy(base), config(**first), adapter_name="x")
    model.add_adapter("y", config(**second))
    randomise(model, "x", 1, scale=0.2)
    randomise(model, "y", 2, scale=0.2)
    return base, model


def combine(model: PeftModel, combination: str, weights: list[float] = WEIGHTS, **options: Any) -> None:
    model.add_weighted_adapter(["x", "y"], weights, "new", combination_type=combination, **options)
    model.set_adapter("new")


def weighted(*pairs: tuple[float, Deltas]) -> Deltas:
    return add(*({where: weight * value for where, value in one.items()} for weight, one in pairs))


def assert_adds(name: str, base: nn.Module, model: PeftModel, expected: Deltas) -> None:
    """The new adapter, which is active and alone, adds exactly this to the experts."""
    inputs = text(base)
    reference = logits(with_deltas(base, expected), inputs)
    assert relative(logits(base, inputs), reference) > 1e-3
    assert relative(logits(model, inputs), reference) < CLOSE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("combination", "options"), EXACT)
def test_exact_combinations(name: str, combination: str, options: dict[str, Any]) -> None:
    base, model = pair(name, {}, {"r": 5, "lora_alpha": 2})
    combine(model, combination, **options)
    count = EXPERTS[name]
    x, y = deltas(model, "x", 2.0, num_experts=count), deltas(model, "y", 0.4, num_experts=count)
    expected = weighted((0.7, x), (-0.4, y))
    assert_adds(name, base, model, expected)
    found = deltas(model, "new", 1.0, num_experts=count)
    assert found.keys() == expected.keys()
    for where, value in expected.items():
        assert relative(found[where], value) < 1e-5, where


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("combination", "options"), EXACT)
def test_different_experts_targets_and_scalings(name: str, combination: str, options: dict[str, Any]) -> None:
    layers = {0: [1, 3], 1: [2]}
    base, model = pair(
        name,
        {"target_experts": ["gate_up_proj"], "expert_indices": [0, 2], "use_rslora": True, "lora_alpha": 3},
        {"r": 4, "expert_indices": layers, "expert_r": 2, "expert_alpha": 5},
    )
    combine(model, combination, **options)
    count = EXPERTS[name]
    x = deltas(model, "x", 3 / math.sqrt(3), [0, 2], num_experts=count)
    y = deltas(model, "y", 2.5, layers, num_experts=count)
    assert_adds(name, base, model, weighted((0.7, x), (-0.4, y)))
    assert [layer.adapters["new"].experts for layer in experts_of(model)] == [(0, 1, 2, 3), (0, 2)]


@pytest.mark.parametrize(("combination", "options"), EXACT)
def test_split_shared_and_ragged_adapters(combination: str, options: dict[str, Any]) -> None:
    base, model = pair("qwen3_moe", {"split_gate_up": True}, {"r": 4, "share_experts": "outer"})
    combine(model, combination, **options)
    assert_adds("qwen3_moe", base, model, weighted((0.7, deltas(model, "x", 2.0)), (-0.4, deltas(model, "y", 1.5))))

    pattern = {"expert_rank_pattern": {r".*\.1": 5}, "expert_alpha_pattern": {r".*\.2": 12}}
    base, model = pair("qwen3_moe", pattern, {})
    combine(model, combination, **options)
    x = deltas(model, "x", [2, 1.2, 4, 2], ranks=[3, 5, 3, 3])
    assert_adds("qwen3_moe", base, model, weighted((0.7, x), (-0.4, deltas(model, "y", 2.0))))


def test_two_split_adapters_stay_split() -> None:
    base, model = pair("qwen3_moe", {"split_gate_up": True}, {"r": 4, "split_gate_up": True})
    combine(model, "cat")
    assert {"gate_proj", "up_proj", "down_proj"} == set(experts_of(model)[0].projections)
    assert deltas(model, "new", 1.0).keys() == deltas(model, "x", 1.0).keys()
    assert_adds("qwen3_moe", base, model, weighted((0.7, deltas(model, "x", 2.0)), (-0.4, deltas(model, "y", 1.5))))


def factors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return {
        key.replace(f".{adapter}", ""): parameter.detach()
        for key, parameter in adapter_parameters(model, adapter).items()
        if parameter.dim() == 3
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("combination", list(FACTORS))
def test_combinations_of_factors(name: str, combination: str) -> None:
    base, model = pair(name, {}, {"lora_alpha": 3, "expert_indices": [0, 2]})
    combine(model, combination, **({} if combination == "linear" else {"density": 0.5}))
    new, x, y = (factors(model, adapter) for adapter in ("new", "x", "y"))
    roots = [math.sqrt(0.7 * 2.0), math.sqrt(0.4 * 1.0)]
    for key, found in new.items():
        signs = [1, -1] if "lora_A" in key else [1, 1]
        for expert in range(EXPERTS[name]):
            tensors, scales = [x[key][expert]], [roots[0] * signs[0]]
            if expert in (0, 2):
                tensors.append(y[key][expert // 2])
                scales.append(roots[1] * signs[1])
            expected = FACTORS[combination](tensors, torch.tensor(scales))
            assert relative(found[expert], expected) < 1e-5, (key, expert)
    assert_adds(name, base, model, deltas(model, "new", 1.0, num_experts=EXPERTS[name]))


def test_factors_are_weighted_by_the_scaling_of_each_expert() -> None:
    _, model = pair("qwen3_moe", {"expert_alpha_pattern": {r".*\.1": 12}}, {"lora_alpha": 3})
    combine(model, "linear", [0.7, 0.4])
    new, x, y = (factors(model, adapter) for adapter in ("new", "x", "y"))
    for key, found in new.items():
        for expert, scaling in enumerate([2, 4, 2, 2]):
            expected = math.sqrt(0.7 * scaling) * x[key][expert] + math.sqrt(0.4) * y[key][expert]
            assert relative(found[expert], expected) < 1e-5, (key, expert)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("combination", ["ties_svd", "magnitude_prune_svd"])
def test_combinations_of_deltas(name: str, combination: str) -> None:
    base, model = pair(name, {}, {"r": 5, "lora_alpha": 2})
    combine(model, combination, svd_rank=64, density=0.4, majority_sign_method="total")
    count = EXPERTS[name]
    x, y = deltas(model, "x", 2.0, num_experts=count), deltas(model, "y", 0.4, num_experts=count)
    arithmetic = {"ties_svd": ties, "magnitude_prune_svd": magnitude_prune}[combination]
    expected = {
        where: torch.stack(
            [arithmetic([a, b], torch.tensor(WEIGHTS), 0.4) for a, b in zip(x[where], y[where], strict=True)]
        )
        for where in x
    }
    found = deltas(model, "new", 1.0, num_experts=count)
    for where, value in expected.items():
        assert relative(found[where], value) < 1e-4, where
    assert_adds(name, base, model, expected)


def dropped(a: Tensor, b: Tensor, weights: list[float], density: float, elect: bool) -> list[Tensor]:
    """What an entry can be after random entries of a and b were dropped: one tensor for each of the four outcomes."""
    found = []
    for keep_a, keep_b in itertools.product([0, 1], repeat=2):
        stack = torch.stack([a * keep_a, b * keep_b]) / density
        scaled = stack * torch.tensor(weights, dtype=a.dtype).view(2, 1, 1)
        if not elect:
            found.append(scaled.sum(dim=0))
            continue
        majority = torch.where(stack.sum(dim=0) >= 0, 1, -1)
        agrees = stack.sign() == majority
        found.append((scaled * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1))
    return found


def distance(found: Tensor, outcomes: list[Tensor]) -> float:
    """The largest distance of an entry from the nearest of its possible values."""
    return float(torch.stack([(found - outcome).abs() for outcome in outcomes]).amin(dim=0).max())


@pytest.mark.parametrize("elect", [False, True], ids=["dare_linear", "dare_ties"])
def test_random_combinations(elect: bool) -> None:
    combination = "dare_ties" if elect else "dare_linear"
    base, model = pair("qwen3_moe", {}, {"lora_alpha": 3})
    combine(model, combination, density=0.5)
    new, x, y = (factors(model, adapter) for adapter in ("new", "x", "y"))
    roots = [math.sqrt(0.7 * 2.0), math.sqrt(0.4 * 1.0)]
    for key, found in new.items():
        weights = [roots[0], -roots[1]] if "lora_A" in key else roots
        for expert in range(4):
            assert distance(found[expert], dropped(x[key][expert], y[key][expert], weights, 0.5, elect)) < 1e-5, key
        share = float((found == 0).float().mean())
        assert 0.15 < share < 0.35, "a quarter of the entries is dropped in both"
    assert_adds("qwen3_moe", base, model, deltas(model, "new", 1.0))

    _, model = pair("qwen3_moe", {}, {"lora_alpha": 3})
    combine(model, f"{combination}_svd", density=0.5, svd_rank=64)
    x, y, found = (deltas(model, one, scale) for one, scale in (("x", 2.0), ("y", 1.0), ("new", 1.0)))
    for where, value in found.items():
        for expert in range(4):
            assert distance(value[expert], dropped(x[where][expert], y[where][expert], WEIGHTS, 0.5, elect)) < 1e-4


def test_svd_keeps_the_largest_directions() -> None:
    _, model = pair("qwen3_moe", {}, {"r": 5})
    combine(model, "svd")  # of the largest rank, 5
    x, y, found = (deltas(model, one, scale) for one, scale in (("x", 2.0), ("y", 1.2), ("new", 1.0)))
    for where, value in weighted((0.7, x), (-0.4, y)).items():
        assert factors(model, "new")[f"base_model.model.{where[0]}.down_proj.lora_A"].shape[1] == 5
        for expert in range(4):
            u, s, vh = torch.linalg.svd(value[expert])
            assert relative(found[where][expert], u[:, :5] * s[:5] @ vh[:5]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_linears_and_experts_together(name: str, tmp_path: Any) -> None:
    targets = {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}
    base, model = pair(name, targets, targets | {"expert_indices": {0: [1]}})
    combine(model, "cat")
    inputs = text(base)
    found = logits(model, inputs)
    count = EXPERTS[name]
    scaling = 6 / math.sqrt(3)
    x, y = deltas(model, "x", scaling, num_experts=count), deltas(model, "y", scaling, {0: [1]}, num_experts=count)
    reference = with_deltas(base, weighted((0.7, x), (-0.4, y)))
    for key, module in model.named_modules():
        if key.endswith(("q_proj", "o_proj")):
            with torch.no_grad():
                weight = reference.get_submodule(key.removeprefix("base_model.model.")).weight
                weight += 0.7 * module.get_delta_weight("x") - 0.4 * module.get_delta_weight("y")
    assert relative(found, logits(reference, inputs)) < CLOSE
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    assert relative(logits(reloaded, inputs), found) < 1e-6


def test_adapters_on_different_layers() -> None:
    base, model = pair("qwen3_moe", {"layers_to_transform": [0]}, {"layers_to_transform": 1})
    combine(model, "linear", [0.7, 0.4])
    assert_adds("qwen3_moe", base, model, weighted((0.7, deltas(model, "x", 2.0)), (0.4, deltas(model, "y", 2.0))))
    assert len(experts_of(model)) == 2


def test_experts_that_the_new_config_would_lose_are_an_error() -> None:
    _, model = pair("qwen3_moe", {"exclude_modules": r".*layers\.0\..*"}, {})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*'y'.*'x'"):
        combine(model, "cat")
    assert "new" not in model.peft_config and not adapter_parameters(model, "new")
    model.add_weighted_adapter(["y", "x"], [1.0, 1.0], "new", combination_type="cat")  # the other way round holds


def test_one_adapter_is_a_copy_with_a_weight() -> None:
    base, model = pair("qwen3_moe", {}, {})
    model.add_weighted_adapter(["x"], [-0.5], "new", combination_type="svd")
    model.set_adapter("new")
    assert_adds("qwen3_moe", base, model, deltas(model, "x", -1.0))


def test_sixteen_bit_adapters() -> None:
    base = BUILDERS["qwen3_moe"]()
    model = get_peft_model(copy.deepcopy(base).bfloat16(), config(), adapter_name="x", autocast_adapter_dtype=False)
    model.add_adapter("y", config(r=5), autocast_adapter_dtype=False)
    combine(model, "svd", svd_rank=8)
    expected = weighted((0.7, deltas(model, "x", 2.0)), (-0.4, deltas(model, "y", 1.2)))
    found = deltas(model, "new", 1.0)
    assert {parameter.dtype for parameter in adapter_parameters(model, "new").values()} <= {
        torch.bfloat16,
        torch.float32,
    }
    assert all(relative(found[where], value) < 1e-2 for where, value in expected.items())


def test_refused() -> None:
    _, model = pair("qwen3_moe", {}, {"r": 5})
    for combination in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(ValueError, match="rank|same r"):
            combine(model, combination, density=0.5)
    with pytest.raises(ValueError, match="combination_type"):
        combine(model, "average")
    with pytest.raises(ValueError, match="does not exist"):
        model.add_weighted_adapter(["x", "z"], [1.0, 1.0], "new", combination_type="cat")
    _, model = pair("qwen3_moe", {}, {"use_dora": True})
    with pytest.raises(ValueError, match="(?i)experts.*'y'.*DoRA"):
        combine(model, "cat")
    assert set(model.peft_config) == {"x", "y"}

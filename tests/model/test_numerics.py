"""Numbers: low precision, dropout, DoRA, patterns, subsets, split and shared factors, against dense weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.model.dense import PREFIX, Dense, Options, adapter_keys, assert_matches, gradients, objective
from tests.ops.cases import poisoned
from tests.reference import relative
from tests.zoo import ENTRIES, first_floating
from tests.zoo.builder import build_model

MODELS = ["qwen3_moe", "gpt_oss"]  # gate and up one after the other, or alternating, transposed and with biases
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}


def adapted(base: nn.Module, *, autocast: bool = True, **options: Any) -> PeftModel:
    """A copy of the base with an adapter that does something."""
    torch.manual_seed(1)
    values = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False} | options
    return get_peft_model(copy.deepcopy(base), MoELoraConfig(**values), autocast_adapter_dtype=autocast)


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    base = ENTRIES[name].build()
    return base, ENTRIES[name].inputs(base)


def moved(model: nn.Module) -> nn.Module:
    """Change every trainable parameter, so that none is where its initialisation put it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one += 0.1 * torch.randn(one.shape, generator=generator).to(one.dtype)
    return model


def layers(model: nn.Module) -> list[MoELoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoELoraLayer)]


# --- options ---------------------------------------------------------------------------------------------------------

RANKS = {0: [3, 5, 3, 1], 1: [3, 3, 2, 3]}
RANK_PATTERN = {r"layers\.0\.mlp\.experts\.1": 5, r"layers\.0\.mlp\.experts\.3": 1, r"1\.mlp\.experts\.2": 2}
ALPHA_PATTERN = {r"experts\.0": 9.0, r"layers\.1\.mlp\.experts\.[23]": 1.5}
SUBSET = {0: [1, 3], 1: [0, 1, 2]}


def alpha_of(layer: int, expert: int) -> float:
    return 9.0 if expert == 0 else 1.5 if (layer, expert) in ((1, 2), (1, 3)) else 6.0


CASES: dict[str, tuple[dict[str, Any], Options]] = {
    "plain": ({}, Options()),
    "rslora": ({"use_rslora": True}, Options(lambda layer, expert: 6 / math.sqrt(3))),
    "expert_r": (
        {"r": 8, "lora_alpha": 3, "expert_r": 5, "expert_alpha": 4}, Options(lambda layer, expert: 4 / 5)
    ),
    "rank pattern": (
        {"expert_rank_pattern": RANK_PATTERN},
        Options(lambda layer, expert: 6 / RANKS[layer][expert], ranks=RANKS.get),
    ),
    "alpha pattern": (
        {"expert_alpha_pattern": ALPHA_PATTERN}, Options(lambda layer, expert: alpha_of(layer, expert) / 3)
    ),
    "both patterns, rslora": (
        {"expert_rank_pattern": RANK_PATTERN, "expert_alpha_pattern": ALPHA_PATTERN, "use_rslora": True},
        Options(lambda layer, expert: alpha_of(layer, expert) / math.sqrt(RANKS[layer][expert]), ranks=RANKS.get),
    ),
    "indices": ({"expert_indices": [3, 1]}, Options(experts=lambda layer: [1, 3])),
    "indices by layer": ({"expert_indices": SUBSET}, Options(experts=SUBSET.get)),
    "one layer": ({"expert_indices": {1: [2]}}, Options(experts=lambda layer: [2])),
    "split": ({"split_gate_up": True}, Options()),
    "outer": ({"share_experts": "outer"}, Options()),
    "gate_up alone": ({"target_experts": ["gate_up_proj"]}, Options()),
    "down alone": ({"target_experts": ["down_proj"]}, Options()),
    "split, patterns, indices": (
        {
            "split_gate_up": True, "expert_indices": SUBSET, "expert_rank_pattern": RANK_PATTERN,
            "expert_alpha_pattern": ALPHA_PATTERN,
        },
        Options(
            lambda layer, expert: alpha_of(layer, expert) / RANKS[layer][expert], SUBSET.get,
            lambda layer: [RANKS[layer][expert] for expert in SUBSET[layer]],
        ),
    ),
    "outer, rslora": (
        {"share_experts": "outer", "use_rslora": True}, Options(lambda layer, expert: 6 / math.sqrt(3))
    ),
    "dora": ({"use_dora": True}, Options(dora=True)),
    "dora, split": ({"use_dora": True, "split_gate_up": True}, Options(dora=True)),
    "dora, indices": ({"use_dora": True, "expert_indices": SUBSET}, Options(experts=SUBSET.get, dora=True)),
    "dora, outer": ({"use_dora": True, "share_experts": "outer"}, Options(dora=True)),
    "dora, patterns, rslora": (
        {
            "use_dora": True, "use_rslora": True, "expert_rank_pattern": RANK_PATTERN,
            "expert_alpha_pattern": ALPHA_PATTERN,
        },
        Options(
            lambda layer, expert: alpha_of(layer, expert) / math.sqrt(RANKS[layer][expert]), ranks=RANKS.get, dora=True
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_option(name: str, case: str, tmp_path: Path) -> None:
    options, expected = CASES[case]
    base, inputs = built(name)
    model = moved(adapted(base, **options))
    assert_matches(model, Dense(base, model, expected), inputs)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(first_floating(reloaded(**inputs)), first_floating(model(**inputs)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_expert_never_exceeds_its_rank(name: str, dora: bool, tmp_path: Path) -> None:
    """Before and after optimizer steps with weight decay, and nothing beyond the ranks is saved."""
    base, inputs = built(name)
    model = moved(adapted(base, expert_rank_pattern=RANK_PATTERN, use_dora=dora))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        dense = Dense(base, model, Options(lambda layer, expert: 6 / RANKS[layer][expert], ranks=RANKS.get, dora=dora))
        with torch.no_grad():
            assert relative(first_floating(model(**inputs)), dense.output(inputs)) < 2e-5
        if not dora:  # the ranks seen from outside: of what merging adds
            check_ranks(model, base)
        gradients(model, inputs)
        optimizer.step()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for (owner, _), keys in adapter_keys(model).items():
        ranks = RANKS[int(owner.split(".")[2])]
        a, b = (saved[keys[factor].removesuffix(".default")] for factor in ("lora_A", "lora_B"))
        assert a.numel() + b.numel() == sum(ranks) * (a.shape[-1] + b.shape[-1])


def check_ranks(model: PeftModel, base: nn.Module) -> None:
    merged = copy.deepcopy(model).merge_and_unload()
    changes = {
        name: value.detach() - dict(base.named_parameters())[name].detach()
        for name, value in merged.named_parameters()
        if ".experts." in name and "bias" not in name
    }
    for name, change in changes.items():
        parts = name.split(".")
        listed = change.dim() == 2
        ranks = RANKS[int(parts[2])]
        for expert, one in [(int(parts[5]), change)] if listed else list(enumerate(change)):
            values = torch.linalg.svdvals(one.double())
            assert values[ranks[expert]] < 1e-4 * values[0] and values[ranks[expert] - 1] > 1e-3 * values[0], name


# --- low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name: str, dora: bool, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Against float64 on the same rounded weights; as far from it as the base is from its own float64.

    All experts are chosen: with a choice, a rounded router may choose another one.
    """
    base = build_model(name, CLASSES[name], {"num_experts_per_tok": 4}).to(dtype)
    inputs = ENTRIES[name].inputs(base)
    model = adapted(base, use_dora=dora)
    for one in model.parameters():
        if one.requires_grad:
            one.data = one.data.to(adapter_dtype)
    dense = Dense(base, model, Options(dora=dora))
    expected, wanted = dense.output(inputs).detach(), dense.gradients(inputs)
    with torch.no_grad():
        plain = relative(first_floating(base(**inputs)), first_floating(dense.base(**inputs)))
        found = first_floating(model(**inputs))
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert plain < 4 * eps  # a dozen roundings, each half an eps at most and of random sign
    assert relative(found, expected) < 2 * plain
    for key, gradient in gradients(model, inputs).items():
        assert gradient.dtype == adapter_dtype
        assert relative(gradient, wanted[key]) < 6 * max(eps, torch.finfo(adapter_dtype).eps), key
        cosine = F.cosine_similarity(gradient.double().flatten(), wanted[key].flatten(), dim=0)
        assert cosine > 1 - 50 * max(eps, torch.finfo(adapter_dtype).eps) ** 2, key


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_merge_rounds_once(name: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    base = ENTRIES[name].build().to(dtype)
    # Scalings that are no power of two, and rows that are mostly adapter: a factor rounded on the way would show.
    model = adapted(base, lora_alpha=7, expert_alpha_pattern={r"layers\.1\.mlp\.experts\.1": 1.7})
    for one in model.parameters():
        if one.requires_grad:
            one.data = one.data.to(adapter_dtype)
    dense = Dense(base, model, Options(lambda layer, expert: 1.7 / 3 if layer == expert == 1 else 7 / 3))
    merged = dict(model.merge_and_unload().named_parameters())
    for key, value in dense.weights.items():
        assert merged[key].dtype == dtype
        error = (merged[key].double() - value.detach()).abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        ulp = torch.exp2(torch.floor(torch.log2(value.detach().abs().clamp(min=1e-30)))) * torch.finfo(dtype).eps
        fp32 = 4 * torch.finfo(torch.float32).eps * value.detach().abs().max()  # of the sum, before it is rounded
        assert (error <= 0.5 * ulp + fp32 + smallest).all(), key


def test_float64_base() -> None:
    base, inputs = built("qwen3_moe")
    base = base.double()
    model = adapted(base, autocast=False)
    dense = Dense(base, model)
    assert {one.dtype for one in model.parameters()} == {torch.float64}
    with torch.no_grad():  # its norms and router compute in float32
        assert relative(first_floating(model(**inputs)), dense.output(inputs)) < 1e-7


# --- dropout ---------------------------------------------------------------------------------------------------------


def capture(layer: MoELoraLayer) -> dict[str, Any]:
    """What the experts are called with, the random state before, and what they return."""
    seen: dict[str, Any] = {}
    run = layer.run_experts

    def wrapped(x: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.update(x=x.detach(), index=index, weights=weights.detach(), state=torch.get_rng_state())
        seen["out"] = run(x, index, weights, *args, **kwargs)
        return seen["out"]

    layer.run_experts = wrapped  # type: ignore[method-assign]
    return seen


def dropped_by_hand(base: nn.Module, model: PeftModel, owner: str, seen: dict[str, Any], rate: float) -> Tensor:
    """A loop over rows in float64: `W x + s B A dropout(x)` in both projections; a mask a projection, over sorted rows.

    Returns (T, H).
    """
    parameters = {key.removeprefix(PREFIX): value.detach().double() for key, value in model.named_parameters()}
    factors = {slot: [parameters[f"{owner}.{slot}.{one}.default"] for one in ("lora_A", "lora_B")]
               for slot in ("gate_up_proj", "down_proj")}  # fmt: skip
    dense = Dense(base, model)
    module = dense.base.get_submodule(owner)
    listed, oss = isinstance(module, nn.ModuleList), hasattr(module, "gate_up_proj_bias")

    def weights(slot: str, expert: int) -> tuple[Tensor, Tensor | float]:
        if listed:
            mlp = module[expert]
            return (torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) if slot != "down_proj"
                    else mlp.down_proj.weight), 0.0  # fmt: skip
        one = getattr(module, slot)[expert]
        return (one.T, getattr(module, f"{slot}_bias")[expert]) if oss else (one, 0.0)

    x, choices = seen["x"].double(), seen["index"]
    rows = sorted((int(expert), place) for place, expert in enumerate(choices.flatten()))
    torch.set_rng_state(seen["state"])
    mask = F.dropout(torch.ones(len(rows), x.shape[1]), rate).double()
    inner = factors["down_proj"][0].shape[2]
    second = F.dropout(torch.ones(len(rows), inner), rate).double()
    out = torch.zeros_like(x)
    for number, (expert, place) in enumerate(rows):
        token, choice = divmod(place, choices.shape[1])

        def project(slot: str, row: Tensor, kept: Tensor, expert: int = expert) -> Tensor:
            weight, bias = weights(slot, expert)
            a, b = factors[slot][0][expert], factors[slot][1][expert]
            return weight @ row + bias + 2.0 * b @ (a @ (row * kept))

        pre = project("gate_up_proj", x[token], mask[number])
        if oss:
            gate, up = pre[::2].clamp(max=module.limit), pre[1::2].clamp(-module.limit, module.limit)
            hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        else:
            hidden = F.silu(pre[: len(pre) // 2]) * pre[len(pre) // 2 :]
        out[token] += seen["weights"][token, choice].double() * project("down_proj", hidden, second[number])
    return out.detach()


@pytest.mark.parametrize("name", MODELS)
def test_dropout_formula(name: str) -> None:
    base, inputs = built(name)
    model = adapted(base, lora_dropout=0.4).train()
    owners = sorted({owner for owner, _ in adapter_keys(model)})
    seen = [capture(layer) for layer in layers(model)]
    model(**inputs)
    for owner, one in zip(owners, seen, strict=True):
        expected = dropped_by_hand(base, model, owner, one, 0.4)
        assert relative(one["out"].reshape(expected.shape), expected) < 2e-6
        one["state"] = torch.Generator().manual_seed(99).get_state()
        assert relative(dropped_by_hand(base, model, owner, one, 0.4), expected) > 1e-2, "the mask does not matter"


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_off_in_eval(name: str) -> None:
    base, inputs = built(name)
    model = adapted(base, lora_dropout=0.4)
    model.train()
    with torch.no_grad():
        first, second = (first_floating(model(**inputs)) for _ in range(2))
    assert relative(first, second) > 1e-3
    model.eval()
    assert_matches(model, Dense(base, model), inputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"use_dora": True, "lora_dropout": 0.3}], ids=["plain", "dropout", "dora"]
)
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name: str, options: dict[str, Any], reentrant: bool) -> None:
    """The same loss and gradients as without, with the same masks."""
    base, inputs = built(name)
    model = adapted(base, **options).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model.zero_grad()
        value = objective(first_floating(model(**inputs)))
        value.backward()
        grads = {key: one.grad.clone() for key, one in model.named_parameters() if one.requires_grad}
        found.append((value.detach(), grads))
    (plain, grads), (again, again_grads) = found
    assert torch.equal(plain, again)
    for key, grad in grads.items():
        assert grad.any() and torch.equal(grad, again_grads[key]), key


# --- sentinels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_no_expert(name: str, options: dict[str, Any]) -> None:
    """An index past the experts counts as no choice at all: as if its weight were zero, in every gradient.

    What a grouped product leaves in those rows is made NaN here.
    """
    base, _ = built(name)
    model = moved(adapted(base, **options))
    layer = layers(model)[0]
    layer.train("lora_dropout" in options)
    index, weights = torch.tensor([[0, 4], [3, 2], [4, 4], [4, 1]]), torch.rand(4, 2) + 0.2
    found = []
    for sentinel in (True, False):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        w = torch.where(index == 4, 0.0, weights).requires_grad_()
        torch.manual_seed(3)
        model.zero_grad()
        with poisoned():
            chosen = index if sentinel else index.clamp(max=3)
            out = layer.run_experts(x, chosen, w)
            out.square().sum().backward()
        grads = {key: one.grad.clone() for key, one in layer.named_parameters() if one.requires_grad}
        found.append({"out": out.detach(), "d x": x.grad, "d w": torch.where(index == 4, 0.0, w.grad)} | grads)
        if sentinel:
            assert not w.grad[index == 4].any()
    for key, value in found[0].items():
        assert torch.isfinite(value).all(), key
        if "lora_dropout" not in options:  # whose masks differ: the rows stand elsewhere
            assert relative(value, found[1][key]) < 1e-5, key

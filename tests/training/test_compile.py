"""`torch.compile(fullgraph=True)`: one graph, forward and backward, equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from tests.model.tiny import config
from tests.reference import relative
from tests.zoo.builder import build_model

# fp32: nothing but the order of sums may differ. bf16: inductor fuses, and so rounds less often than eager.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    classes = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
    # Every token goes to every expert, with other weights: else rounding in bf16 would send some elsewhere.
    sizes = {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_experts_per_tok": 4 if dtype.itemsize == 2 else 2,
    }
    base = build_model(name, classes[name], sizes).to(dtype)
    torch.manual_seed(1)
    return get_peft_model(base, config(**options)).train()


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.float() * direction).mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return logits, {key.replace("_orig_mod.", ""): value for key, value in gradients.items()}


def check(model: nn.Module, dtype: torch.dtype, backend: str) -> None:
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(3))
    expected, expected_gradients = step(model, ids)
    found, gradients = step(compiled, ids)
    assert relative(found, expected) < TOLERANCE[dtype]
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert gradient is not None and gradient.abs().sum() > 0
        assert relative(gradients[key], gradient) < 2 * TOLERANCE[dtype], key
        assert gradients[key].dtype == gradient.dtype
    # Another routing is not another graph.
    other = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    compiled.zero_grad()
    expected, _ = step(model, other)
    with torch.compiler.set_stance("fail_on_recompile"):
        found, _ = step(compiled, other)
    assert relative(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_one_graph(name: str, dtype: torch.dtype) -> None:
    check(build(name, dtype, target_modules=["q_proj"]), dtype, "aot_eager")


@pytest.mark.parametrize(
    "options",
    [
        {"expert_indices": [0, 2], "expert_rank_pattern": {r".*\.2": 1}},
        {"use_dora": True},
        {"split_gate_up": True},
        {"share_experts": "outer"},
        {"target_experts": ["down_proj"]},
        {"experts_backend": "loop"},
    ],
    ids=str,
)
def test_one_graph_with_options(options: dict[str, Any]) -> None:
    check(build("qwen3_moe", torch.float32, **options), torch.float32, "aot_eager")


def test_one_graph_under_autocast() -> None:
    model = build("qwen3_moe", torch.bfloat16).float()  # cast after attaching, and compiled before it ever ran
    with torch.autocast("cpu", torch.bfloat16):
        check(model, torch.bfloat16, "aot_eager")


def test_compiled_without_gradients() -> None:
    model = build("qwen3_moe", torch.float32).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = compiled(input_ids=ids, use_cache=False).logits.clone()
    with torch.no_grad():
        assert relative(found, model(input_ids=ids, use_cache=False).logits) < 1e-5


@pytest.mark.slow
def test_inductor() -> None:
    check(build("qwen3_moe", torch.bfloat16), torch.bfloat16, "inductor")

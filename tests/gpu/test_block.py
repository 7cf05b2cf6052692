"""One experts block on a CUDA device, at sizes of real models, against a float64 loop over experts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu

from peft_moe import MoELoraConfig
from peft_moe.ops.activation import SILU_GATED
from peft_moe.ops.experts import Projection, expert_mlp, pieces_of

pytestmark = pytest.mark.gpu


def reference(
    x: Tensor, weights: Tensor, index: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients (x, weights, A_up, B_up, A_down, B_down) for the loss sum(out * probe), in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weights, up[1], up[2], down[1], down[2])]
    x64, w64, a_up, b_up, a_down, b_down = leaves
    out = torch.zeros_like(x64)
    for expert in range(up[0].shape[0]):
        token, choice = torch.where(index == expert)
        if token.numel() == 0:
            continue
        rows = x64[token]
        pre = rows @ up[0][expert].double().T + rows @ a_up[expert].T @ b_up[expert].T
        gate, value = pre.chunk(2, dim=-1)
        hidden = silu(gate) * value
        y = hidden @ down[0][expert].double().T + hidden @ a_down[expert].T @ b_down[expert].T
        out = out.index_add(0, token, y * w64[token, choice, None])
    return out, leaves


@pytest.mark.parametrize("routing", ["random", "one expert", "few experts"])
@pytest.mark.parametrize("tokens", [1, 33, 1000, 5000])
@pytest.mark.parametrize(("backend", "rank"), [("grouped_mm", 8), ("triton", 16), ("triton", 64)])
@pytest.mark.parametrize(("width", "inner"), [(512, 384), (464, 200)])
def test_against_float64(tokens: int, rank: int, routing: str, backend: str, width: int, inner: int) -> None:
    experts, top_k = 32, 4
    poison = torch.full((64 * 2**20,), float("nan"), device="cuda", dtype=torch.bfloat16)
    del poison  # what the kernels allocate next holds NaN
    generator = torch.Generator(device="cuda").manual_seed(tokens + rank)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()

    limit = {"random": experts, "one expert": top_k, "few experts": 6}[routing]
    index = torch.stack([torch.randperm(limit, generator=generator, device="cuda")[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator, device="cuda")
    x = normal(tokens, width)
    up = (normal(experts, 2 * inner, width, scale=width**-0.5), normal(experts, rank, width, scale=width**-0.5),
          normal(experts, 2 * inner, rank, scale=0.3))  # fmt: skip
    down = (normal(experts, width, inner, scale=inner**-0.5), normal(experts, rank, inner, scale=inner**-0.5),
            normal(experts, width, rank, scale=0.3))  # fmt: skip
    probe = normal(tokens, width)

    expected, leaves = reference(x, weights, index, up, down)
    (expected * probe.double()).sum().backward()
    mine = [tensor.detach().clone().requires_grad_() for tensor in (x, weights, up[1], up[2], down[1], down[2])]
    out = expert_mlp(
        mine[0], mine[1], pieces_of(backend).route(index, experts, False), Projection(up[0], None, mine[2], mine[3]),
        Projection(down[0], None, mine[4], mine[5]), SILU_GATED, backend, torch.bfloat16,
    )  # fmt: skip
    loss = (out * probe).sum()
    kept = torch.autograd.grad(loss, mine, retain_graph=True)  # then nothing that was saved may be written into
    loss.backward()
    for found, first in zip(mine, kept, strict=True):
        torch.testing.assert_close(found.grad, first, rtol=0, atol=0)
    assert (out.double() - expected).norm() < 2e-2 * expected.norm()
    for found, leaf in zip(mine, leaves, strict=True):
        assert found.grad is not None and leaf.grad is not None
        assert (found.grad.double() - leaf.grad).norm() < 3e-2 * leaf.grad.norm()
    used = torch.zeros(experts, dtype=torch.bool, device="cuda")
    used[index.flatten()] = True
    for found in mine[2:]:
        assert found.grad is not None and not found.grad[~used].any()


@pytest.mark.parametrize("tokens", [16, 300, 3000])
def test_gpt_oss(tokens: int) -> None:
    """Transposed weights, biases, an activation of its own, sizes that no tile divides: kernels against a loop."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    if not hasattr(gpt_oss.GptOssExperts, "_apply_gate"):
        pytest.skip("another module on transformers 4")
    config = gpt_oss.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, hidden_size=720, intermediate_size=432)
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = nn.ModuleDict({"experts": gpt_oss.GptOssExperts(config).bfloat16()})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    index = torch.rand(tokens, 4, device="cuda").topk(2, dim=-1).indices
    x, probe = torch.randn(2, tokens, 720, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("auto", "loop"):
        torch.manual_seed(1)
        options = {"target_modules": [], "init_lora_weights": False, "experts_backend": backend}
        model = get_peft_model(copy.deepcopy(block), MoELoraConfig(r=16, **options), autocast_adapter_dtype=False)
        leaf, weights = x.clone().requires_grad_(), torch.full((tokens, 2), 0.4, device="cuda", requires_grad=True)
        out = model.base_model.model["experts"](leaf, index, weights)
        (out * probe).sum().backward()
        adapters = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append([out.detach(), leaf.grad, weights.grad, *adapters])
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected.double()).norm() < 2e-2 * expected.double().norm()

"""One experts block on a CUDA device, at sizes of real models, against a float64 loop over experts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu

from peft_moe import MoELoraConfig
from peft_moe.adapter import join_and_pad
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


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).bfloat16()


def stacks(generator: torch.Generator, experts: int, width: int, inner: int, rank: int) -> list[tuple[Tensor, ...]]:
    """Weight, A and B of both projections."""
    return [
        (
            normal(generator, experts, out, into, scale=into**-0.5),
            normal(generator, experts, rank, into, scale=into**-0.5),
            normal(generator, experts, out, rank, scale=0.3),
        )
        for out, into in ((2 * inner, width), (width, inner))
    ]


def run(
    x: Tensor, weights: Tensor, index: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...], backend: str
) -> Tensor:
    """The op, with ranks padded as a layer pads them."""
    projections = [Projection(one[0], None, *join_and_pad([(one[1], one[2])], backend)) for one in (up, down)]
    routing = pieces_of(backend).route(index, up[0].shape[0], False)
    return expert_mlp(x, weights, routing, *projections, SILU_GATED, backend, torch.bfloat16)


def check(
    index: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...], generator: torch.Generator, backend: str
) -> None:
    """Output and all gradients against the loop; nothing that is saved for the backward is written into."""
    poison = torch.full((64 * 2**20,), float("nan"), device=index.device, dtype=torch.bfloat16)
    del poison  # what the kernels allocate next holds NaN
    experts, width = up[0].shape[0], up[0].shape[2]
    weights = torch.rand(index.shape, generator=generator, device=index.device)
    x, probe = normal(generator, index.shape[0], width), normal(generator, index.shape[0], width)
    expected, leaves = reference(x, weights, index, up, down)
    (expected * probe.double()).sum().backward()
    mine = [tensor.detach().clone().requires_grad_() for tensor in (x, weights, up[1], up[2], down[1], down[2])]
    out = run(mine[0], mine[1], index, (up[0], *mine[2:4]), (down[0], *mine[4:6]), backend)
    loss = (out * probe).sum()
    kept = torch.autograd.grad(loss, mine, retain_graph=True)  # then nothing that was saved may be written into
    loss.backward()
    for found, first in zip(mine, kept, strict=True):
        torch.testing.assert_close(found.grad, first, rtol=0, atol=0)
    assert (out.double() - expected).norm() < 2e-2 * expected.norm()
    for found, leaf in zip(mine, leaves, strict=True):
        assert found.grad is not None and leaf.grad is not None
        assert (found.grad.double() - leaf.grad).norm() < 3e-2 * leaf.grad.norm()
    used = torch.zeros(experts, dtype=torch.bool, device=index.device)
    used[index.flatten()] = True
    for found in mine[2:]:
        assert found.grad is not None and not found.grad[~used].any()


@pytest.mark.parametrize("routing", ["random", "one expert", "few experts"])
@pytest.mark.parametrize("tokens", [1, 33, 1000, 5000])
@pytest.mark.parametrize(("backend", "rank"), [("grouped_mm", 8), ("triton", 16), ("triton", 64), ("triton", 160)])
@pytest.mark.parametrize(("width", "inner"), [(512, 384), (464, 200)])
def test_against_float64(tokens: int, rank: int, routing: str, backend: str, width: int, inner: int) -> None:
    experts, top_k = 32, 4
    generator = torch.Generator(device="cuda").manual_seed(tokens + rank)
    limit = {"random": experts, "one expert": top_k, "few experts": 6}[routing]
    index = torch.stack([torch.randperm(limit, generator=generator, device="cuda")[:top_k] for _ in range(tokens)])
    check(index, *stacks(generator, experts, width, inner, rank), generator, backend)


def fresh() -> torch.Generator:
    """Other inputs in each run; the seed is printed where a test fails."""
    seed = torch.seed()
    print(f"seed {seed}")
    return torch.Generator(device="cuda").manual_seed(seed)


def favoured(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Experts drawn in proportion to 1, 1/2, 1/3, ...: some get most rows, some a few, some none."""
    odds = 1 / torch.arange(1, experts + 1, device=generator.device)
    return torch.multinomial(odds.expand(tokens, -1), top_k, generator=generator)


def step(
    x: Tensor, weights: Tensor, index: Tensor, probe: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...],
    backend: str = "triton",
) -> list[Tensor]:  # fmt: skip
    """Output, and gradients of x, weights and the factors."""
    leaves = [one.detach().requires_grad_() for one in (x, weights, up[1], up[2], down[1], down[2])]
    out = run(leaves[0], leaves[1], index, (up[0], *leaves[2:4]), (down[0], *leaves[4:6]), backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe)]


@pytest.mark.parametrize(
    ("tokens", "rank"), [(1, 16), (60, 5), (60, 128), (700, 12), (4000, 16), (4000, 33), (4000, 99)]
)
@pytest.mark.parametrize("shape", [(128, 8, 2048, 768), (64, 8, 2048, 1024), (12, 8, 7168, 2048)], ids=str)
def test_shapes_of_models(shape: tuple[int, int, int, int], tokens: int, rank: int) -> None:
    """Qwen3-30B-A3B, OLMoE, and a few experts of DeepSeek-V3; ranks that are no multiple of 8, or high."""
    experts, top_k, width, inner = shape
    generator = fresh()
    index = favoured(tokens, experts, top_k, generator)
    check(index, *stacks(generator, experts, width, inner, rank), generator, "triton")


def test_races() -> None:
    """Whatever ran before, the same inputs give the same bits; others, drawn anew, give what torch's products give."""
    experts, top_k, width, inner = 64, 8, 1024, 512
    generator = fresh()
    up, down = stacks(generator, experts, width, inner, 16)

    def draw(tokens: int) -> tuple[Tensor, ...]:
        weights = torch.rand(tokens, top_k, generator=generator, device="cuda")
        x, probe = normal(generator, tokens, width), normal(generator, tokens, width)
        return x, weights, favoured(tokens, experts, top_k, generator), probe

    kept = [draw(tokens) for tokens in (7, 300, 1100, 3000)]
    first = [step(*inputs, up, down) for inputs in kept]
    for turn in range(20):
        for inputs, want in zip(kept, first, strict=True):
            for found, one in zip(step(*inputs, up, down), want, strict=True):
                assert torch.equal(found, one)
        inputs = draw(50 + 150 * turn)
        for found, one in zip(step(*inputs, up, down), step(*inputs, up, down, "grouped_mm"), strict=True):
            assert (found.double() - one.double()).norm() < 3e-2 * one.double().norm()


@pytest.mark.parametrize("tokens", [5, 500, 4000])
def test_in_a_cuda_graph(tokens: int) -> None:
    """Captured once, forward and backward, and replayed with other tokens, experts and weights."""
    experts, top_k, width, inner = 32, 4, 512, 384
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    up, down = stacks(generator, experts, width, inner, 16)
    x, probe = normal(generator, tokens, width), normal(generator, tokens, width)
    weights = torch.rand(tokens, top_k, generator=generator, device="cuda")
    index = favoured(tokens, experts, top_k, generator)

    inputs = (x, weights, index, probe, up, down)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*inputs)
    for _ in range(3):
        x.copy_(normal(generator, tokens, width))
        weights.uniform_(generator=generator)
        index.copy_(favoured(tokens, experts, top_k, generator))
        graph.replay()
        for one, want in zip(found, step(*inputs), strict=True):
            assert torch.equal(one, want)


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

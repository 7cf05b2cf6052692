"""Products on FP8 codes on a CUDA device, inside a whole expert MLP, against the dequantized weights in float64."""

from __future__ import annotations

import pytest
import torch

from peft_moe.ops.activation import SILU_GATED
from peft_moe.ops.experts import Projection, expert_mlp, pieces_of
from peft_moe.ops.routing import Routing
from peft_moe.ops.scaled import CodedStack, ScaledStack

pytestmark = pytest.mark.gpu


def stack(experts: int, rows: int, cols: int, block: tuple[int, int]) -> tuple[CodedStack, torch.Tensor]:
    codes = torch.randn(experts, rows, cols, device="cuda").to(torch.float8_e4m3fn)
    scales = (torch.rand(experts, -(-rows // block[0]), -(-cols // block[1]), device="cuda") + 0.5) * cols**-0.5
    spread = scales.double().repeat_interleave(block[0], 1)[:, :rows].repeat_interleave(block[1], 2)[..., :cols]
    exact = codes.double() * spread
    found = ScaledStack(codes, scales, *block)
    return CodedStack(lambda: exact.bfloat16(), lambda: found), exact


@pytest.mark.parametrize("block", [(128, 128), (1, 10_000), (10_000, 10_000), (64, 256)])
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_whole_mlp(tokens: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients; empty experts; whatever the probe says of this GPU."""
    from peft_moe.ops.triton import pieces

    monkeypatch.setattr(pieces, "rows_on_codes", lambda device: 10_000)
    torch.manual_seed(tokens)
    experts, hidden, inner, rank, top_k = 7, 320, 192, 16, 2
    (up, up_exact), (down, down_exact) = (
        stack(experts, *shape, block) for shape in ((2 * inner, hidden), (hidden, inner))
    )
    assert pieces_of("triton").reads_codes(up, tokens * top_k)
    index = torch.rand(tokens, experts - 1, device="cuda").topk(top_k).indices  # the last expert has no rows
    weights = torch.rand(tokens, top_k, device="cuda", requires_grad=True)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    factors = [
        (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).bfloat16().requires_grad_()
        for shape in (
            (experts, rank, hidden), (experts, 2 * inner, rank), (experts, rank, inner), (experts, hidden, rank),
        )
    ]  # fmt: skip
    routing: Routing = pieces_of("triton").route(index, experts, False)
    ups, downs = Projection(up, None, *factors[:2], 0.5), Projection(down, None, *factors[2:], 0.5)
    out = expert_mlp(x, weights, routing, ups, downs, SILU_GATED, "triton", torch.bfloat16)
    probe = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, [x, weights, *factors], probe)]

    leaves = [one.detach().double().requires_grad_() for one in (x, weights, *factors)]
    dx, dw, up_a, up_b, down_a, down_b = leaves
    rows = []
    for token in range(tokens):
        total = torch.zeros(hidden, dtype=torch.float64, device="cuda")
        for slot in range(top_k):
            e = int(index[token, slot])
            gate, value = ((up_exact[e] + 0.5 * up_b[e] @ up_a[e]) @ dx[token]).chunk(2)
            mlp = torch.nn.functional.silu(gate) * value
            total = total + dw[token, slot] * ((down_exact[e] + 0.5 * down_b[e] @ down_a[e]) @ mlp)
        rows.append(total)
    reference = torch.stack(rows)
    expected = [reference, *torch.autograd.grad(reference, leaves, probe.double())]
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one.double() - other).norm() <= 1e-2 * other.norm(), number


def test_the_probe_measures_once_and_draws_nothing() -> None:
    from peft_moe.ops.triton.probe import measured, rows_on_codes

    device = torch.device("cuda", torch.cuda.current_device())
    state = torch.cuda.get_rng_state()
    first = rows_on_codes(device)
    assert first == rows_on_codes(device) == measured(device) and first >= 0
    assert torch.equal(torch.cuda.get_rng_state(), state)

"""The whole expert MLP against a float64 loop: output and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_moe.ops import experts as experts_module
from peft_moe.ops.activation import SILU_GATED, GatedSwish, activate
from peft_moe.ops.backends import padded_rank
from peft_moe.ops.experts import Projection, expert_mlp
from peft_moe.ops.linear import frozen_linear, lora_linear
from peft_moe.ops.routing import Gather, Routing, combine, mask_rows, route
from tests.ops import loops
from tests.ops.cases import Case, assert_close, cases, few, poisoned


def gate_of(name: str) -> object:
    """What the op gets: a closed form, or a callable over rows."""
    if name == "silu":
        return SILU_GATED
    if name == "squared_relu":
        return lambda pre: F.relu(pre).square()
    if name == "clamped":
        return GatedSwish(alpha=1.702, shift=1.0, limit=0.8, interleaved=True)
    return lambda pre: (pre[..., 1::2].tanh() + 1) * F.silu(pre[..., ::2].tanh())


LOOPS = {
    "silu": loops.silu_gate,
    "squared_relu": loops.squared_relu,
    "clamped": loops.swish_plus_one,
    "softcapped": loops.softcapped,
}


def leaves(stack: loops.Stack, pad: bool, backend: str) -> Projection:
    """The op's arguments, A and B requiring gradients; with `pad` their rank is filled up with zeros."""
    a, b = stack.a, stack.b
    if a is not None and pad:
        missing = padded_rank(a.shape[1], a.dtype, backend) - a.shape[1]
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    if a is not None:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return Projection(stack.weight, stack.bias, a, b)


def generic(x: Tensor, weights: Tensor, routing: object, up: Projection, down: Projection, case: Case) -> Tensor:
    """The same MLP, composed of the pieces that the generic path uses."""

    def project(rows: Tensor, one: Projection) -> Tensor:
        out = mask_rows(frozen_linear(rows, one.weight, routing.offsets, case.backend), routing.valid)
        if one.a is not None:
            out = out + mask_rows(lora_linear(rows, one.a, one.b, routing.offsets, case.backend), routing.valid)
        return out if one.bias is None else out + one.bias[routing.experts]

    rows = Gather.apply(x, routing.source, routing.inverse, routing.top_k, routing.valid)
    pre = project(rows, up)
    return combine(project(activate(gate_of(case.gate), pre), down), weights, routing, torch.float32)


def check(case: Case, path: str = "whole", pad: bool = True, built: bool = False) -> None:
    dtype = case.x.dtype
    x, weights = case.x.detach().requires_grad_(), case.weights.detach().requires_grad_()
    up, down = leaves(case.up, pad, case.backend), leaves(case.down, pad, case.backend)
    routing = route(case.index, case.experts, case.sentinels)
    with poisoned():
        if path == "whole":
            frozen = [one._replace(weight=lambda one=one: one.weight) if built else one for one in (up, down)]
            found = expert_mlp(x, weights, routing, *frozen, gate_of(case.gate), case.backend, torch.float32)
        else:
            found = generic(x, weights, routing, up, down, case)
        assert found.dtype == torch.float32 and found.shape == x.shape
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(found.numel()))
        found.backward(grad)

    wide_x, wide_w = case.x.double().requires_grad_(), case.weights.double().requires_grad_()
    wide_up, wide_down = case.up.double(), case.down.double()
    expected = loops.moe(wide_x, wide_w, case.index.tolist(), wide_up, wide_down, LOOPS[case.gate])
    everything = [wide_x, wide_w, wide_up.a, wide_up.b, wide_down.a, wide_down.b]
    anchor = sum(0 * one.sum() for one in everything if one is not None)  # so that unused leaves get a zero gradient
    (expected * grad.double()).sum().add(anchor).backward()

    coarse = max((dtype, case.weights.dtype, torch.float32), key=lambda one: torch.finfo(one).eps)
    assert_close(found, expected, coarse, "out", 8)
    assert_close(x.grad, wide_x.grad, coarse, "d x", 16)
    dots = float((grad * expected.detach()).norm())  # a weight's gradient sums such products
    assert_close(weights.grad, wide_w.grad, coarse, "d weights", 16, dots)
    for what, one, wide in (("up", up, wide_up), ("down", down, wide_down)):
        if one.a is None:
            continue
        rank = wide.a.shape[1]
        assert_close(one.a.grad[:, :rank], wide.a.grad, coarse, f"d A of {what}", 16)
        assert_close(one.b.grad[:, :, :rank], wide.b.grad, coarse, f"d B of {what}", 16)
        assert not one.a.grad[:, rank:].any() and not one.b.grad[:, :, rank:].any(), "the padding has a gradient"
        for expert in case.idle:
            assert not (one.a.grad[expert].any() or one.b.grad[expert].any()), f"expert {expert} saw nothing"


@few
@given(cases(), st.booleans(), st.booleans())
def test_whole_mlp(case: Case, pad: bool, built: bool) -> None:
    check(case, pad=pad, built=built)


@few
@given(cases(), st.booleans())
def test_generic_path(case: Case, pad: bool) -> None:
    check(case, path="generic", pad=pad)


def plain_case(
    experts: int, tokens: int, top_k: int, dtype: torch.dtype = torch.float32, bias: bool = True,
    backend: str = "auto", rank: int = 4,
) -> Case:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) / 3).to(dtype)

    hidden, inner = 8, 8
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return Case(
        torch.randn(tokens, hidden, dtype=torch.float64).to(dtype), torch.rand(tokens, top_k).to(dtype) + 0.25, index,
        loops.Stack(
            normal(experts, 2 * inner, hidden), normal(experts, 2 * inner) if bias else None,
            normal(experts, rank, hidden), normal(experts, 2 * inner, rank),
        ),
        loops.Stack(
            normal(experts, hidden, inner), normal(experts, hidden) if bias else None,
            normal(experts, rank, inner), normal(experts, hidden, rank),
        ),
        "silu", backend, experts, False,
    )  # fmt: skip


@pytest.mark.parametrize("experts", [128, 1024, 1025])
def test_many_experts(experts: int) -> None:
    check(plain_case(experts, tokens=40, top_k=4))


def test_gradients_by_finite_differences() -> None:
    """Float64 on the loop backend; a bias, a sentinel, an expert without tokens."""
    case = plain_case(4, tokens=5, top_k=2, dtype=torch.float64)
    case.index = torch.tensor([[0, 1], [1, 4], [3, 0], [4, 4], [1, 0]])
    routing = route(case.index, 4, sentinels=True)
    for gate in ("silu", "softcapped"):

        def run(
            x: Tensor, w: Tensor, ua: Tensor, ub: Tensor, da: Tensor, db: Tensor, gate: object = gate_of(gate)
        ) -> Tensor:
            up = Projection(case.up.weight, case.up.bias, ua, ub)
            down = Projection(case.down.weight, case.down.bias, da, db)
            return expert_mlp(x, w, routing, up, down, gate, "loop", torch.float64)

        inputs = (case.x, case.weights, case.up.a, case.up.b, case.down.a, case.down.b)
        assert torch.autograd.gradcheck(run, [one.detach().requires_grad_() for one in inputs], atol=1e-8)


@pytest.mark.parametrize("wanted", ["x", "weights", "up_a", "up_b", "down_a", "down_b"])
def test_one_gradient_alone(wanted: str) -> None:
    """Each gradient is the same whether or not the others are asked for."""
    case = plain_case(4, tokens=6, top_k=2)
    routing = route(case.index, 4, sentinels=False)
    names = ("x", "weights", "up_a", "up_b", "down_a", "down_b")

    def gradient(asked: tuple[str, ...]) -> Tensor:
        values = (case.x, case.weights, case.up.a, case.up.b, case.down.a, case.down.b)
        leaf = {name: value.detach().requires_grad_(name in asked) for name, value in zip(names, values, strict=True)}
        up = Projection(case.up.weight, case.up.bias, leaf["up_a"], leaf["up_b"])
        down = Projection(case.down.weight, case.down.bias, leaf["down_a"], leaf["down_b"])
        out = expert_mlp(leaf["x"], leaf["weights"], routing, up, down, SILU_GATED, "auto", torch.float32)
        out.square().sum().backward()
        assert all(leaf[name].grad is None for name in names if name not in asked)
        return leaf[wanted].grad

    assert torch.equal(gradient((wanted,)), gradient(names))


def test_stride_zero_gradient() -> None:
    """`y.sum().backward()` hands over one expanded number."""
    found = []
    for grad in (torch.ones(()).expand(6, 8), torch.ones(6, 8)):
        torch.manual_seed(0)
        case = plain_case(4, tokens=6, top_k=2)
        x = case.x.requires_grad_()
        up, down = leaves(case.up, True, case.backend), leaves(case.down, True, case.backend)
        routing = route(case.index, 4, sentinels=False)
        expert_mlp(x, case.weights, routing, up, down, SILU_GATED, "auto", torch.float32).backward(grad)
        found.append((x.grad, up.a.grad, down.b.grad))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_second_derivative_is_refused() -> None:
    """The backward is written for first derivatives: a second one must not come out wrong in silence."""
    case = plain_case(3, tokens=4, top_k=2)
    x = case.x.requires_grad_()
    routing = route(case.index, 3, sentinels=False)
    up, down = leaves(case.up, True, case.backend), leaves(case.down, True, case.backend)
    out = expert_mlp(x, case.weights, routing, up, down, SILU_GATED, "auto", torch.float32)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


def test_a_checkpointed_layer_runs_its_second_projection_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved after hidden, so the recomputation stops there; the gradients are the same bits."""
    runs: list[Tensor] = []
    finish = experts_module._finish

    def counted(*args: object) -> None:
        runs.append(args[0])  # type: ignore[arg-type]
        finish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(experts_module, "_finish", counted)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        case = plain_case(4, tokens=6, top_k=2)
        x = case.x.requires_grad_()
        up, down = leaves(case.up, True, case.backend), leaves(case.down, True, case.backend)
        routing = route(case.index, 4, sentinels=False)

        def layer(x: Tensor, up: Projection = up, down: Projection = down, routing: Routing = routing) -> Tensor:
            weights = case.weights * x.sum()  # noqa: B023 - of this turn
            return x + expert_mlp(x, weights, routing, up, down, SILU_GATED, "auto", torch.float32)

        runs.clear()
        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        out.square().sum().backward()
        assert len(runs) == 1
        found.append((out, x.grad, up.a.grad, up.b.grad, down.a.grad, down.b.grad))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)

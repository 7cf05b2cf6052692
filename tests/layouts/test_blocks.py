"""Every block of transformers 4: its grouped forward against its own, which it must match in all that can be seen."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from peft_moe.layouts.blocks import find_block_forward

from .block_cases import CASES, HIDDEN, Case, by_loop, by_mask, tokens

#: Blocks as transformers 4 has them; in 5 the same names mean other blocks, which `stacked` describes.
FOUR = int(transformers.__version__.split(".")[0]) < 5
OLD = CASES if FOUR else []
NEW = [] if FOUR else [case for case in CASES if case.block_class() is not None]
JITTERED = [case for case in OLD if case.jitter]

old = pytest.mark.parametrize("case", OLD, ids=str)
exact = {"rtol": 1e-6, "atol": 1e-6}


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a result, hidden states first."""
    return [result] if isinstance(result, Tensor) else list(result)


def run(block: nn.Module, case: Case, grouped: bool, seed: int = 3) -> dict[str, Any]:
    """One forward and backward of the block's own forward or of the grouped one; everything that can be compared."""
    block.zero_grad(set_to_none=True)
    leaf = tokens().requires_grad_()
    x = leaf * 1.0
    torch.manual_seed(seed)
    forward = find_block_forward(block)
    result = forward(block, by_loop(block), x) if grouped else block(x)
    rng = torch.get_rng_state()
    outputs = leaves(result)
    seen = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    loss = (outputs[0] * seen).sum() + sum((extra.float() ** 2).sum() * 0.01 for extra in outputs[1:])
    loss.backward()
    return {
        "kind": type(result),
        "outputs": [output.detach() for output in outputs],
        "input": x.detach(),
        "rng": rng,
        "dx": leaf.grad,
        "grads": {name: p.grad for name, p in block.named_parameters()},
    }


def compare(block: nn.Module, case: Case) -> dict[str, Any]:
    want, got = run(block, case, grouped=False), run(block, case, grouped=True)
    assert got["kind"] is want["kind"]
    assert len(got["outputs"]) == len(want["outputs"])
    assert_close(got["outputs"][0], want["outputs"][0], **exact)
    for ours, theirs in zip(got["outputs"][1:], want["outputs"][1:], strict=True):
        assert torch.equal(ours, theirs), "router logits differ"
    assert torch.equal(got["input"], want["input"]), "the input was not changed (or left alone) as the original does"
    assert torch.equal(got["rng"], want["rng"]), "another number of random draws"
    assert_close(got["dx"], want["dx"], **exact)
    routers = [name for name in want["grads"] if name.startswith(case.router + ".") and want["grads"][name] is not None]
    assert routers and all(want["grads"][name].abs().sum() > 0 for name in routers)
    for name, theirs in want["grads"].items():
        ours = got["grads"][name]
        if theirs is None:
            assert ours is None or not ours.any(), f"{name} has a gradient that the original does not give"
        else:
            assert_close(
                torch.zeros_like(theirs) if ours is None else ours, theirs, **exact, msg=lambda m, n=name: n + m
            )
    return got


@old
def test_known(case: Case) -> None:
    assert find_block_forward(case.build()) is not None


@old
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_as_the_block(case: Case, training: bool) -> None:
    compare(case.build().train(training), case)


@pytest.mark.parametrize("case", JITTERED, ids=str)
def test_jitter(case: Case) -> None:
    """Jitter changes the caller's tensor in place, draws in the original's order, and is off in evaluation."""
    block = case.build()
    for name in case.jitter:
        setattr(block, name, 0.3)
    assert torch.equal(compare(block.eval(), case)["input"], tokens())
    assert not torch.equal(compare(block.train(), case)["input"], tokens())


@old
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """The same bits: each step is in the original's dtype, the sum over the experts above all."""
    block = case.build().to(dtype)
    for name in getattr(block, "keep_in_fp32", ()):
        getattr(block, name).float()
    x = tokens(2, 40).to(dtype)
    with torch.no_grad():
        want, got = leaves(block(x)), leaves(find_block_forward(block)(block, by_loop(block), x))
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@old
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    block = case.build().to(dtype)
    for name in getattr(block, "keep_in_fp32", ()):
        getattr(block, name).float()
    x = tokens().to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        if case.family == "longcat_flash" and dtype == torch.float32:
            with pytest.raises(RuntimeError, match="same scalar type"):
                block(x)  # adds fp32 identities to a bf16 buffer; the grouped forward has no such step
            assert find_block_forward(block)(block, by_loop(block), x).dtype == dtype
            return
        want, got = leaves(block(x.clone())), leaves(find_block_forward(block)(block, by_loop(block), x.clone()))
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]
    assert cosine_similarity(got[0].float().flatten(), want[0].float().flatten(), dim=0) > 0.9999
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@old
def test_compiles_whole(case: Case) -> None:
    """One graph: no loop over experts that depends on the routing, nothing read back from the device."""
    block = case.build().train()
    forward, experts = find_block_forward(block), by_mask(block)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: forward(block, experts, x), fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (compiled, lambda x: forward(block, experts, x)):
        leaf = tokens().requires_grad_()
        torch.manual_seed(5)
        outputs.append(leaves(function(leaf * 1.0)))
        outputs[-1][0].square().sum().backward()
        outputs[-1].append(leaf.grad)
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@old
def test_one_token_and_odd_strides(case: Case) -> None:
    """One token; and hidden states that cannot be viewed as `(T, H)`, wherever the original takes them."""
    block = case.build()
    forward = find_block_forward(block)
    with torch.no_grad():
        for x in (tokens(1, 1), tokens(7, 2).transpose(0, 1), tokens(width=2 * HIDDEN)[..., ::2]):
            got = leaves(forward(block, by_loop(block), x.contiguous()))[0]
            assert_close(got, leaves(block(x.contiguous()))[0], **exact)


@old
def test_arguments(case: Case) -> None:
    """By name as by position; an argument that the block does not have is refused as by the block."""
    block = case.build()
    forward, experts = find_block_forward(block), by_loop(block)
    with torch.no_grad():
        by_name, by_position = forward(block, experts, hidden_states=tokens()), forward(block, experts, tokens())
    assert torch.equal(leaves(by_name)[0], leaves(by_position)[0])
    with pytest.raises(TypeError):
        forward(block, experts, tokens(), nonsense=1)


@old
def test_picklable(case: Case) -> None:
    forward = find_block_forward(case.build())
    assert pickle.loads(pickle.dumps(forward)) is forward


@pytest.mark.parametrize("case", NEW or [None], ids=str)
def test_blocks_of_transformers_5_are_not_taken(case: Case | None) -> None:
    """Same class names, other forwards."""
    if case is None:
        pytest.skip("transformers 4 is installed")
    assert find_block_forward(case.build()) is None


@old
def test_look_alikes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass elsewhere, a namesake of the module only, a forward replaced on the class, a part that is missing."""
    block = case.build()
    cls = type(block)
    assert find_block_forward(block) is not None

    block.__class__ = type(cls.__name__, (cls,), {"__module__": "somebody.modeling_elsewhere"})
    assert find_block_forward(block) is None
    block.__class__ = type("Different" + cls.__name__, (cls,), {"__module__": cls.__module__})
    assert find_block_forward(block) is None
    block.__class__ = cls

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, hidden_states: hidden_states)
        assert find_block_forward(block) is None
    assert find_block_forward(block) is not None

    delattr(block, case.router)
    assert find_block_forward(block) is None


@pytest.mark.parametrize("case", OLD, ids=str)
def test_containers(case: Case) -> None:
    """A hole, a stranger or nothing at all in the list of experts: not taken. An adapted list: seen through."""
    block = case.build()
    experts = block.experts
    for replacement in (None, nn.Linear(HIDDEN, HIDDEN), nn.Identity()):
        block.experts = nn.ModuleList([experts[0], replacement, *experts[2:]])
        assert find_block_forward(block) is None
    block.experts = nn.ModuleList()
    assert find_block_forward(block) is None

    block.experts = nn.Module()
    block.experts.base_layer = experts
    assert find_block_forward(block) is not None


def test_longcat_counts_its_identities() -> None:
    """Identities count as experts of the router only: `run_experts` sees them as "no expert", and `w * x` is added."""
    case = next((case for case in OLD if case.family == "longcat_flash"), None)
    if case is None:
        pytest.skip("transformers 5 is installed")
    block = case.build()
    real = block.config.n_routed_experts
    with torch.no_grad():
        block.router.e_score_correction_bias[real:] = 10.0  # every choice is an identity
        seen = []

        def record(x: Tensor, idx: Tensor, w: Tensor, accumulate_dtype: torch.dtype | None = None) -> Tensor:
            seen.append(idx)
            return by_loop(block)(x, idx, w, accumulate_dtype)

        x = tokens()
        got = find_block_forward(block)(block, record, x)
        _, weights = block.router(x)
    assert (seen[0] == real).all()
    assert_close(got, x * weights.sum(dim=-1).view(*x.shape[:-1], 1), **exact)

    block.experts.append(block.experts[0])
    assert find_block_forward(block) is None

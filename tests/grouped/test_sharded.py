"""Under FSDP weights are whole for the length of a call alone: nobody may give them another storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing import assert_close

from peft_moe import enable_grouped_experts
from tests.grouped.cases import FOUR, blocks, calls_of, inputs, output, pair, with_embeddings
from tests.grouped.test_models import adapter_gradients, ours
from tests.reference import relative

NATIVE = "qwen3_moe"
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def doubled(model: nn.Module) -> None:
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".experts." in name and "lora" not in name:
                one.mul_(2)


@pytest.mark.parametrize("order", ["before", "after"])
def test_frozen_experts_that_fsdp_shards(order: str) -> None:
    """Lists are left to the block. Stacks are read as they are, and run grouped."""
    model, reference = pair(NATIVE)
    if order == "before":
        enable_grouped_experts(model)
        output(model)
    sharded(model)
    if order == "after":
        assert not enable_grouped_experts(model).grouped
    for _ in range(2):
        found, calls = calls_of(model)
        assert calls == (0 if FOUR else blocks(reference))
        assert_close(found, output(reference), **close)
        doubled(model), doubled(reference)
    grads = []
    for one in (model, reference):
        one.requires_grad_(False)
        output(with_embeddings(one)).square().sum().backward()
        grads.append(one.get_input_embeddings().weight.grad)
    assert relative(grads[0].full_tensor(), grads[1]) < 1e-5


@pytest.mark.skipif(not FOUR, reason="stacked experts need no house")
def test_lists_that_the_first_fsdp_shards() -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    output(model)

    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))

    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = wrap(layer)
    whole = wrap(model)
    for _ in range(2):
        assert_close(whole(**inputs(reference)).logits, output(reference), **close)
    assert all("sharded by FSDP" in reason for reason in enable_grouped_experts(whole).left_alone.values())


@pytest.mark.parametrize("run", [output, adapter_gradients])
def test_adapted_experts_that_fsdp_shards(run: Callable[[nn.Module], Tensor | dict[str, Tensor]]) -> None:
    model, reference = pair(NATIVE)
    adapted, expected = ours(model), ours(reference)
    output(adapted)
    sharded(model)
    output(adapted)
    doubled(adapted), doubled(expected)
    found, wanted = run(adapted), run(expected)
    if isinstance(found, Tensor):
        return assert_close(found, wanted, **close)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert relative(value.full_tensor(), wanted[key]) < 1e-5, key

"""Few tokens: only routed experts are dequantized, to the same bytes and the same output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe import quantize_experts, routed
from peft_moe.ops.routing import compact, route
from peft_moe.weights import open_stacked
from tests.model.tiny import config, experts_of
from tests.quantize_cases import config as bnb_config
from tests.quantize_cases import small
from tests.reference import relative
from tests.weights.quantized import E4M3, encode_stack, fp8_linear, fp8_list
from tests.weights.stores import COLS, EXPERTS, ROWS, SHAPE, Holder, weights
from tests.weights.test_mxfp4 import load, write_gpt_oss

PICKS = ([2], [1, 1], [2, 0], [0, 1, 2])


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for a device, or makes a shape depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert not name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique")), name
        return func(*args, **(kwargs or {}))


def fp8_stores() -> Iterator[tuple[str, Any]]:
    for name, block, transposed in (
        ("block", (32, 32), False),
        ("odd", (7, 50), False),
        ("transposed", (32, 32), True),
    ):
        codes, scales, _ = encode_stack(weights(), block, E4M3)
        if transposed:
            codes, scales = codes.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()
            block = block[::-1]
        holder = Holder("down_proj", codes, scales.float(), "down_proj_scale_inv", block)
        yield name, open_stacked(holder, [("down_proj", transposed, False)], SHAPE, "experts")
    codes, scales, _ = encode_stack(weights(), (1, COLS))
    holder = Holder("down_proj", codes, scales.float(), "down_proj_weight_scale")
    yield "rows", open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")
    holder = Holder("down_proj", codes, torch.tensor(0.3), "down_proj_weight_scale")
    yield "one number", open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")
    apart = nn.Module()
    for leaf, part in (("gate_proj", codes[:, :48]), ("up_proj", codes[:, 48:])):
        apart.register_parameter(leaf, nn.Parameter(part.contiguous(), requires_grad=False))
        apart.register_parameter(f"{leaf}_scale", nn.Parameter(torch.rand(EXPERTS, 1, 1), requires_grad=False))
    yield "two parts", open_stacked(apart, [("gate_proj", False, False), ("up_proj", False, False)], SHAPE, "experts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, _ in fp8_stores()])
def test_fp8_experts_of_an_index(name: str, dtype: torch.dtype) -> None:
    store = dict(fp8_stores())[name]
    store.activation_dtype = dtype
    assert store.builds_some
    for pick in PICKS:
        with NoSync():
            found = store.build_some(torch.tensor(pick))
        assert found.dtype == dtype and torch.equal(found, store.materialize(pick, dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "int8"])
def test_packed_experts_of_an_index(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from peft_moe.quantize.config import BnbExpertsConfig
    from peft_moe.quantize.experts import pack_parameter

    settings = BnbExpertsConfig(**{**bnb_config(kind).to_dict(), "load_in_8bit": kind == "int8",
                                   "load_in_4bit": kind != "int8"}).settings()  # fmt: skip
    for transposed in (False, True):
        module = nn.Module()
        shape = (EXPERTS, 128, ROWS) if transposed else (EXPERTS, ROWS, 128)
        module.down_proj = nn.Parameter(weights(shape=shape))
        pack_parameter(module, "down_proj", settings)
        store: Any = open_stacked(module, [("down_proj", transposed, False)], (EXPERTS, ROWS, 128), "experts")
        assert store.builds_some
        for pick in PICKS:
            with NoSync():
                found = store.build_some(torch.tensor(pick))
            assert torch.equal(found, store.materialize(pick, torch.float32))


def test_what_cannot_be_picked_is_built_whole() -> None:
    """Experts that share a block, and lists."""
    pytest.importorskip("bitsandbytes")
    from peft_moe.quantize.config import PackSettings
    from peft_moe.quantize.experts import pack_parameter

    module = nn.Module()
    module.down_proj = nn.Parameter(weights(shape=(EXPERTS, 10, 10)))
    pack_parameter(module, "down_proj", PackSettings("nf4"))
    store: Any = open_stacked(module, [("down_proj", False, False)], (EXPERTS, 10, 10), "experts")
    assert not store.builds_some
    for layer in experts_of(get_peft_model(fp8_list(fp8_linear)[0], config())):
        assert not any(store.builds_some for store in layer.stores.values())


def test_mxfp4_experts_of_an_index(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path)
    for layer in experts_of(get_peft_model(load(tmp_path), config())):
        for store in layer.stores.values():
            with NoSync():
                found = store.build_some(torch.tensor([3, 1]))
            assert torch.equal(found, store.materialize([3, 1], torch.float32))


def _models(tmp_path: Path) -> Iterator[nn.Module]:
    write_gpt_oss(tmp_path / "mxfp4")
    yield load(tmp_path / "mxfp4")
    pytest.importorskip("bitsandbytes")
    for kind in ("nf4", "int8"):
        yield quantize_experts(small("gpt_oss"), bnb_config(kind))
        yield quantize_experts(small(), bnb_config(kind))


def _counting(run: Any, built: list[int]) -> Any:
    def build_some(slots: Tensor) -> Tensor:
        built.append(len(slots))
        return run(slots)

    return build_some


@pytest.mark.parametrize("options", [{}, {"expert_indices": [0, 2]}, {"share_experts": "outer"}, None])
def test_decoding_gives_the_same(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers, with adapters (biases, too) and without, with rows of no expert."""
    for base in _models(tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config(**(options or {}))).eval()
        layer = experts_of(model)[0]
        stores = list(layer.stores.values())
        if not all(store.builds_some for store in stores):
            continue  # a list, on transformers 4
        if options is None:
            model.disable_adapter_layers()
        built: list[int] = []
        for store in stores:
            monkeypatch.setattr(store, "build_some", _counting(store.build_some, built))
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(2, stores[0].shape[2], generator=generator)
        experts = stores[0].shape[0]
        for index in ([[1], [experts - 1]], [[2], [2]], [[0], [experts]]):
            arguments = hidden, torch.tensor(index), torch.tensor([[0.7], [0.0 if index[1][0] == experts else 0.4]])
            built.clear()
            with torch.no_grad():
                found = layer.run_experts(*arguments)
                assert built == [2, 2], "two rows of four experts: no more than two are dequantized"
                with monkeypatch.context() as patch:
                    patch.setattr(routed, "MARGIN", 10**6)
                    whole = layer.run_experts(*arguments)
            assert len(built) == 2 and relative(found, whole) < 1e-6
            with_gradients = layer.run_experts(*arguments)
            assert len(built) == 2 and relative(with_gradients, whole) < 1e-6
            assert (
                relative(layer.run_experts(*arguments)[1:], torch.zeros_like(hidden[1:])) < 1e-9
                or index[1][0] < experts
            )


def test_the_rule() -> None:
    assert routed.pays(8, 128) and routed.pays(64, 128) and not routed.pays(65, 128) and not routed.pays(0, 128)
    assert not routed.pays(4, 4)


def test_nothing_waits_for_the_host() -> None:
    routing = route(torch.tensor([[3, 1], [1, 0]]), 8, sentinels=True)
    with NoSync():
        compact(routing, 8)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        Tensor.item(torch.ones(1))

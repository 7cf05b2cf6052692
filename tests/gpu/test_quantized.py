"""Adapted models on quantized experts on a CUDA device, against the same model on the dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.zoo import ENTRIES, first_floating, loss

V5 = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not V5, reason="lists of experts: test_grouped.py")]


def build() -> tuple[nn.Module, dict[str, Any]]:
    entry = ENTRIES["qwen3_moe"]
    model = entry.build().to("cuda", torch.bfloat16)
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in entry.inputs(model).items()}
    return model, inputs


def quantize(model: nn.Module, kind: str) -> None:
    if kind == "fp8":
        from transformers.integrations.finegrained_fp8 import FP8Experts

        for layer in model.model.layers:
            dense = layer.mlp.experts
            with torch.device("cuda"):
                packed = FP8Experts(model.config, block_size=(16, 16))
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(dense, name).data.float()
                experts, rows, cols = weight.shape
                r, c = -(-rows // 16), -(-cols // 16)
                padded = nn.functional.pad(weight, (0, 16 * c - cols, 0, 16 * r - rows)).view(experts, r, 16, c, 16)
                scale = padded.abs().amax(dim=(2, 4)) / 448
                codes = (padded / scale[:, :, None, :, None]).reshape(experts, 16 * r, 16 * c)[:, :rows, :cols]
                getattr(packed, name).data = codes.contiguous().to(torch.float8_e4m3fn)
                getattr(packed, f"{name}_scale_inv").data = scale
            layer.mlp.experts = packed
        return
    pytest.importorskip("bitsandbytes")
    from peft_moe import BnbExpertsConfig, quantize_experts

    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    quantize_experts(model, BnbExpertsConfig(**bits))


def adapt(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, MoELoraConfig(r=4, lora_alpha=8, target_modules=[], init_lora_weights=False))


@pytest.mark.parametrize("keep", ["recompute", "cache"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_equals_the_dequantized_model(kind: str, keep: str) -> None:
    packed, inputs = build()
    quantize(packed, kind)
    torch.manual_seed(0)
    config = MoELoraConfig(r=4, lora_alpha=8, target_modules=[], init_lora_weights=False, dequantize=keep)
    packed = get_peft_model(packed, config)
    dense, _ = build()
    layers = [module for module in packed.modules() if isinstance(module, MoELoraLayer)]
    for layer, block in zip(layers, dense.model.layers, strict=True):
        for name, store in layer.stores.items():
            getattr(block.mlp.experts, name).data.copy_(store.materialize())
    dense = adapt(dense)
    for model in (packed, dense):
        for layer in (module for module in model.modules() if isinstance(module, MoELoraLayer)):
            layer.backend = "triton"
    loss(packed, inputs).backward()
    loss(dense, inputs).backward()
    with torch.no_grad():
        assert torch.equal(first_floating(packed(**inputs)), first_floating(dense(**inputs)))
    expected = dict(dense.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name].grad), name

    before = [store.snapshot() for layer in layers for store in layer.stores.values()]
    packed.merge_adapter()
    packed.unmerge_adapter()
    after = [store.snapshot() for layer in layers for store in layer.stores.values()]
    for old, new in zip(_tensors(before), _tensors(after), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)), "unmerging did not give the bytes back"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.contiguous()]
    return [tensor for one in value if isinstance(one, (list, tuple, torch.Tensor)) for tensor in _tensors(one)]

"""The contenders of `block.py`: one experts block with each of the adapters, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peers
import peft
import torch
from common import NotTimed, nf4
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from peft_moe import MoELoraConfig, quantize_experts
from peft_moe.ops.backends import BACKENDS, choose


@dataclass(frozen=True)
class Shape:
    """E experts, top-k, hidden and inner size. `gpt_oss`: transposed, interleaved, with biases."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    gpt_oss: bool = False


SHAPES = {
    "qwen3-30b": Shape(128, 8, 2048, 768),
    "mixtral": Shape(8, 2, 4096, 14336),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, gpt_oss=True),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "olmoe": Shape(64, 8, 2048, 1024),
    "tiny": Shape(16, 2, 64, 48),
}


class Block(nn.Module):
    """Routing held fixed: the experts alone are measured."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"num_experts_per_tok": shape.top_k, "hidden_size": shape.hidden}
        config: GptOssConfig | Qwen3MoeConfig
        if shape.gpt_oss:
            config = GptOssConfig(num_local_experts=shape.experts, intermediate_size=shape.inner, **sizes)
        else:
            config = Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.inner, **sizes)
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            experts = GptOssExperts if shape.gpt_oss else Qwen3MoeExperts
            self.experts = experts(config).to(dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            parameter.requires_grad_(False)
        self.config = config

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


class Plain(nn.Module):
    """LoRA by separate grouped products, differentiated by autograd: what a user would write in an afternoon."""

    def __init__(self, block: Block, shape: Shape, rank: int) -> None:
        super().__init__()
        base: Any = block.experts
        self.up, self.down = base.gate_up_proj.data, base.down_proj.data
        if shape.gpt_oss:
            self.up, self.down = self.up.mT, self.down.mT
        self.biases = [base.gate_up_proj_bias, base.down_proj_bias] if shape.gpt_oss else None
        self.gate = base._apply_gate
        for name, stack in (("up", self.up), ("down", self.down)):
            like = {"device": stack.device, "dtype": stack.dtype}
            a = torch.randn(shape.experts, rank, stack.shape[2], **like) * stack.shape[2] ** -0.5
            setattr(self, f"{name}_a", nn.Parameter(a))
            setattr(self, f"{name}_b", nn.Parameter(torch.randn(shape.experts, stack.shape[1], rank, **like)))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = index.shape
        experts, order = index.flatten().sort()
        offsets = torch.searchsorted(experts, torch.arange(len(self.up), device=x.device), right=True, out_int32=True)

        def project(rows: Tensor, stack: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
            out = grouped_mm(rows, stack.mT, offs=offsets)
            out = out + 2.0 * grouped_mm(grouped_mm(rows, a.mT, offs=offsets), b.mT, offs=offsets)
            return out if bias is None else out + bias[experts]

        up_bias, down_bias = self.biases or (None, None)
        pre = project(x[order // top_k], self.up, self.up_a, self.up_b, up_bias)
        out = project(self.gate(pre), self.down, self.down_a, self.down_b, down_bias)
        rows = torch.empty_like(out).index_copy(0, order, out * weights.flatten()[order, None])
        return rows.view(tokens, top_k, -1).sum(1)


def quantize(block: Block, base: str, shape: Shape, device: torch.device) -> None:
    """Store the experts in NF4 with double quantization, or as FP8 in blocks of 128 x 128."""
    if base == "nf4":
        quantize_experts(block, nf4())
        return
    if shape.hidden % 128 or shape.inner % 128:
        raise NotTimed(f"blocks of 128 x 128 do not divide the experts' sizes {shape.hidden} and {shape.inner}")
    from transformers.integrations.finegrained_fp8 import FP8Experts

    dense = block.experts
    with torch.device(device):
        block.experts = FP8Experts(block.config, block_size=(128, 128))
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(dense, name).data.float()
        experts, rows, cols = weight.shape
        blocks = weight.view(experts, rows // 128, 128, cols // 128, 128)
        scale = blocks.abs().amax(dim=(2, 4)) / 448
        codes = (blocks / scale[:, :, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
        getattr(block.experts, name).data = codes
        getattr(block.experts, f"{name}_scale_inv").data = scale


def contender_names() -> list[str]:
    """Every contender there is: those that read the weights themselves are measured on 16-bit experts alone."""
    packs = ["frozen", "peft-moe", *(f"peft-moe:{backend}" for backend in BACKENDS)]
    return [*(f"{name}{base}" for name in packs for base in ("", "@nf4", "@fp8")), "plain", "peft", *peers.PEERS]


def contender(name: str, shape: Shape, rank: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The block with the adapter of one contender.

    Raises:
        ValueError: there is none of that name.
        NotTimed: it cannot run with this shape or on this device.
    """
    if name not in contender_names():
        raise ValueError(f"unknown contender {name!r}; expected one of {', '.join(contender_names())}")
    torch.manual_seed(0)
    name, _, base = name.partition("@")
    backend = name.partition(":")[2] or "auto"
    try:
        chosen = choose(backend, device, dtype, rank, shape.experts)
    except ValueError as error:
        raise NotTimed(str(error)) from None
    if backend not in ("auto", chosen):
        raise NotTimed(f"PEFT_MOE_GROUPED=0 in the environment runs {chosen!r} in the place of {backend!r}")
    if name == "plain" and rank * dtype.itemsize % 16:
        raise NotTimed(f"torch's grouped product reads rows of whole 16 bytes, r={rank} in {dtype} is none")
    block = Block(shape, device, dtype)
    if base:
        quantize(block, base, shape, device)
    if name == "frozen":
        return block
    if name == "plain":
        return Plain(block, shape, rank)
    if name == "peft" or name in peers.PEERS:
        config: peft.PeftConfig = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False,
        )  # fmt: skip
    else:
        config = MoELoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[], init_lora_weights=False,
            experts_backend=backend,
        )  # fmt: skip
    model = peft.get_peft_model(block, config, autocast_adapter_dtype=False)
    if name in peers.PEERS:
        peers.attach(name, model)
    return model.get_base_model()  # the wrapper's own forward runs once a model, not once a block


def inputs(
    count: int, shape: Shape, device: torch.device, dtype: torch.dtype, zipf: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `(T, H)`, index and weights `(T, k)`, and the output's gradient `(T, H)`; x and weights are leaves."""
    chosen = scores(count, shape.experts, zipf).softmax(dim=-1).topk(shape.top_k, dim=-1)
    weights, index = (value.to(device) for value in chosen)
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, shape.hidden, generator=generator).to(device, dtype).requires_grad_()
    probe = torch.randn(count, shape.hidden, generator=generator).to(device, dtype)
    return x, index, weights.to(dtype).requires_grad_(), probe


def scores(count: int, experts: int, zipf: bool) -> Tensor:
    """`(T, E)` router scores: the same for all experts on average, or favouring some as 1, 1/2, 1/3, ..."""
    generator = torch.Generator().manual_seed(count)
    found = torch.rand(count, experts, generator=generator)
    if zipf:  # the k largest of these are draws without replacement, in proportion
        found = -found.log() * torch.arange(1, experts + 1)
        return -found.log()
    return found

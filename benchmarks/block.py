"""One experts block with per-expert LoRA: time and memory of forward and backward, all contenders in one run.

    python benchmarks/block.py                    # Qwen3-30B-A3B's block, on the GPU (tiny sizes on a CPU)
    python benchmarks/block.py --tokens 512 4096  --repeats 30

Contenders: `frozen` (transformers' grouped experts, no adapter), `peft` (stock PEFT, `target_parameters`), `peft-moe`,
`peft-moe:BACKEND`, and `peft-moe@nf4`, `peft-moe@fp8` on quantized experts. Times are medians of CUDA events; peak is
the most memory allocated above the resident weights. Ratios count: absolute times hold for one machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from common import measure, nf4
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peft_moe
from peft_moe import MoELoraConfig, quantize_experts


@dataclass(frozen=True)
class Shape:
    """E experts, top-k, hidden and inner size."""

    experts: int
    top_k: int
    hidden: int
    inner: int


QWEN3_30B = Shape(128, 8, 2048, 768)
TINY = Shape(16, 2, 64, 48)


class Block(nn.Module):
    """Routing held fixed: the experts alone are measured."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            num_experts=shape.experts, num_experts_per_tok=shape.top_k, hidden_size=shape.hidden,
            moe_intermediate_size=shape.inner,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            self.experts = Qwen3MoeExperts(config).to(dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            parameter.requires_grad_(False)
        self.config = config

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def quantize(block: Block, base: str, shape: Shape, device: torch.device) -> None:
    """Store the experts in NF4 with double quantization, or as FP8 in blocks of 128 x 128."""
    if base == "nf4":
        quantize_experts(block, nf4())
        return
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


def contender(name: str, shape: Shape, rank: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The block with the adapter of one contender."""
    torch.manual_seed(0)
    block = Block(shape, device, dtype)
    name, _, base = name.partition("@")
    if base:
        quantize(block, base, shape, device)
    if name == "frozen":
        return block
    if name == "peft":
        config: peft.PeftConfig = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False,
        )  # fmt: skip
    else:
        config = MoELoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[], init_lora_weights=False,
            experts_backend=name.partition(":")[2] or "auto",
        )  # fmt: skip
    return peft.get_peft_model(block, config, autocast_adapter_dtype=False)


def run(
    names: list[str], shape: Shape, tokens: list[int], rank: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, float | str | int]]:
    """A row for every contender and number of tokens."""
    rows = []
    for name in names:
        model = contender(name, shape, rank, device, dtype)
        for count in tokens:
            generator = torch.Generator().manual_seed(count)
            scores = torch.rand(count, shape.experts, generator=generator)
            weights, index = (value.to(device) for value in scores.softmax(dim=-1).topk(shape.top_k, dim=-1))
            weights = weights.to(dtype).requires_grad_()
            x = torch.randn(count, shape.hidden, generator=generator).to(device, dtype).requires_grad_()
            probe = torch.randn(count, shape.hidden, generator=generator).to(device, dtype)

            def step(
                model: nn.Module = model, x: Tensor = x, index: Tensor = index, weights: Tensor = weights,
                probe: Tensor = probe,
            ) -> None:  # fmt: skip
                model(x, index, weights).backward(probe)
                for tensor in (x, weights, *model.parameters()):
                    tensor.grad = None

            milliseconds, peak = measure(step, device, repeats)
            rows.append({"contender": name, "tokens": count, "ms": round(milliseconds, 3), "peak_mib": round(peak, 1)})
            print(f"{name:10s} T={count:6d}  {milliseconds:8.3f} ms  {peak:8.1f} MiB", flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure and print; with --out write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=["frozen", "peft", "peft-moe"])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    tokens = arguments.tokens or ([512, 4096, 16384] if on_gpu else [64])
    machine = torch.cuda.get_device_name() if on_gpu else "CPU (times mean nothing here)"
    print(
        f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"peft-moe {peft_moe.__version__}; r={arguments.rank}"
    )
    rows = run(
        arguments.contenders, QWEN3_30B if on_gpu else TINY, tokens, arguments.rank, arguments.repeats, device,
        torch.bfloat16 if on_gpu else torch.float32,
    )  # fmt: skip
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

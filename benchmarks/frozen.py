"""A block whose experts are frozen: its own forward against the grouped one, forward and backward, in one run.

    python benchmarks/frozen.py                      # Qwen3-30B-A3B's block on the GPU (a tiny one on a CPU)
    python benchmarks/frozen.py --bases bf16 nf4     --tokens 512 2048 4096

On transformers 4 the experts are a list and the block's own forward is a loop over them; on transformers 5 they are
stacked and it is grouped already. Gradients are those of attention-only LoRA: of the input and of the router. Beside
the times stands the cosine between both outputs and between both gradients of the input.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from common import heading, measure, nf4, output, positive, save
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import peft_moe
from peft_moe import enable_grouped_experts, quantize_experts

FULL = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
TINY = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


class Layer(nn.Module):
    """The block where a model has it."""

    def __init__(self, sizes: dict[str, int], device: str, base: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(norm_topk_prob=True, **sizes)
        config._experts_implementation = "grouped_mm"  # of transformers 5
        with torch.device(device):
            self.mlp = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if base == "nf4":
            quantize_experts(self, nf4())
        self.mlp.experts.requires_grad_(False)

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and gradient of the input."""
        x = x.detach().requires_grad_()
        found = self.mlp(x)
        found = found[0] if isinstance(found, tuple) else found
        found.backward(torch.ones_like(found))
        assert x.grad is not None
        return found.detach(), x.grad


def main(arguments: list[str] | None = None) -> list[dict[str, float | str | int]]:
    """Measure and print; with --out write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--tokens", nargs="+", type=positive)
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=output)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, lengths = (FULL, [512, 2048, 4096]) if device == "cuda" else (TINY, [64])
    print(f"{heading()}; {sizes}")
    rows: list[dict[str, float | str | int]] = []
    for base in options.bases:
        layer = Layer(sizes, device, base)
        for tokens in options.tokens or lengths:
            x = torch.randn(1, tokens, sizes["hidden_size"], device=device, dtype=torch.bfloat16)
            results = {}
            for name in ("itself", "grouped"):
                if name == "grouped":
                    report = enable_grouped_experts(layer)
                    assert not report.left_alone, str(report)
                results[name] = copy.deepcopy(layer.step(x))
                milliseconds, peak = measure(partial(layer.step, x), torch.device(device), options.repeats)
                rows.append({"base": base, "tokens": tokens, "forward": name, "ms": milliseconds, "peak_mib": peak})
                print(f"{base:5} {tokens:6} {name:8} {milliseconds:9.2f} ms {peak:8.0f} MiB", flush=True)
            peft_moe.disable_grouped_experts(layer)
            cosines = [
                torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
                for a, b in zip(*results.values(), strict=True)
            ]
            rows[-1] |= {"cosine_output": cosines[0], "cosine_gradient": cosines[1]}
            print(f"{'':13}cosine of outputs {cosines[0]:.6f}, of gradients {cosines[1]:.6f}", flush=True)
    if options.out is not None:
        save(options.out, settings={"repeats": options.repeats}, rows=rows)
    return rows


if __name__ == "__main__":
    main()

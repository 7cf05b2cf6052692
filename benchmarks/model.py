"""A whole model of Qwen3-30B-A3B's shape with random weights: tokens a second and memory, all contenders in one run.

    python benchmarks/model.py --base nf4 --contenders peft-moe loop
    python benchmarks/model.py --base bf16 --contenders attention peft peft-moe --tokens 2048 8192

Batch 1, gradient checkpointing, forward and backward. Peak is the most memory allocated above the base weights.

    peft-moe     experts and attention
    peft         the same by stock PEFT, 16-bit bases only
    attention    LoRA on attention alone, frozen experts as the base runs them: on transformers 4 in a loop
    grouped      the same after `enable_grouped_experts`
    unsloth      adapters as `peft` has them, run by unsloth_zoo where it is installed (see peers.py); likewise axolotl
    loop         a Python loop over the routed experts, each three `Linear4bit` with its own LoRA; NF4 alone
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import peers
import peft
import torch
from common import REFUSALS, heading, nf4, output, positive, save
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from peft_moe import MoELoraConfig, enable_grouped_experts, quantize_experts

GIB = 2**30
NEEDS = (
    "needs a CUDA device, of 80 GiB for 48 layers: they are built in bf16 (57 GiB), also for NF4; "
    "fewer --layers need less"
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONTENDERS = {name: ("bf16", "nf4") for name in ("peft-moe", "attention", "grouped")} | {
    "peft": ("bf16",), **dict.fromkeys(peers.PEERS, ("bf16",)), "loop": ("nf4",),
}  # fmt: skip


def build(layers: int) -> nn.Module:
    """The 16-bit model on the GPU."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # With the usual 0.02 the layers' outputs drown the tokens, and deep routers see 2,048 copies of one vector: they
    # choose 25 experts. Trained models are balanced: so are these, see the printed number of experts hit.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=10.0)
    return model


def experts_hit(model: nn.Module, tokens: int) -> list[int]:
    """How many experts of each layer get a token."""
    found: list[int] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]

    def count(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        logits = out[0] if isinstance(out, tuple) else out
        found.append(int(logits.topk(8, dim=-1).indices.unique().numel()))

    handles = [gate.register_forward_hook(count) for gate in gates]
    with torch.no_grad():
        model(input_ids=torch.randint(0, 151936, (1, tokens), device="cuda"))
    for handle in handles:
        handle.remove()
    return found


class Expert4bit(nn.Module):
    """One expert as three `Linear4bit` with a LoRA each, its factors in `dtype`."""

    def __init__(self, gate_up: Tensor, down: Tensor, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.linears = nn.ModuleList(_linear_4bit(weight) for weight in (gate, up, down))
        device = down.device
        shapes = [weight.shape for weight in (gate, up, down)]
        self.a = nn.ParameterList(torch.randn(rank, s[1], device=device, dtype=dtype) * s[1] ** -0.5 for s in shapes)
        self.b = nn.ParameterList(torch.zeros(s[0], rank, device=device, dtype=dtype) for s in shapes)

    def _project(self, index: int, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        low = linear(x, self.a[index].to(x.dtype))
        return self.linears[index](x) + 2.0 * linear(low, self.b[index].to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self._project(2, nn.functional.silu(self._project(0, x)) * self._project(1, x))


def _linear_4bit(weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
            quant_type="nf4",
        )  # fmt: skip
    linear.weight = bnb.nn.Params4bit(
        weight.contiguous().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    ).to(weight.device)
    return linear


class LoopExperts(nn.Module):
    """The routed experts in a loop, as a list of experts runs them."""

    def __init__(self, experts: nn.Module, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)  # type: ignore[union-attr]
        self.experts = nn.ModuleList(Expert4bit(gate_up, down, rank, dtype) for gate_up, down in pairs)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(index, num_classes=len(self.experts)).permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist():
            choice, token = torch.where(mask[expert])
            rows = self.experts[expert](x[token]) * weights[token, choice, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


def contender(name: str, base: str, layers: int, rank: int, fp32_adapters: bool) -> tuple[nn.Module, int]:
    """(model, bytes of the base weights)."""
    model = build(layers)
    config: peft.PeftConfig
    if name == "loop":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "experts") and hasattr(module.experts, "gate_up_proj"):
                module.experts = LoopExperts(module.experts, rank, torch.float32 if fp32_adapters else torch.bfloat16)
        gc.collect()
        torch.cuda.empty_cache()
        own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        resident = torch.cuda.memory_allocated() - own
        config = peft.LoraConfig(r=rank, target_modules=ATTENTION)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
        for module in adapted.modules():
            if isinstance(module, Expert4bit):  # PEFT froze what it does not know
                module.a.requires_grad_(True)
                module.b.requires_grad_(True)
        return adapted, resident
    if base == "nf4":
        quantize_experts(model, nf4())
        gc.collect()
        torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    if name in ("attention", "grouped"):
        config = peft.LoraConfig(r=rank, target_modules=ATTENTION)
    elif name == "peft" or name in peers.PEERS:
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=rank, target_modules=ATTENTION, target_parameters=experts)
    else:
        config = MoELoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    if name in peers.PEERS:
        for block in list(adapted.modules()):
            if isinstance(getattr(block, "experts", None), ParamWrapper):
                peers.attach(name, block)
    if name == "grouped":
        report = enable_grouped_experts(adapted)
        assert not report.left_alone, str(report)
    return adapted, resident


def measure(model: nn.Module, tokens: int, seconds: float, resident: int) -> dict[str, float]:
    """Median tokens a second of forward and backward, and the peak above the base weights."""
    ids = torch.randint(0, 151936, (1, tokens), device="cuda")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 20):
        times.append(step())
    own = sum(
        p.numel() * p.element_size() + p.grad.numel() * p.grad.element_size() for p in trainable if p.grad is not None
    )
    peak = torch.cuda.max_memory_allocated() - resident
    for parameter in trainable:
        parameter.grad = None
    return {
        "tokens_per_s": tokens / statistics.median(times), "base_gib": resident / GIB,
        "adapters_and_gradients_gib": own / GIB, "peak_above_base_gib": peak / GIB,
        "peak_above_base_and_adapters_gib": (peak - own) / GIB,
    }  # fmt: skip


def main(given: list[str] | None = None) -> None:
    """Measure and print; with --out write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["bf16", "nf4"], default="nf4")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["peft-moe", "loop"], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[2048])
    parser.add_argument("--layers", type=positive, default=48)
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--fp32-adapters", action="store_true", help="all factors in fp32, PEFT's default, not bf16")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=output, help="a JSON file, replaced when all is measured")
    arguments = parser.parse_args(given)
    for name in arguments.contenders:
        if arguments.base not in CONTENDERS[name]:
            known = [other for other, bases in CONTENDERS.items() if arguments.base in bases]
            parser.error(f"{name} runs on {CONTENDERS[name][0]} alone; --base {arguments.base} has {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.exit(2, f"benchmarks/model.py: {NEEDS}\n")
    settings = {key: getattr(arguments, key) for key in ("base", "layers", "rank", "fp32_adapters", "seconds")}
    print(
        f"{heading()}; {arguments.layers} layers, {arguments.base}, r={arguments.rank}, adapters in "
        f"{'fp32' if arguments.fp32_adapters else 'bf16'}"
    )
    rows: list[dict[str, Any]] = []
    not_timed: list[dict[str, Any]] = []

    def refuse(row: dict[str, Any], reason: Exception) -> None:
        not_timed.append({**row, "not_timed": str(reason)})
        print(f"{json.dumps(row)} not timed: {reason}", flush=True)

    for name in arguments.contenders:
        started = time.perf_counter()
        model = None
        try:
            model, resident = contender(name, arguments.base, arguments.layers, arguments.rank, arguments.fp32_adapters)
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
            built = time.perf_counter() - started
            hit = experts_hit(model, min(arguments.tokens))
            print(f"{name}: experts hit by {min(arguments.tokens)} tokens: {min(hit)} to {max(hit)} of 128 a layer")
        except REFUSALS as reason:
            refuse({"contender": name, "base": arguments.base}, reason)
            model = None
        for tokens in arguments.tokens if model is not None else []:
            row: dict[str, Any] = {"contender": name, "base": arguments.base, "tokens": tokens}
            try:
                found = measure(model, tokens, arguments.seconds, resident)
            except REFUSALS as reason:
                refuse(row, reason)
                model.zero_grad()
                torch.cuda.empty_cache()
                continue
            rows.append(row | {key: round(value, 3) for key, value in found.items()})
            print(f"{json.dumps(rows[-1])}  (built in {built:.0f} s)", flush=True)
        model = None
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out is not None:
        save(arguments.out, settings=settings, rows=rows, not_timed=not_timed)


if __name__ == "__main__":
    main()

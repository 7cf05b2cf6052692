"""Random native adapters on disk, written without the package's help, for property tests."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from peft_moe import MoELoraConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: architecture -> options of its config beside the sizes, and where its experts are.
BASES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_moe": ({"moe_intermediate_size": None, "num_experts": None}, "mlp.experts"),
    "gpt_oss": ({"intermediate_size": None, "num_local_experts": None}, "mlp.experts"),
    "llama4_text": ({"intermediate_size": None, "num_local_experts": None}, "feed_forward.experts"),
}
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "llama4_text": "Llama4ForCausalLM"}


@dataclass
class Adapter:
    """What is drawn. Attributes: chosen: layer -> adapted experts; a layer that is not in it has none."""

    base: str
    experts: int
    hidden: int
    inner: int
    layers: int
    dtype: str
    seed: int
    any_bits: bool
    chosen: dict[int, list[int]]
    ranks: dict[tuple[int, int], int]
    alphas: dict[tuple[int, int], float]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def interleaved(self) -> bool:
        """How the base holds gate and up."""
        return self.base == "gpt_oss"

    def module(self, layer: int) -> str:
        """The path of the experts of a layer."""
        return f"model.layers.{layer}.{BASES[self.base][1]}"

    def scaling(self, layer: int, expert: int) -> float:
        """Of one expert."""
        rank, alpha = self.ranks[layer, expert], self.alphas[layer, expert]
        return alpha / (math.sqrt(rank) if self.options.get("use_rslora") else rank)

    def slots(self) -> dict[str, tuple[int, int]]:
        """Slot -> (out, in)."""
        found = {}
        targets = self.options.get("target_experts", ["gate_up_proj", "down_proj"])
        if "gate_up_proj" in targets and self.options.get("split_gate_up"):
            found |= {"gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden)}
        elif "gate_up_proj" in targets:
            found["gate_up_proj"] = (2 * self.inner, self.hidden)
        if "down_proj" in targets:
            found["down_proj"] = (self.hidden, self.inner)
        return found


@st.composite
def adapters(draw: st.DrawFn, bases: list[str]) -> Adapter:
    """Any adapter that the native format holds, but DoRA's."""
    experts, layers = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    shared = draw(st.sampled_from([None, None, None, "outer"]))
    kind = "all" if shared else draw(st.sampled_from(["all", "some", "by layer"]))
    subsets = st.lists(st.integers(0, experts - 1), min_size=1, unique=True).map(sorted)
    everyone = list(range(experts))
    if kind == "by layer":
        names = draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True).map(sorted))
        chosen = {layer: draw(subsets) for layer in names}
    else:
        own = everyone if kind == "all" else draw(subsets)
        chosen = {layer: own for layer in range(layers)}
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3.5, 8, 0.3]))
    pairs = [(layer, expert) for layer, own in chosen.items() for expert in own]
    ranks, alphas = dict.fromkeys(pairs, rank), dict.fromkeys(pairs, alpha)
    if not shared and draw(st.booleans()):
        ranks = {one: draw(st.integers(1, 4)) for one in pairs}
    if not shared and draw(st.booleans()):
        alphas = {one: draw(st.sampled_from([1, 2, 3.5, 7, 0.1])) for one in pairs}
    base = draw(st.sampled_from(bases))
    module = f"model.layers.{{}}.{BASES[base][1]}.{{}}"
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 2, 5.5])),
        "expert_r": rank,
        "expert_alpha": alpha,
        "use_rslora": draw(st.booleans()),
        "expert_rank_pattern": {re.escape(module.format(*one)): value for one, value in ranks.items() if value != rank},
        "expert_alpha_pattern": {
            re.escape(module.format(*one)): value for one, value in alphas.items() if value != alpha
        },
        "share_experts": shared,
        "split_gate_up": False if shared else draw(st.booleans()),
        "target_experts": draw(st.sampled_from([["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])),
        "expert_indices": None if kind == "all" else chosen[0] if kind == "some" else chosen,
        "target_modules": [],
    }
    scalings = {ranks[one] ** (0.5 if options["use_rslora"] else 1) / alphas[one] for one in pairs}
    return Adapter(
        base=base, experts=experts, hidden=4 * draw(st.integers(1, 4)), inner=draw(st.integers(1, 9)), layers=layers,
        dtype=draw(st.sampled_from(list(DTYPES))), seed=draw(st.integers(0, 2**31)),
        any_bits=len(scalings) == 1 and draw(st.booleans()), chosen=chosen, ranks=ranks, alphas=alphas, options=options,
    )  # fmt: skip


def values(shape: tuple[int, ...], dtype: torch.dtype, any_bits: bool, generator: torch.Generator) -> Tensor:
    """Numbers with some zeros of both signs; with `any_bits` everything that the dtype can spell."""
    if any_bits:
        whole = torch.randint(0, 2**31, (2, *shape), generator=generator)
        bits = whole[0] % 2**16 if dtype.itemsize == 2 else whole[0] * 2 + whole[1] % 2
        kind = torch.int16 if dtype.itemsize == 2 else torch.int32
        return bits.to(torch.int64).sub(2 ** (8 * dtype.itemsize - 1)).to(kind).view(dtype)
    found = torch.randn(shape, generator=generator).to(dtype)
    found[torch.rand(shape, generator=generator) < 0.1] = 0.0
    found[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return found


def write_base(one: Adapter, folder: Path) -> None:
    """The config of the base; it has no weights."""
    sizes, _ = BASES[one.base]
    numbers = dict(zip(sizes, (one.inner, one.experts), strict=True))
    config = AutoConfig.for_model(
        one.base, hidden_size=one.hidden, num_hidden_layers=one.layers, num_attention_heads=1, num_key_value_heads=1,
        head_dim=4, vocab_size=8, num_experts_per_tok=1, **numbers,
    )  # fmt: skip
    config.architectures = [CLASSES[one.base]]
    config.save_pretrained(folder)


def write(one: Adapter, folder: Path) -> dict[str, Tensor]:
    """The adapter. Returns its tensors."""
    generator = torch.Generator().manual_seed(one.seed)
    dtype, shared = DTYPES[one.dtype], one.options["share_experts"]
    tensors = {}
    for layer, own in one.chosen.items():
        ranks = [one.ranks[layer, expert] for expert in own]
        for slot, (out, size) in one.slots().items():
            if len(set(ranks)) > 1:
                shapes = {"lora_A": (sum(ranks), size), "lora_B": (sum(ranks), out)}
            else:
                only_a, only_b = (shared and slot != "down_proj"), (shared and slot == "down_proj")
                shapes = {"lora_A": (1 if only_a else len(own), ranks[0], size)}
                shapes["lora_B"] = (1 if only_b else len(own), out, ranks[0])
            for factor, shape in shapes.items():
                key = f"base_model.model.{one.module(layer)}.{slot}.{factor}"
                tensors[key] = values(shape, dtype, one.any_bits, generator)
    config = MoELoraConfig(**one.options, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


def deltas(one: Adapter, tensors: dict[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    """(layer, projection) -> `(E, out, in)` fp64: scaling * B A of each expert, in the order of the base's rows."""
    found = {}
    for layer, own in one.chosen.items():
        halves = {}
        for slot, (out, size) in one.slots().items():
            delta = torch.zeros(one.experts, out, size, dtype=torch.float64)
            start = 0
            for position, expert in enumerate(own):
                rank = one.ranks[layer, expert]
                a, b = (
                    tensors[f"base_model.model.{one.module(layer)}.{slot}.{name}"].double()
                    for name in ("lora_A", "lora_B")
                )
                if a.dim() == 2:
                    a, b = a[start : start + rank], b[start : start + rank].T
                else:
                    a, b = a[position % len(a)], b[position % len(b)]
                delta[expert] = one.scaling(layer, expert) * (b @ a)
                start += rank
            halves[slot] = delta
        if "gate_proj" in halves:
            gate, up = halves.pop("gate_proj"), halves.pop("up_proj")
            both = torch.zeros(one.experts, 2 * one.inner, one.hidden, dtype=torch.float64)
            both[:, slice(0, None, 2) if one.interleaved else slice(0, one.inner)] = gate
            both[:, slice(1, None, 2) if one.interleaved else slice(one.inner, None)] = up
            halves["gate_up_proj"] = both
        found |= {(layer, slot): delta for slot, delta in halves.items()}
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found

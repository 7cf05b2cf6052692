"""vLLM's side of an adapter, written from its contract (`docs/serving.md`): which files it takes, and what they do.

E experts, r rank, H width, I inner width. It is stricter than vLLM in one thing: what vLLM would drop without a word is
an error here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .served import Dropped, ModelFacts, Refused, Served

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` can be
THREE_D = {"gpt_oss", "qwen3_vl_moe"}
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

# model type -> (how names of the adapter become names of vLLM's modules, path of a layer's experts, gate, down, up)
_PLAIN = ((), "model.layers.{}.mlp.experts", ("gate_proj", "down_proj", "up_proj"))
NAMES: dict[str, tuple[tuple[tuple[str, str], ...], str, tuple[str, str, str]]] = {
    "qwen3_moe": _PLAIN,
    "deepseek_v3": _PLAIN,
    "glm4_moe": _PLAIN,
    "mixtral": ((), "model.layers.{}.block_sparse_moe.experts", ("w1", "w2", "w3")),
    "gpt_oss": (((".self_attn.", ".attn."),), "model.layers.{}.mlp.experts", ("w1", "w2", "w3")),
    "qwen3_vl_moe": (
        (("model.language_model.", "language_model.model."),),
        "language_model.model.layers.{}.mlp.experts",
        ("gate_proj", "down_proj", "up_proj"),
    ),
}


def serve(folder: Path, facts: ModelFacts, max_lora_rank: int = 512, force_2d: bool = False) -> Served:
    """What vLLM adds to its weights. Raises `Refused`, or `Dropped` for tensors that it would not use.

    Args: force_2d: as with `--enable-mixed-moe-lora-format` and an adapter declared to be 2-D.
    """
    assert max_lora_rank in MAX_LORA_RANKS
    scaling, rank = _scaling(json.loads((folder / "adapter_config.json").read_text()), max_lora_rank)
    three_d = facts.model_type in THREE_D and not force_2d
    loras = _modules(load_file(folder / "adapter_model.safetensors"), facts, three_d, scaling)
    served = Served()
    mapping, path, leaves = NAMES[facts.model_type]
    for layer in range(facts.layers):
        where = path.format(layer)
        found = _three_d(loras, where, facts) if three_d else _two_d(loras, where, facts, leaves)
        if found is not None:
            served.experts[layer] = found
        for name, (inputs, outputs) in facts.linears.items():
            hf = f"{facts.prefix}.{layer}.{name}"
            pair = loras.pop(_mapped(hf, mapping), None)
            if pair is not None:
                a, b = pair
                _expect(hf, a, (rank, inputs))
                _expect(hf, b, (outputs, rank))
                served.linears[hf] = b @ a
    if loras:
        raise Dropped(f"no module of the model asks for {sorted(loras)}")
    return served


def _scaling(config: dict[str, Any], max_lora_rank: int) -> tuple[float, int]:
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    if missing:
        raise Refused(f"required fields {missing} are missing")
    start = config.get("init_lora_weights", True)
    reasons = {
        "modules_to_save": bool(config.get("modules_to_save")),
        "DoRA": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": isinstance(start, str) and start.lower() not in HARMLESS_STARTS,
        "aLoRA": bool(config.get("alora_invocation_tokens")),
        "layer_replication": bool(config.get("layer_replication")),
        "r": not config["r"] > 0,
        "max_lora_rank": config["r"] > max_lora_rank,
        # older versions do not read them, newer ones do: an adapter for all of them has none
        "patterns": bool(config.get("rank_pattern")) or bool(config.get("alpha_pattern")),
        "target_modules": not isinstance(config["target_modules"], (list, str)),
    }
    if any(reasons.values()):
        raise Refused(", ".join(name for name, set_ in reasons.items() if set_))
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank), rank


def _mapped(name: str, mapping: tuple[tuple[str, str], ...]) -> str:
    for old, new in mapping:
        name = name.replace(old, new)
    return name


def _modules(
    tensors: dict[str, Tensor], facts: ModelFacts, three_d: bool, scaling: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module of vLLM -> (A, B times the scaling): names first checked as when the file is opened."""
    mapping, _, leaves = NAMES[facts.model_type]
    expected = {name.rpartition(".")[2] for name in facts.linears}
    expected |= {"experts"} if three_d else {f"experts.{e}.{leaf}" for e in range(facts.experts) for leaf in leaves}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise Refused(f"{key} is unsupported LoRA weight")
        module = _mapped(match[1], mapping)
        if "base_layer" not in key:  # those are never looked at here, whatever they are
            suffix = module[module.find(".experts") + 1 :] if ".experts" in module else module.rpartition(".")[2]
            if suffix not in expected:
                raise Refused(f"expected target modules in {sorted(expected)[:4]} but received {module}")
        halves.setdefault(module, {})[match[2]] = tensor.double()
    whole = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise Refused(f"{module} has half a pair")
        whole[module] = (pair["A"], pair["B"] * scaling)
    return whole


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise Refused(f"{name}: shape {tuple(tensor.shape)} where the buffer takes {shape}")


def _two_d(
    loras: dict[str, tuple[Tensor, Tensor]], path: str, facts: ModelFacts, leaves: tuple[str, str, str]
) -> dict[str, Tensor] | None:
    names = [f"{path}.{e}.{leaf}" for e in range(facts.experts) for leaf in leaves]
    found = [loras.pop(name, None) for name in names]
    if not any(pair is not None for pair in found):
        return None
    if any(pair is None for pair in found):
        raise Refused(f"{path}: not all three projections of all experts")
    gate, down, up = (found[slot::3] for slot in range(3))
    sizes = ((gate, facts.hidden, facts.inner), (down, facts.inner, facts.hidden), (up, facts.hidden, facts.inner))
    rank = gate[0][0].shape[0]
    products = []
    for pairs, inputs, outputs in sizes:
        for a, b in pairs:
            _expect(path, a, (rank, inputs))
            _expect(path, b, (outputs, rank))
        products.append(torch.stack([b @ a for a, b in pairs]))
    if facts.interleaved:  # its weights lie as in the checkpoint, and its 2-D buffers hold gate and up apart
        first = torch.stack([products[0], products[2]], dim=2).flatten(1, 2)
    else:
        first = torch.cat([products[0], products[2]], dim=1)
    return {"gate_up_proj": first, "down_proj": products[1]}


def _three_d(loras: dict[str, tuple[Tensor, Tensor]], path: str, facts: ModelFacts) -> dict[str, Tensor] | None:
    """The fused first projection goes by `base_layer`; the expert is the slow index of A's rows, the fast one of B's
    columns. Gate and up rows lie as in the checkpoint.
    """
    if path not in loras:
        return None
    if f"{path}.base_layer" not in loras:
        raise Refused(f"{path}: gate_up has no factors")
    found = {}
    sizes = {
        "gate_up_proj": (f"{path}.base_layer", facts.hidden, 2 * facts.inner),
        "down_proj": (path, facts.inner, facts.hidden),
    }
    for projection, (name, inputs, outputs) in sizes.items():
        a, b = loras.pop(name)
        rank = a.shape[0] // facts.experts
        _expect(name, a, (facts.experts * rank, inputs))
        _expect(name, b, (outputs, rank * facts.experts))
        experts = range(facts.experts)
        found[projection] = torch.stack([b[:, e :: facts.experts] @ a[e * rank : (e + 1) * rank] for e in experts])
    return found

"""SGLang's side of an adapter, written from its contract (`docs/serving.md`): which files it takes, and what they do.

E experts, r rank, H width, I inner width. It is stricter than SGLang in one thing: what SGLang would drop or cut
without a word is an error here.
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

STACKED = {  # leaf in the config or in a key -> the module that holds it
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa", "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}  # fmt: skip
KNOWN = {
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head", "fused_qkv_a_proj_with_mqa",
    "q_b_proj", "kv_b_proj",
}  # fmt: skip

Pair = dict[str, Tensor]


def serve(folder: Path, facts: ModelFacts) -> Served:
    """What SGLang adds to its weights. Raises `Refused`, or `Dropped` for tensors that it would not use."""
    config = json.loads((folder / "adapter_config.json").read_text())
    targets, rank, scaling = _settings(config)
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        number = re.search(r"layers\.(\d+)\.", key)
        if number is None:
            raise Dropped(f"{key} belongs to no layer")
        layers.setdefault(int(number[1]), {})[key] = tensor.double()
    served = Served()
    stacks = {layer: _normalised(weights) for layer, weights in layers.items()}
    shared = _shared_outer(stacks)
    experts_too = {"gate_up_proj", "down_proj"} <= targets  # or it leaves the experts of all layers without LoRA
    for layer, weights in stacks.items():
        if layer >= facts.layers:
            raise Dropped(f"there is no layer {layer}")
        experts: dict[str, dict[str, Any]] = {}
        plain: dict[str, Pair] = {}
        for key, tensor in weights.items():
            fitting = [target for target in targets if target in key]
            if not fitting:
                raise Dropped(f"{key} matches none of {sorted(targets)}")
            target, factor = max(fitting, key=len), "A" if "lora_A" in key else "B"
            number = re.search(r"experts\.(\d+)\.", key)
            if number is not None:
                slot = experts.setdefault(target, {}).setdefault(factor, {})
                if isinstance(slot, Tensor):
                    raise Refused(f"{key}: a stacked tensor and single experts")
                slot[int(number[1])] = tensor
            elif "experts" in key and tensor.dim() == 3:
                experts.setdefault(target, {})[factor] = tensor
            else:
                plain.setdefault(key.partition(".lora_")[0], {})[factor] = tensor
        if experts and not experts_too:
            raise Dropped(f"experts are adapted where both gate_up_proj and down_proj are targeted, not {targets}")
        if experts:
            served.experts[layer] = _experts(experts, facts, rank, scaling, shared)
        for module, pair in plain.items():
            served.linears |= _linear(module, pair, layer, facts, rank, scaling)
    return served


def _settings(config: dict[str, Any]) -> tuple[set[str], int, float]:
    if str(config.get("peft_type")).lower() != "lora":
        raise Refused("peft_type")
    rank, alpha, names = config["r"], config["lora_alpha"], config["target_modules"]
    if not isinstance(names, list):
        raise Refused("target_modules must be a list to tell the modules from it")
    if config.get("use_dora"):
        raise Refused("DoRA")
    if set((config.get("rank_pattern") or {}).values()) - {rank}:
        raise Refused("rank_pattern")
    if set((config.get("alpha_pattern") or {}).values()) - {alpha}:
        raise Refused("alpha_pattern")
    if config.get("modules_to_save") or config.get("lora_bias") or config.get("bias", "none") != "none":
        raise Dropped("modules_to_save or biases are not looked at")
    targets = {STACKED.get(name.rpartition(".")[2], name.rpartition(".")[2]) for name in names}
    if targets - KNOWN:
        raise Refused(f"no buffers for {sorted(targets - KNOWN)}")
    return targets, rank, alpha / rank  # rsLoRA is not known


def _normalised(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors under the names of the stacked modules, rank blocks of A one under the other."""
    weights = dict(weights)
    for key in list(weights):
        for short, name in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
            if short in key:
                weights[key.replace(short, name)] = weights.pop(key)
    for key in [key for key in weights if ".q_proj." in key]:
        q, v = weights.pop(key), weights.pop(key.replace("q_proj", "v_proj"), None)
        if v is None:
            raise Refused(f"{key} without v_proj")
        k = weights.pop(key.replace("q_proj", "k_proj"), None)
        if k is None:
            k = torch.zeros_like(v)
        weights[key.replace("q_proj", "qkv_proj")] = torch.cat([q, k, v])
    for key in list(weights):
        if "gate_proj" in key:
            gate, up = weights.pop(key), weights.pop(key.replace("gate_proj", "up_proj"), None)
            up = torch.zeros_like(gate) if up is None else up
            weights[key.replace("gate_proj", "gate_up_proj")] = torch.cat([gate, up], dim=-2)
        elif "gate_up_proj" in key and "lora_A" in key:  # one A for both
            weights[key] = torch.cat([weights[key]] * 2, dim=-2)
    for key in [key for key in weights if "q_a_proj" in key]:
        a = weights.pop(key)
        kv = weights.pop(key.replace("q_a_proj", "kv_a_proj_with_mqa"), None)
        kv = torch.zeros_like(a) if kv is None else kv
        weights[key.replace("q_a_proj", "fused_qkv_a_proj_with_mqa")] = torch.cat([a, kv])
    return weights


def _shared_outer(layers: dict[int, dict[str, Tensor]]) -> bool:
    """Told by the A of gate_up alone, for all adapters at once."""
    found = set()
    for weights in layers.values():
        for key, tensor in weights.items():
            if "gate_up_proj" in key and "lora_A" in key:
                if tensor.dim() == 3:
                    found.add(tensor.shape[0] == 1)
                elif re.search(r"experts\.\d+\.", key):
                    found.add(False)
    if len(found) > 1:
        raise Refused("mixed shared-outer formats")
    return True in found


def _experts(
    experts: dict[str, dict[str, Any]], facts: ModelFacts, rank: int, scaling: float, shared: bool
) -> dict[str, Tensor]:
    found = {}
    sizes = {"gate_up_proj": (facts.hidden, 2 * facts.inner, 2), "down_proj": (facts.inner, facts.hidden, 1)}
    for target, (inputs, outputs, blocks) in sizes.items():
        one_a, one_b = shared and target == "gate_up_proj", shared and target == "down_proj"
        a = _buffer(experts.get(target, {}).get("A"), (blocks * rank, inputs), facts.experts, one_a)
        b = _buffer(experts.get(target, {}).get("B"), (outputs, rank), facts.experts, one_b) * scaling
        if target == "gate_up_proj":  # B is all gates, then all ups, in every file
            gate, up = b[:, : facts.inner] @ a[:, :rank], b[:, facts.inner :] @ a[:, rank:]
            product = torch.stack([gate, up], 2).flatten(1, 2) if facts.interleaved else torch.cat([gate, up], 1)
        else:
            product = b @ a
        found[target] = product.expand(facts.experts, -1, -1)
    return found


def _buffer(found: Any, shape: tuple[int, int], experts: int, one: bool) -> Tensor:
    """The pool's buffer `(E or 1, *shape)`, zero where the adapter has nothing."""
    buffer = torch.zeros(1 if one else experts, *shape, dtype=torch.float64)
    if found is None:
        return buffer
    if isinstance(found, Tensor):
        if found.shape[0] != buffer.shape[0]:
            raise Refused(f"expert dimension {found.shape[0]} where {buffer.shape[0]} is expected")
        found = dict(enumerate(found))
    elif one and len(found) != 1:
        raise Refused("single experts where all share a factor")
    for expert, tensor in found.items():
        if expert >= buffer.shape[0]:
            raise Dropped(f"expert {expert}")
        if tuple(tensor.shape) != shape:
            raise Refused(f"LoRA buffer shape {shape} does not match weight shape {tuple(tensor.shape)}")
        buffer[expert] = tensor
    return buffer


def _linear(module: str, pair: Pair, layer: int, facts: ModelFacts, rank: int, scaling: float) -> dict[str, Tensor]:
    """Module of transformers -> delta; a stacked module gives one for each of its parts."""
    if set(pair) != {"A", "B"}:
        raise Refused(f"{module} has half a pair")
    below = module.partition(f"layers.{layer}.")[2]
    owner, _, leaf = below.rpartition(".")
    parts = [part for part, stack in STACKED.items() if stack == leaf] or [leaf]
    names = [f"{owner}.{part}" for part in parts]
    if any(name not in facts.linears for name in names):
        raise Dropped(f"the model has no {below}")
    sizes = [facts.linears[name] for name in names]
    a, b = pair["A"], pair["B"] * scaling
    wanted = (len(names) * rank, sizes[0][0]), (sum(out for _, out in sizes), rank)
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise Refused(f"{below}: shapes {tuple(a.shape)}, {tuple(b.shape)} where the buffers take {wanted}")
    blocks = zip(names, a.split(rank), b.split([out for _, out in sizes]), strict=True)
    return {f"{facts.prefix}.{layer}.{name}": rows @ block for name, block, rows in blocks}

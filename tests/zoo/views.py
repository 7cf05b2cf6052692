"""Writable views into the weights of an experts module, whatever its layout."""

from __future__ import annotations

from torch import Tensor, nn

# By projection, then by expert: the 2-D weights (out, in) whose rows, one under the other, are that projection.
Views = dict[str, list[list[Tensor]]]


def stack(weight: Tensor) -> list[list[Tensor]]:
    return [[expert] for expert in weight]


def weight_views(module: nn.Module, hidden: int) -> Views:
    """Writable views into the base weights; which way a stack lies is told by the side that is `hidden` wide."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        experts = [expert for expert in module.children() if list(expert.parameters())]
        if isinstance(experts[0], nn.Linear):
            return {"down_proj": [[expert.weight] for expert in experts]}
        first = {"gate_proj": ["gate_proj", "up_proj"], "w1": ["w1", "w3"], "fc1": ["fc1"], "wi": ["wi"]}
        second = {"gate_proj": "down_proj", "w1": "w2", "fc1": "fc2", "wi": "wo"}
        kind = next(name for name in first if hasattr(experts[0], name))
        return {
            "gate_up_proj": [[getattr(expert, name).weight for name in first[kind]] for expert in experts],
            "down_proj": [[getattr(expert, second[kind]).weight] for expert in experts],
        }
    if hasattr(module, "input_linear"):
        return {"gate_up_proj": stack(module.input_linear.weight), "down_proj": stack(module.output_linear.weight)}
    if hasattr(module, "mlp"):  # DBRX
        w1, v1, w2 = (p.view(-1, module.mlp.ffn_hidden_size, hidden) for p in module.mlp.parameters())
        pairs = [list(pair) for pair in zip(w1, v1, strict=True)]
        return {"gate_up_proj": pairs, "down_proj": stack(w2.transpose(1, 2))}
    if hasattr(module, "weight"):
        return {"weight": stack(module.weight)}
    if hasattr(module, "fc1"):
        first, second = module.fc1.weight, module.fc2.weight
    else:
        first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
        second = module.down_proj
    assert first.shape[1] != first.shape[2] and second.shape[1] != second.shape[2], "a square stack has no telling side"
    return {
        "gate_up_proj": stack(first if first.shape[2] == hidden else first.transpose(1, 2)),
        "down_proj": stack(second if second.shape[1] == hidden else second.transpose(1, 2)),
    }

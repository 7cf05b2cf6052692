"""What the servers' models have that an adapter can be put on, told from a model's `config.json` alone.

H width, I inner width of an expert, E experts. Nothing here is shared with the package under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Refused(ValueError):
    """The server says no, with a reason."""


class Dropped(ValueError):
    """The server would say nothing and serve the model without some tensor of the adapter."""


@dataclass
class Served:
    """What a server adds to the weights of its model, float64.

    experts: layer -> "gate_up_proj" (E, 2I, H) in the row order of the checkpoint, "down_proj" (E, H, I).
    linears: path of a module in transformers' model -> (out, in).
    """

    experts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    linears: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and names of one model.

    linears: name below `self_attn` or `mlp` of a layer -> (in, out). prefix: of the layers in transformers' model.
    """

    model_type: str
    hidden: int
    inner: int
    experts: int
    layers: int
    prefix: str
    linears: dict[str, tuple[int, int]]

    @property
    def interleaved(self) -> bool:
        """Whether gate and up alternate in the checkpoint's fused projection."""
        return self.model_type == "gpt_oss"


def model_facts(config: dict[str, Any]) -> ModelFacts:
    """Args: config: of transformers 4 or 5, as `to_dict` gives it. Every layer has experts."""
    text = config.get("text_config", config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    found = (text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if text.get("kv_lora_rank"):
        rope, nope, value = text["qk_rope_head_dim"], text["qk_nope_head_dim"], text["v_head_dim"]
        low, rank = text["q_lora_rank"], text["kv_lora_rank"]
        linears = {
            "self_attn.q_a_proj": (hidden, low),
            "self_attn.q_b_proj": (low, heads * (nope + rope)),
            "self_attn.kv_a_proj_with_mqa": (hidden, rank + rope),
            "self_attn.kv_b_proj": (rank, heads * (nope + value)),
            "self_attn.o_proj": (heads * value, hidden),
        }
    else:
        size = text.get("head_dim") or hidden // heads
        few = text["num_key_value_heads"] * size
        linears = {
            "self_attn.q_proj": (hidden, heads * size),
            "self_attn.k_proj": (hidden, few),
            "self_attn.v_proj": (hidden, few),
            "self_attn.o_proj": (heads * size, hidden),
        }
    inner = text.get("moe_intermediate_size") or text["intermediate_size"]
    if text.get("n_shared_experts"):
        wide = inner * text["n_shared_experts"]
        linears |= {f"mlp.shared_experts.{name}": (hidden, wide) for name in ("gate_proj", "up_proj")}
        linears["mlp.shared_experts.down_proj"] = (wide, hidden)
    return ModelFacts(
        model_type=config["model_type"],
        hidden=hidden,
        inner=inner,
        experts=next(one for one in found if one),
        layers=text["num_hidden_layers"],
        prefix="model.language_model.layers" if "text_config" in config else "model.layers",
        linears=linears,
    )

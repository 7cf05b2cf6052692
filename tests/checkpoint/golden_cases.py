"""The models and adapters of `golden/`: written once on transformers 4 and once on 5, read on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from peft_moe import MoELoraConfig
from tests.zoo.builder import reinitialise, resolve_model_class, tiny_config

HOME = Path(__file__).parent / "golden"
WRITER = f"transformers_{transformers.__version__.split('.')[0]}"
WRITERS = ("transformers_4", "transformers_5")

SIZES: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=12,
    moe_intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=16,
)

# family -> (class, sizes of its own, options of its adapter). Between them they have each name of a block on which the
# two versions disagree, a list and parallel linears on version 4, and each form of an adapter's tensors on disk.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}, dict(target_modules=["q_proj", "v_proj"])),
    "mixtral": (
        "MixtralForCausalLM",
        {},
        dict(target_modules=["q_proj"], expert_rank_pattern={r"layers\.0\..*\.1": 4, r"layers\.0\..*\.3": 1}),
    ),
    "jamba": (
        "JambaForCausalLM",
        dict(
            expert_layer_period=1,
            expert_layer_offset=0,
            attn_layer_period=1,
            attn_layer_offset=0,
            mamba_dt_rank=2,
            mamba_d_state=4,
            use_mamba_kernels=False,
        ),
        dict(target_modules=["k_proj"], split_gate_up=True),
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        dict(router_jitter_noise=0.3),
        dict(target_modules=[], expert_indices={0: [3, 0]}, expert_alpha_pattern={r".*\.3": 8.0}),
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {}, dict(target_modules=["o_proj"], use_rslora=True)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        dict(
            num_key_value_heads=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            head_dim=4,
        ),
        dict(target_modules=["o_proj"], use_dora=True),
    ),
}


def build(name: str) -> torch.nn.Module:
    """A base model of a few thousand random weights."""
    model_class, sizes, _ = CASES[name]
    cls = resolve_model_class(name, model_class)
    known = cls.config_class().to_dict()
    overrides = {key: value for key, value in {**SIZES, **sizes}.items() if key in known or key in sizes}
    model = cls(tiny_config(cls.config_class, overrides))
    reinitialise(model, std=0.2)
    return model.float().eval()


def load_base(name: str) -> torch.nn.Module:
    """The saved base model, as a user would load it."""
    model = AutoModelForCausalLM.from_pretrained(HOME / name / "base", attn_implementation="eager")
    return model.float().eval()


def config(name: str) -> MoELoraConfig:
    """An adapter that does something from the start."""
    return MoELoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False, **CASES[name][2])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """`(2, 6, vocabulary)` of fixed ids."""
    ids = torch.randint(3, 16, (2, 6), generator=torch.Generator().manual_seed(7))
    return model(input_ids=ids, use_cache=False).logits

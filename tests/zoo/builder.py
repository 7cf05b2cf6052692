"""Shrinks any transformers architecture to a tiny, deterministic, random-weight model."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

BATCH, TOKENS = 2, 8
HIDDEN, INNER, EXPERTS, TOP_K, LAYERS, VOCAB = 64, 40, 4, 2, 2, 64

# Applied to every config that has the field. The widths are multiples of 8, as grouped_mm wants 16-byte strides; inner
# widths differ from HIDDEN also when doubled, so that a swapped pair of dimensions cannot go unnoticed.
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": INNER,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    # routed experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    # dense companions
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # every layer routes
    "mlp_layer_types": ["sparse"] * LAYERS,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "moe_layer_start_index": 0,
    "moe_layer_end_index": LAYERS - 1,
    "num_nextn_predict_layers": 0,
    "router_jitter_noise": 0.0,
}

# Multi-head latent attention: keys are not grouped, and `head_dim` means the rotary part.
MLA_SIZES: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}

KEEP = object()


def tiny_config(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """A config of `config_class` with the fields of `SIZES` it knows, then `overrides`, which win.

    Built in one go from keyword arguments: many configs derive fields (layer types, rope) when they are constructed.
    An override whose value is `KEEP` leaves the default of the class in place.
    """
    known = config_class().to_dict()
    values = {key: value for key, value in SIZES.items() if key in known}
    if "qk_rope_head_dim" in known:
        values.update(MLA_SIZES)
    values.update(overrides)
    config = config_class(**{key: value for key, value in values.items() if value is not KEEP})
    config._attn_implementation = "eager"
    return config


def resolve_model_class(module: str, name: str) -> type[PreTrainedModel]:
    """The class `name` of `transformers.models.<module>.modeling_<module>`."""
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)


def build_model(module: str, name: str, overrides: dict[str, Any]) -> PreTrainedModel:
    """A tiny float32 model in eval mode whose parameters depend on nothing but their names and shapes."""
    model_class = resolve_model_class(module, name)
    model = model_class(tiny_config(model_class.config_class, overrides))
    reinitialise(model)
    return model.float().eval()


@torch.no_grad()
def reinitialise(model: torch.nn.Module, std: float = 0.05) -> None:
    """Draw every floating parameter and the routers' bias buffers anew, deterministically.

    Upstream leaves some expert stacks as uninitialised memory and others at zero; either makes a comparison worthless.
    Matrices get a normal of `std`, norm weights lie around 1, all other vectors are small.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim < 2 and name.endswith(("weight", "scale", "gamma"))
        parameter.copy_(1.0 + 0.1 * noise if is_scale else std * noise)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or name.endswith(("expert_bias", "gate.bias")):
            buffer.copy_(0.01 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("tid2eid"):  # a table of expert ids by token id, all zero until a checkpoint fills it
            tokens, top_k = buffer.shape
            buffer.copy_((torch.arange(tokens)[:, None] + torch.arange(top_k)) % EXPERTS)

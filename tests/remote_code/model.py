"""A tiny causal language model around one of the remote-code-like blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .bailing import BailingBlock
from .deepseek_v3 import DeepseekBlock
from .kimi import KimiBlock

BLOCKS = {"deepseek_v3": DeepseekBlock, "kimi": KimiBlock, "bailing": BailingBlock}


class RemoteConfig(PretrainedConfig):
    """Settings of the model and of all its blocks; `block` is a key of `BLOCKS`."""

    model_type = "remote_moe"

    def __init__(
        self,
        block: str = "deepseek_v3",
        vocab_size: int = 48,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        moe_intermediate_size: int = 24,
        n_routed_experts: int = 8,
        num_experts_per_tok: int = 2,
        n_shared_experts: int | None = 1,
        n_group: int = 2,
        topk_group: int = 1,
        topk_method: str = "noaux_tc",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.5,
        routed_expert_hidden_size: int | None = None,
        latent_moe_use_norm: bool = False,
        hidden_act: str = "silu",
        **kwargs: Any,
    ):
        self.block = block
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = self.num_shared_experts = n_shared_experts
        self.n_group = n_group
        self.topk_group = topk_group
        self.topk_method = topk_method
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.routed_expert_hidden_size = routed_expert_hidden_size
        self.latent_moe_use_norm = latent_moe_use_norm
        self.hidden_act = hidden_act
        super().__init__(**kwargs)


class RemoteLayer(nn.Module):
    """A causal running mean with two projections in the place of attention, then the block; both with residuals."""

    def __init__(self, config: RemoteConfig):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = BLOCKS[config.block](config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        mean = self.q_proj(hidden_states).cumsum(dim=1) / positions.view(1, -1, 1).to(hidden_states.dtype)
        hidden_states = hidden_states + self.o_proj(mean)
        routed = self.mlp(self.norm(hidden_states))
        return hidden_states + (routed[0] if isinstance(routed, tuple) else routed)


class RemoteForCausalLM(PreTrainedModel):
    """Embedding, layers, head. `forward(input_ids, labels)` -> loss and logits `(B, S, vocabulary)`."""

    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RemoteLayer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if "norm" not in type(module).__name__.lower():
                nn.init.normal_(parameter, std=0.02 if name == "e_score_correction_bias" else 0.3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

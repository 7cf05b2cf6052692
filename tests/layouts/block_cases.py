"""Tiny blocks of transformers 4, and the slow but obvious ways to run their experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS, TOP_K = 32, 24, 6, 2

_MLP = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts_per_tok": TOP_K}
_MOE = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts_per_tok": TOP_K}
_LOCAL = {**_MLP, "num_local_experts": EXPERTS}
_QWEN = {**_MOE, "num_experts": EXPERTS}
_SHARED = {**_QWEN, "shared_expert_intermediate_size": 20}
_DEEPSEEK = {**_MOE, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 3, "topk_group": 2}
_DEEPSEEK |= {"routed_scaling_factor": 2.5}


@dataclass(frozen=True)
class Case:
    """One block: where it is, the settings that build it, and where its router's parameters are."""

    family: str
    block: str
    config: str
    settings: dict[str, Any]
    router: str = "gate"
    arguments: tuple[Any, ...] = ()
    jitter: tuple[str, ...] = ()
    variant: str = ""
    prepare: Callable[[nn.Module], None] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return "-".join(part for part in (self.family, self.block, self.variant) if part)

    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def block_class(self) -> type[nn.Module] | None:
        """None where the installed transformers does not have it."""
        try:
            return getattr(self.module(), self.block, None)
        except ImportError:
            return None

    def build(self) -> nn.Module:
        """Deterministic weights in fp32, evaluation mode, jitter off."""
        configuration = importlib.import_module(f"transformers.models.{self.family}.configuration_{self.family}")
        block = self.block_class()(getattr(configuration, self.config)(**self.settings), *self.arguments)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                scale = 0.05 if "correction_bias" in name else 0.25
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        if self.prepare is not None:
            self.prepare(block)
        return block.eval()


def _fp32_router(block: nn.Module) -> None:
    """Loading a checkpoint keeps these in fp32; converting the bare block does not."""
    block.keep_in_fp32 = ("gate", "moe_statics")


CASES = [
    Case("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", _LOCAL, jitter=("jitter_noise",)),
    Case("minimax", "MiniMaxSparseMoeBlock", "MiniMaxConfig", _LOCAL, jitter=("jitter_noise",)),
    Case("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", _SHARED),
    Case("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", {**_SHARED, "norm_topk_prob": True}, variant="norm"),
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", _QWEN),
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {**_QWEN, "norm_topk_prob": True}, variant="norm"),
    Case("qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig", _SHARED),
    Case("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", "Qwen3OmniMoeTextConfig", _QWEN),
    Case("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextSparseMoeBlock", "Qwen3OmniMoeTalkerTextConfig", _SHARED),
    Case("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", {**_MLP, "num_experts": EXPERTS}),
    Case("flex_olmo", "FlexOlmoSparseMoeBlock", "FlexOlmoConfig", {**_MLP, "num_experts": EXPERTS}),
    Case("jamba", "JambaSparseMoeBlock", "JambaConfig", {**_MLP, "num_experts": EXPERTS}, router="router"),
    Case("phimoe", "PhimoeSparseMoeBlock", "PhimoeConfig", _LOCAL, jitter=("input_jitter_noise",)),
    Case(
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "moe_num_experts": EXPERTS, "moe_k": TOP_K},
        prepare=_fp32_router,
    ),
    Case(
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {
            "hidden_size": HIDDEN,
            "moe_intermediate_size": INNER,
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 0,
        },
        prepare=_fp32_router,
        variant="alone",
    ),
    Case(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Moe",
        "HunYuanMoEV1Config",
        {**_MLP, "num_experts": EXPERTS, "moe_topk": [TOP_K]},
        arguments=(0,),
    ),
    Case("deepseek_v2", "DeepseekV2MoE", "DeepseekV2Config", {**_DEEPSEEK, "topk_method": "greedy"}),
    Case(
        "deepseek_v2",
        "DeepseekV2MoE",
        "DeepseekV2Config",
        {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
        variant="groups",
    ),
    Case("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", _DEEPSEEK),
    Case("dots1", "Dots1MoE", "Dots1Config", {**_DEEPSEEK, "norm_topk_prob": True}),
    Case("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig", _DEEPSEEK),
    Case("glm4v_moe", "Glm4vMoeTextMoE", "Glm4vMoeTextConfig", _DEEPSEEK),
    Case(
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlashConfig",
        {
            "hidden_size": HIDDEN,
            "expert_ffn_hidden_size": INNER,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 3,
            "moe_topk": 3,
            "routed_scaling_factor": 2.5,
        },
        router="router",
    ),
]


def experts_of(block: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Each expert as a function `(n, H) -> (n, H)`; identities, which are no experts, are left out."""
    return [expert for expert in block.experts if not isinstance(expert, nn.Identity)]


def by_loop(block: nn.Module) -> Callable[..., Tensor]:
    """`run_experts` as a loop that visits each expert with its tokens."""

    def run(x: Tensor, idx: Tensor, w: Tensor, accumulate_dtype: torch.dtype | None = None) -> Tensor:
        experts = experts_of(block)
        assert x.ndim == 2 and idx.shape == w.shape == (x.shape[0], idx.shape[1]) and idx.dtype == torch.int64
        assert int(idx.min()) >= 0 and int(idx.max()) <= len(experts)
        out = torch.zeros(x.shape, dtype=accumulate_dtype or x.dtype, device=x.device)
        for i, expert in enumerate(experts):
            token, slot = torch.where(idx == i)
            if token.numel():
                out = out.index_add(0, token, (expert(x[token]) * w[token, slot, None]).to(out.dtype))
        return out

    return run


def by_mask(block: nn.Module) -> Callable[..., Tensor]:
    """`run_experts` with every expert on every token: no shape depends on the routing, so it compiles."""

    def run(x: Tensor, idx: Tensor, w: Tensor, accumulate_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.zeros(x.shape, dtype=accumulate_dtype or x.dtype, device=x.device)
        for i, expert in enumerate(experts_of(block)):
            weight = w.masked_fill(idx != i, 0).sum(dim=-1, keepdim=True)
            out = out + (expert(x) * weight).to(out.dtype)
        return out

    return run


def tokens(batch: int = 2, length: int = 7, width: int = HIDDEN, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))

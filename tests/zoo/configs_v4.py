"""The architectures of transformers 4 (4.57)."""

from __future__ import annotations

from transformers import PreTrainedModel

from .builder import KEEP
from .entry import Entry, entry, image_inputs, masked_text_inputs, seq2seq_inputs

MLP = r"model\.layers\.\d+\.mlp\.experts"
BARE = r"layers\.\d+\.mlp\.experts"  # models without a language-model head
SPARSE = r"model\.layers\.\d+\.block_sparse_moe\.experts"
BLOCK = r"model\.layers\.\d+\.block_sparse_moe"  # the block itself holds two parallel linears
FFN = r"model\.layers\.\d+\.feed_forward\.experts"

# In Phi also the width of a mask around the best logit: at zero both choices weigh exactly 1, whatever the router says.
PHIMOE_JITTER = 0.3

JETMOE = dict(kv_channels=16)


def low_limit(model: PreTrainedModel) -> None:
    """Lower the clamp of GPT-OSS, a constant 7 in its code, so that a tiny model reaches it."""
    for module in model.modules():
        if isinstance(getattr(module, "limit", None), float):
            module.limit = 0.3


def mrope(*section: int) -> dict[str, object]:
    """The rope settings of a multimodal text model; `section` sums to half the rotary dimension."""
    return {"rope_type": "default", "mrope_section": list(section)}


def lists(name: str, model_class: str, path: str = MLP, **options: object) -> Entry:
    """An entry whose experts are an `nn.ModuleList`."""
    return entry(name, model_class, path, kind="modulelist", **options)


LISTED: list[Entry] = [
    lists("mixtral", "MixtralForCausalLM", SPARSE),
    lists("qwen2_moe", "Qwen2MoeForCausalLM"),
    lists("qwen3_moe", "Qwen3MoeForCausalLM"),
    lists("qwen3_next", "Qwen3NextForCausalLM"),
    lists(
        "qwen3_omni_moe_text",
        "Qwen3OmniMoeThinkerTextModel",
        BARE,
        module="qwen3_omni_moe",
        rope_scaling=mrope(2, 3, 3),
    ),
    entry("qwen3_vl_moe_text", "Qwen3VLMoeTextModel", BARE, module="qwen3_vl_moe", rope_scaling=mrope(2, 3, 3)),
    lists("olmoe", "OlmoeForCausalLM"),
    lists("flex_olmo", "FlexOlmoForCausalLM"),
    lists("deepseek_v2", "DeepseekV2ForCausalLM"),
    lists("deepseek_v3", "DeepseekV3ForCausalLM"),
    lists("dots1", "Dots1ForCausalLM"),
    lists("glm4_moe", "Glm4MoeForCausalLM"),
    lists(
        "Glm4vMoe_text",
        "Glm4vMoeTextModel",
        BARE,
        module="glm4v_moe",
        inputs=masked_text_inputs,
        rope_scaling=mrope(2, 1, 1),
    ),
    lists("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    lists("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    lists(
        "jamba",
        "JambaForCausalLM",
        FFN,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    lists("phimoe", "PhimoeForCausalLM", SPARSE, router_jitter_noise=PHIMOE_JITTER),
    lists("minimax", "MiniMaxForCausalLM", SPARSE),
    lists(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        num_layers=1,
        zero_expert_num=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=40,
    ),
    entry("gpt_oss", "GptOssForCausalLM", MLP, prepare=low_limit),
    entry("llama4_text", "Llama4ForCausalLM", FFN, module="llama4"),
    entry(
        "dbrx",
        "DbrxForCausalLM",
        r"transformer\.blocks\.\d+\.ffn\.experts",
        n_heads=4,
        n_layers=2,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=40, moe_num_experts=4, moe_top_k=2),
    ),
    entry("jetmoe", "JetMoeForCausalLM", r"model\.layers\.\d+\.mlp", kind="other", **JETMOE),
    entry(
        "jetmoe_attention",
        "JetMoeForCausalLM",
        r"model\.layers\.\d+\.self_attention\.experts\.(input|output)_linear",
        module="jetmoe",
        kind="other",
        **JETMOE,
    ),
    entry("granitemoe", "GraniteMoeForCausalLM", BLOCK, kind="other"),
    entry("granitemoeshared", "GraniteMoeSharedForCausalLM", BLOCK, kind="other"),
    entry(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        BLOCK,
        kind="other",
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=8,
    ),
    entry("aria_text", "AriaTextForCausalLM", MLP, module="aria", kind="other"),
    entry(
        "nllb-moe",
        "NllbMoeForConditionalGeneration",
        r"model\.(en|de)coder\.layers\.\d+\.ffn\.experts",
        module="nllb_moe",
        kind="other",
        inputs=seq2seq_inputs,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    ),
    entry(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        r"(en|de)coder\.block\.\d+\.layer\.\d+\.mlp\.experts",
        kind="other",
        inputs=seq2seq_inputs,
        d_kv=16,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    entry(
        "vitpose_backbone",
        "VitPoseBackbone",
        r"encoder\.layer\.\d+\.mlp\.experts",
        kind="other",
        inputs=image_inputs,
        image_size=[32, 32],
        patch_size=[8, 8],
        part_features=16,
        out_indices=[2],
        out_features=KEEP,
    ),
]

BROKEN: dict[str, str] = {
    "doge": "with is_moe=True its mixture block returns a tuple that the decoder layer hands to dropout (TypeError)",
}

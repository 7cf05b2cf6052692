"""Valid adapters and a valid checkpoint, tiny, from which inputs are made."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_moe import MoELoraConfig, export_adapter
from peft_moe.compat import transformers_major

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
# Of transformers 4 "all-linear" takes in the router, on which SGLang serves no adapter.
_ALL = "all-linear" if transformers_major() >= 5 else ["q_proj", "k_proj", "v_proj", "o_proj"]
_ATTENTION = ["q_proj", "o_proj"]

STOCK = ("stock", "stock experts")  # of PEFT's own type
SERVED = {"vllm": "plain", "sglang": "some", "vllm ragged": "ragged"}  # -> of which it is an export
NOTED = ("stock experts", *SERVED)  # with a note of what they were
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": _ATTENTION},
    "ragged": {"target_modules": [], "use_rslora": True, "expert_rank_pattern": {r"experts\.1": 3, r".*\.2": 1}},
    "some": {"target_modules": _ALL, "split_gate_up": True, "expert_indices": [0, 2], "expert_alpha": 3},
    "shared": {"target_modules": ["q_proj"], "share_experts": "outer", "rank_pattern": {"q_proj": 3}},
    "dora": {"target_modules": _ATTENTION, "use_dora": True, "modules_to_save": ["lm_head"]},
    "patterns": {"target_modules": r".*\.(q|v)_proj", "alpha_pattern": {"v_proj": 5}, "expert_r": 1,
                 "expert_alpha_pattern": {r"layers\.0\.mlp\.experts\.[01]": 7.5}, "target_experts": ["down_proj"]},
}  # fmt: skip


def base_model() -> Any:
    """One layer, three experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_experts=3, num_experts_per_tok=1,
        decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def stock_format(model: Any) -> str:
    """The format in which stock PEFT reads adapters of this model's experts."""
    return "peft-per-expert" if isinstance(model.model.layers[0].mlp.experts, nn.ModuleList) else "peft"


def write_seeds(folder: Path) -> Any:
    """Write `base` (two shards and an index) and an adapter a name below `folder`. Returns the model."""
    model = base_model()
    model.save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    (folder / "base" / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "base" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "base" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "base" / "notes.txt").write_text("copied")
    for name, options in ADAPTERS.items():
        _write_adapter(model, folder / name, MoELoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    stock = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, use_rslora=True)
    _write_adapter(model, folder / "stock", stock)
    export_adapter(
        folder / "plain", folder / "stock experts", format=stock_format(model), base=folder / "base", progress=False
    )
    for name, source in SERVED.items():
        export_adapter(
            folder / source, folder / name, format=name.split()[0], base=folder / "base", progress=False
        )  # fmt: skip
    return model


def _write_adapter(base: Any, folder: Path, config: LoraConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(torch.rand_like(value) if "magnitude" in name else torch.randn_like(value))
    model.save_pretrained(folder)

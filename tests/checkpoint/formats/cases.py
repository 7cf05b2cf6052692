"""Tiny models that servers know, adapters on them as users save them, and what those adapters do in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_moe import MoELoraConfig
from tests.model.deltas import randomise
from tests.zoo import ENTRIES, first_floating
from tests.zoo.builder import SIZES, reinitialise
from tests.zoo.entry import token_ids
from tests.zoo.views import weight_views

from .served import ModelFacts, Served, model_facts

HIDDEN = 64


def _vision_language() -> nn.Module:
    """The whole Qwen3-VL-MoE, whose text model the zoo has: servers serve it under the names of the whole."""
    module = transformers.models.qwen3_vl_moe
    text = {key: value for key, value in SIZES.items() if key in module.Qwen3VLMoeTextConfig().to_dict()}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    name = "rope_parameters" if int(transformers.__version__.split(".")[0]) >= 5 else "rope_scaling"
    text[name] = rope | ({"rope_theta": 10000.0} if name == "rope_parameters" else {})
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = module.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = module.Qwen3VLMoeForConditionalGeneration(config)
    reinitialise(model)
    return model.float().eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    name: ENTRIES[name].build for name in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe")
} | {"qwen3_vl_moe": _vision_language}
MODELS = list(BUILDERS)

_MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
ATTENTION = {name: ["q_proj", "k_proj", "v_proj", "o_proj"] for name in MODELS} | {"deepseek_v3": _MLA}


def save_base(name: str, folder: Path) -> Path:
    """A folder with the config of a model: all that an export needs of it."""
    model = BUILDERS[name]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def facts_of(folder: Path) -> ModelFacts:
    return model_facts(json.loads((folder / "config.json").read_text()))


def save_adapter(name: str, folder: Path, base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """An adapter with random factors. Args: options: of `MoELoraConfig`."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION[name]} | options
    model = get_peft_model(BUILDERS[name](), MoELoraConfig(**({"init_lora_weights": False} | settings)))
    randomise(model, "default", scale=0.2)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.to(dtype)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return first_floating(model(input_ids=token_ids(), use_cache=False))


def _in_float64(name: str) -> nn.Module:
    """A base that runs in float64 throughout: with the plain loop over experts, and routers that return float64."""
    model = BUILDERS[name]().double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")

    def widen(_module: nn.Module, _args: Any, output: Any) -> Any:
        return tuple(one.double() if one.is_floating_point() else one for one in output)

    for path, module in model.named_modules():
        if path.endswith(".gate") and name in ("deepseek_v3", "glm4_moe") and int(transformers.__version__[0]) < 5:
            module.register_forward_hook(widen)
    return model


def native_logits(name: str, adapter: Path) -> Tensor:
    """Of the native adapter, all in float64, by its own forward."""
    base = _in_float64(name)
    model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.double()
    return logits(model)


@torch.no_grad()
def served_logits(name: str, served: Served) -> Tensor:
    """Of the base in float64 with what a server adds to its weights."""
    model = _in_float64(name)
    modules = dict(model.named_modules())
    for path, delta in served.linears.items():
        modules[path].weight += delta
    for path, module in modules.items():
        if path.endswith(".experts"):
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            views = weight_views(module, HIDDEN)
            for projection, change in served.experts.get(layer, {}).items():
                for expert, parts in enumerate(views[projection]):
                    rows = change[expert].split([part.shape[0] for part in parts])
                    for part, rows_of in zip(parts, rows, strict=True):
                        part += rows_of
    return logits(model)

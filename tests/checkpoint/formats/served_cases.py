"""Tiny models that servers know, adapters on them as users save them, and what those adapters do in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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

_MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
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


# --- what an adapter is, said twice: as options of a config, and as the numbers that follow from them ----------------


@dataclass(frozen=True)
class Variant:
    """An adapter of experts.

    options: of its config. scaling: of each adapted expert, or of all. experts: the adapted ones, of every layer or by
    layer; `None`: all four. ranks: of the adapted experts where they differ. linears: scaling by name, else 2.
    """

    options: dict[str, Any] = field(default_factory=dict)
    scaling: float | Sequence[float] = 2.0
    experts: Sequence[int] | dict[int, Sequence[int]] | None = None
    ranks: Sequence[int] | None = None
    linears: float = 2.0


VARIANTS = {
    "plain": Variant(),
    "some_experts": Variant(
        {"expert_r": 3, "expert_indices": {1: [1, 2]}, "lora_alpha": 5}, 5 / 3, {1: [1, 2]}, linears=5 / 4
    ),
    "listed": Variant({"expert_indices": [0, 3], "expert_alpha": 16}, 4.0, [0, 3]),
    "down": Variant({"target_experts": ["down_proj"], "expert_alpha": 3}, 0.75),
    "gate_up": Variant({"target_experts": ["gate_up_proj"]}),
    "split": Variant({"split_gate_up": True}),
    "split_ragged": Variant(
        {"split_gate_up": True, "expert_r": 2, "expert_rank_pattern": {r".*\.1": 1}}, [4.0, 8.0, 4.0, 4.0],
        ranks=[2, 1, 2, 2],
    ),
    "ragged": Variant(
        {"expert_rank_pattern": {r".*\.0": 9, r".*\.2": 1}, "expert_alpha_pattern": {r".*\.0": 18, r".*\.2": 2}},
        ranks=[9, 4, 1, 4],
    ),
    "alphas": Variant({"expert_alpha_pattern": {r".*\.2": 3}}, [2.0, 2.0, 0.75, 2.0]),
    "outer": Variant({"share_experts": "outer"}),
    "rslora": Variant({"use_rslora": True}, 4.0, linears=4.0),
    "no_linears": Variant({"target_modules": []}),
}  # fmt: skip


def expert_deltas(folder: Path, variant: Variant, facts: ModelFacts) -> dict[int, dict[str, Tensor]]:
    """layer -> projection -> `(E, out, in)` float64 of a native adapter, from its tensors and the variant's numbers."""
    found: dict[int, dict[str, Tensor]] = {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        match = re.search(r"layers\.(\d+)\..*experts\.(\w+)\.lora_A$", key)
        if match is None:
            continue
        b = tensors[key.replace("lora_A", "lora_B")]
        layer, slot = int(match[1]), match[2]
        chosen = variant.experts.get(layer, []) if isinstance(variant.experts, dict) else variant.experts
        chosen = list(range(facts.experts) if chosen is None else chosen)
        if variant.ranks is None:
            products = b.double() @ a.double()
        else:
            pairs = zip(a.double().split(list(variant.ranks)), b.double().split(list(variant.ranks)), strict=True)
            products = torch.stack([rows.T @ block for block, rows in pairs])
        scales = torch.as_tensor(variant.scaling, dtype=torch.float64).expand(len(chosen))[:, None, None]
        whole = torch.zeros(facts.experts, *products.shape[1:], dtype=torch.float64)
        whole[chosen] = scales * products
        found.setdefault(layer, {})[slot] = whole
    for slots in found.values():
        if "gate_proj" in slots:
            pair = [slots.pop("gate_proj"), slots.pop("up_proj")]
            slots["gate_up_proj"] = torch.stack(pair, 2).flatten(1, 2) if facts.interleaved else torch.cat(pair, 1)
    return found


def linear_deltas(folder: Path, scaling: float) -> dict[str, Tensor]:
    """Path -> `(out, in)` float64 of the linears of a native adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def difference(served: Served, experts: dict[int, dict[str, Tensor]], linears: dict[str, Tensor]) -> float:
    """The largest difference of what a server adds from what it should, relative to the largest value."""
    zero = torch.zeros(1)
    pairs = [
        (served.experts.get(layer, {}).get(projection, zero), experts.get(layer, {}).get(projection, zero))
        for layer in served.experts.keys() | experts.keys()
        for projection in ("gate_up_proj", "down_proj")
    ] + [(served.linears.get(path, zero), linears.get(path, zero)) for path in served.linears.keys() | linears.keys()]
    largest = [float(torch.maximum(one.abs().max(), other.abs().max())) for one, other in pairs]
    return max(
        float((one - other).abs().max()) / size for (one, other), size in zip(pairs, largest, strict=True) if size
    )


def same_files(one: Path, other: Path) -> bool:
    """Whether two native adapters have the same tensors bit for bit, and configs that mean the same."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    if first.keys() != second.keys():
        return False
    if not all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first):
        return False
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
    return all(configs[0].get(key) == configs[1].get(key) for key in SETTINGS)


SETTINGS = [
    "r", "lora_alpha", "expert_r", "expert_alpha", "expert_rank_pattern", "expert_alpha_pattern", "expert_indices",
    "target_experts", "split_gate_up", "share_experts", "use_rslora", "rank_pattern", "alpha_pattern", "task_type",
    "base_model_name_or_path",
]  # fmt: skip


# --- adapters that other tools wrote, and files that were changed ---------------------------------------------------

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an adapter."""
    return load_file(folder / FILE), json.loads((folder / CONFIG).read_text())


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """An adapter without a note of ours in it."""
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILE)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    """Exchange the tensors of two names."""
    for key in [key for key in tensors if one in key]:
        twin = key.replace(one, other)
        tensors[key], tensors[twin] = tensors[twin], tensors[key]


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    """Args: old: a regex."""
    for key in list(tensors):
        tensors[re.sub(old, new, key)] = tensors.pop(key)


def drop(tensors: dict[str, Tensor], part: str) -> None:
    """Take out all tensors with this in their name."""
    for key in [key for key in tensors if part in key]:
        del tensors[key]

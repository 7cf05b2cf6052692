"""The part of a model card that says how to load an adapter."""

from __future__ import annotations

import os
from typing import Any

HEADING = "## How to load this adapter"


def add_loading_section(directory: str, config: Any) -> None:
    """Append the section to `README.md` of a saved adapter (made if absent) unless it is there already.

    Args: config: the adapter's `MoELoraConfig`.
    """
    path = os.path.join(directory, "README.md")
    text = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    if HEADING in text:
        return
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{text.rstrip()}\n\n{_section(config)}".lstrip("\n"))
    os.replace(temporary, path)


def _section(config: Any) -> str:
    base = config.base_model_name_or_path or "<base model>"
    lines = [
        HEADING,
        "",
        "Its type, `MOELORA`, is registered by the package `peft-moe`: import it first, or PEFT stops with",
        "`KeyError: 'MOELORA'`.",
        "",
        "```python",
        "import peft_moe  # pip install peft-moe",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        "```",
        "",
        f"- base model: `{base}`",
        f"- rank and alpha of the experts: {config.expert_r or config.r}, {_alpha(config)}"
        + (", with exceptions by pattern" if config.expert_rank_pattern or config.expert_alpha_pattern else ""),
        f"- rank and alpha of the linears: {config.r}, {config.lora_alpha}",
        f"- expert projections: {', '.join(config.expert_targets) or 'none'}",
        f"- experts: {_experts(config)}",
        f"- tensors: `{config.layout}`, format {config.format_version}",
        "",
    ]
    return "\n".join(lines)


def _alpha(config: Any) -> float:
    return config.lora_alpha if config.expert_alpha is None else config.expert_alpha


def _experts(config: Any) -> str:
    if config.expert_indices is None:
        return "all"
    if isinstance(config.expert_indices, dict):
        return "; ".join(f"layer {layer}: {indices}" for layer, indices in sorted(config.expert_indices.items()))
    return f"{config.expert_indices} of every layer"

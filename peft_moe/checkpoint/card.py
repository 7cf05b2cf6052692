"""Model cards: the part that says how to load an adapter, and the whole card of a converted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .durable import write_file

HEADING = "## How to load this adapter"


def add_loading_section(directory: str, config: Any) -> None:
    """Append the section to `README.md` of a saved adapter (made if absent) unless it is there already.

    Args: config: the adapter's `MoELoraConfig`.
    """
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if HEADING not in text:
        write_file(path, f"{text.rstrip()}\n\n{_section(config)}".lstrip("\n").encode())


def exported_card(config: Any, name: str, consumer: str, converted: Any) -> str:
    """The card of an adapter in the format of another tool.

    Args: config: of the native adapter. name: of the format. consumer: who reads it. converted: with its `usage`, lines
        of Markdown, and `facts`.
    """
    lines = [*_head(config), HEADING, "", f"It is in the format of {consumer} (`{name}`).", "", *converted.usage, ""]
    lines += [*_facts(config), *(f"- {fact}" for fact in converted.facts)]
    lines += ["- converted by `peft-moe`, whose `import_adapter` makes it native again", ""]
    return "\n".join(lines)


def imported_card(config: Any, name: str, converted: Any) -> str:
    """The card of a native adapter that was converted from a format."""
    facts = [f"- {fact}" for fact in (f"converted from the format `{name}`", *converted.facts)]
    return "\n".join([*_head(config), _section(config).rstrip(), *facts, ""])


def _head(config: Any) -> list[str]:
    """What the hub reads of a card, and a title."""
    base = config.base_model_name_or_path
    named = [f"base_model: {json.dumps(base)}"] if base else []
    tags = ["tags:", f"- {json.dumps('base_model:adapter:' + base)}", "- lora"] if base else ["tags:", "- lora"]
    return ["---", *named, "library_name: peft", *tags, "---", "", "# Adapter of experts", ""]


def _section(config: Any) -> str:
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
        load_base(config),
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        "```",
        "",
        *_facts(config),
        f"- tensors: `{config.layout}`, format {config.format_version}",
        "",
    ]
    return "\n".join(lines)


def load_base(config: Any) -> str:
    """The line of Python that loads the base."""
    return f"base = AutoModelForCausalLM.from_pretrained({json.dumps(_base_name(config), ensure_ascii=False)})"


def _base_name(config: Any) -> str:
    """The base as an adapter names it, which may come from a stranger: it stands in Markdown and in code to copy."""
    name = config.base_model_name_or_path or "<base model>"
    return "".join(one if one.isprintable() and one != "`" else "_" for one in name)


def _facts(config: Any) -> list[str]:
    return [
        f"- base model: `{_base_name(config)}`",
        f"- rank and alpha of the experts: {config.expert_r or config.r}, {_alpha(config)}"
        + (", with exceptions by pattern" if config.expert_rank_pattern or config.expert_alpha_pattern else ""),
        f"- rank and alpha of the linears: {config.r}, {config.lora_alpha}",
        f"- expert projections: {', '.join(config.expert_targets) or 'none'}",
        f"- experts: {_experts(config)}",
    ]


def _alpha(config: Any) -> float:
    return config.lora_alpha if config.expert_alpha is None else config.expert_alpha


def _experts(config: Any) -> str:
    if config.expert_indices is None:
        return "all"
    if isinstance(config.expert_indices, dict):
        return "; ".join(f"layer {layer}: {indices}" for layer, indices in sorted(config.expert_indices.items()))
    return f"{config.expert_indices} of every layer"

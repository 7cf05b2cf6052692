"""Every Python snippet of the README and the user's pages runs, in the order of its page, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_moe import MoELoraConfig

ROOT = Path(__file__).parents[2]
NAMES = ("quickstart", "configuration", "training", "merging-and-saving", "merging-on-disk", "grouped")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
MODEL_OF_THE_PAGES = "Qwen/Qwen3-30B-A3B"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved base in an empty working directory, which stands in for the model that the pages name."""
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    base.save_pretrained(tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
        return read(str(tmp_path / "base") if name == MODEL_OF_THE_PAGES else name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    Path(MODEL_OF_THE_PAGES).parent.mkdir()
    Path(MODEL_OF_THE_PAGES).symlink_to(tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, folder: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert snippets, f"{page} has no Python snippet"
    base = AutoModelForCausalLM.from_pretrained(MODEL_OF_THE_PAGES)
    rows = torch.randint(64, (8, 12))
    names: dict[str, Any] = {"base": base, "dataset": [{"input_ids": row, "labels": row} for row in rows]}
    if "merging" in page:  # it begins where training ended
        names["model"] = get_peft_model(base, MoELoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
        names["model"].save_pretrained("adapter")
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)

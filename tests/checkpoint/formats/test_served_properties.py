"""Any adapter that a config can ask for: served as it was trained, and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_moe import export_adapter, import_adapter

from . import sglang_server, vllm_server
from .served_cases import (
    Variant,
    difference,
    expert_deltas,
    facts_of,
    linear_deltas,
    same_files,
    save_adapter,
    save_base,
)

TARGETS = {
    "vllm": [{}],
    "sglang": [{"layout": "per-expert"}, {"layout": "stacked"}],
}


@st.composite
def variants(draw: st.DrawFn) -> tuple[Variant, torch.dtype]:
    """Ranks, alphas, targets, experts: what may be combined, with the scalings that follow."""
    r, alpha = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 8]))
    options: dict[str, Any] = {"r": r, "lora_alpha": alpha, "use_rslora": draw(st.booleans())}
    options["split_gate_up"] = draw(st.booleans())
    options["target_experts"] = draw(st.sampled_from(["all", ["gate_up_proj"], ["down_proj"]]))
    experts = draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted))
    chosen = list(range(4)) if experts is None else experts
    options["expert_indices"] = experts
    ranks = {expert: draw(st.integers(1, 9)) for expert in chosen} if draw(st.booleans()) else {}
    alphas = {expert: draw(st.sampled_from([1, 2, 5])) for expert in chosen} if draw(st.booleans()) else {}
    options["expert_rank_pattern"] = {rf".*\.{expert}": rank for expert, rank in ranks.items()}
    options["expert_alpha_pattern"] = {rf".*\.{expert}": value for expert, value in alphas.items()}
    root = 0.5 if options["use_rslora"] else 1.0
    all_ranks = [ranks.get(expert, r) for expert in chosen]
    scaling = [alphas.get(expert, alpha) / rank**root for expert, rank in zip(chosen, all_ranks, strict=True)]
    ragged = all_ranks if len(set(all_ranks)) > 1 else None
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Variant(options, scaling, experts, ragged, alpha / r**root), dtype


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=variants())
def test_any_adapter(name, drawn):
    variant, dtype = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        base = save_base(name, path / "base")
        adapter = save_adapter(name, path / "adapter", base, dtype, **variant.options)
        facts = facts_of(base)
        expected = expert_deltas(adapter, variant, facts), linear_deltas(adapter, variant.linears)
        for kind, given_options in TARGETS.items():
            for number, options in enumerate(given_options):
                target = path / f"{kind}{number}"
                export_adapter(adapter, target, kind, progress=False, **options)
                server = vllm_server if kind == "vllm" else sglang_server
                assert difference(server.serve(target, facts), *expected) < 1e-6
                again = import_adapter(target, path / f"{kind}{number}-back", progress=False)
                assert same_files(adapter, again)

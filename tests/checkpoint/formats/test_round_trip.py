"""Any native adapter: what an export holds is the same function, and it comes back bit for bit."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from torch import Tensor

from peft_moe import export_adapter, import_adapter
from tests.checkpoint.formats.cases import NAME, V5, without_note
from tests.checkpoint.formats.random_adapters import Adapter, adapters, config_of, deltas, write, write_base

STACKS = ["qwen3_moe", "gpt_oss", "llama4_text"] if V5 else ["gpt_oss", "llama4_text"]
#: Whether A lies on the output in what the installed PEFT and transformers write.
SWAPPED = {"qwen3_moe": False, "gpt_oss": not V5, "llama4_text": True}
examples = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def there_and_back(one: Adapter, format: str, folder: Path, **options: Any) -> Path:
    """Export and import again; the result has the same tensors and the same config. Returns the export."""
    write_base(one, folder / "base")
    write(one, folder / "native")
    base = {"base": folder / "base", "progress": False}
    out = export_adapter(folder / "native", folder / "out", format, **base, **options)
    back = import_adapter(out, folder / "back", **base)
    assert (folder / "native" / NAME).read_bytes() == (back / NAME).read_bytes()
    assert config_of(folder / "native") == config_of(back)
    return out


def value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """What PEFT takes for a name: the first pattern that matches its end."""
    return next((one for key, one in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def stock_deltas(one: Adapter, out: Path, contiguous_r: bool = False) -> dict[tuple[int, str], Tensor]:
    """What stock PEFT adds to each expert, by index: `(E, out, in)` fp64."""
    tensors, config = load_file(out / NAME), config_of(out)
    targets = [end for end in ("gate_up_proj", "down_proj") if end in one.options["target_experts"]]
    found, used = {}, 0
    for layer in one.chosen:
        for depth, target in enumerate(reversed(targets)):
            name = f"{one.module(layer)}.{target}"
            assert any(name == end or name.endswith(f".{end}") for end in config["target_parameters"])
            key = f"base_model.model.{one.module(layer)}{'.base_layer' * depth}"
            a, b = (tensors[f"{key}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
            used += 2
            rank = value(config["rank_pattern"], name, config["r"])
            alpha = value(config["alpha_pattern"], name, config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            assert a.shape[0] == b.shape[1] == one.experts * rank
            experts = []
            for expert in range(one.experts):
                rows = a[expert * rank : (expert + 1) * rank]
                start = expert * rank
                columns = b[:, start : start + rank] if contiguous_r else b[:, expert :: one.experts]
                delta = scaling * columns @ rows
                experts.append(delta.T if SWAPPED[one.base] else delta)
            found[layer, target] = torch.stack(experts)
    assert used == len(tensors)
    return found


def assert_same(found: dict[tuple[int, str], Tensor], wanted: dict[tuple[int, str], Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for where, delta in wanted.items():
        torch.testing.assert_close(found[where], delta, rtol=1e-6, atol=1e-6 * float(delta.abs().max() + 1e-9))


@given(adapters(STACKS))
@examples
def test_stock(one: Adapter) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = there_and_back(one, "peft", folder)
        if one.any_bits:
            return
        wanted = deltas(one, load_file(folder / "native" / NAME))
        assert_same(stock_deltas(one, out), wanted)
        # Without the note of what it was: another native adapter, of the same function, and that one comes back too.
        without_note(out)
        options: dict[str, Any] = {"base": folder / "base", "progress": False}
        role = "lora_A_on_output" if SWAPPED[one.base] else "lora_A_on_input"
        plain = import_adapter(out, folder / "plain", assume_layout=role, **options)
        again = export_adapter(plain, folder / "again", "peft", **options)
        assert_same(stock_deltas(one, again), wanted)


@given(adapters(STACKS))
@examples
def test_unsloth(one: Adapter) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = there_and_back(one, "unsloth", Path(temporary), layout="contiguous_r")
        if not one.any_bits:
            native = load_file(Path(temporary) / "native" / NAME)
            assert_same(stock_deltas(one, out, contiguous_r=True), deltas(one, native))


if not V5:

    @given(adapters(["qwen3_moe"]))
    @examples
    def test_per_expert(one: Adapter) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            out = there_and_back(one, "peft-per-expert", folder)
            if one.any_bits:
                return
            wanted = deltas(one, load_file(folder / "native" / NAME))
            assert_same(linear_deltas(one, out), wanted)
            without_note(out)
            options: dict[str, Any] = {"base": folder / "base", "progress": False}
            plain = import_adapter(out, folder / "plain", **options)
            again = export_adapter(plain, folder / "again", "peft-per-expert", **options)
            first, second = load_file(out / NAME), load_file(again / NAME)  # imported exactly
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


def linear_deltas(one: Adapter, out: Path) -> dict[tuple[int, str], Tensor]:
    """What stock PEFT adds to the linears of each expert, gate above up: `(E, out, in)` fp64."""
    tensors, config = load_file(out / NAME), config_of(out)
    sizes = {
        "gate_proj": (one.inner, one.hidden),
        "up_proj": (one.inner, one.hidden),
        "down_proj": (one.hidden, one.inner),
    }
    found = {}
    for layer in one.chosen:
        for target in one.options["target_experts"]:
            parts = []
            for linear in ("gate_proj", "up_proj") if target == "gate_up_proj" else ("down_proj",):
                delta = torch.zeros(one.experts, *sizes[linear], dtype=torch.float64)
                for expert in one.chosen[layer]:
                    name = f"{one.module(layer)}.{expert}.{linear}"
                    assert name in config["target_modules"]
                    a, b = (
                        tensors[f"base_model.model.{name}.{factor}.weight"].double() for factor in ("lora_A", "lora_B")
                    )
                    rank = value(config["rank_pattern"], name, config["r"])
                    alpha = value(config["alpha_pattern"], name, config["lora_alpha"])
                    assert a.shape[0] == rank
                    delta[expert] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
                parts.append(delta)
            found[layer, target] = torch.cat(parts, dim=1)
    return found

"""Batches that mix adapters: each sample as if it were alone with its adapter, in forward and in generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.model.deltas import logits, randomise
from tests.model.tiny import BUILDERS, CLOSE, config, experts_of
from tests.reference import relative
from tests.zoo import ENTRIES
from tests.zoo.builder import build_model

LISTED = ("mixtral", "deepseek_v3")  # on transformers 4: known blocks around a list of experts
NAMES = ["llama4_text", "dbrx", "qwen3_moe", "gpt_oss", "remote_list", *LISTED]
BATCH = ["x", "__base__", "y", "x", "y"]


GENERATING = [name for name in NAMES if name != "remote_list"]


def build(name: str) -> nn.Module:
    if name == "dbrx":  # with its head, which the zoo leaves out on transformers 5
        return build_model("dbrx", "DbrxForCausalLM", ENTRIES[name].build.args[2])
    return BUILDERS[name]() if name in BUILDERS else ENTRIES[name].build()


def mixed(base: nn.Module, scale: float = 0.3) -> PeftModel:
    """A model with two adapters that differ in rank, projections, experts and scaling; `x` is active."""
    linears = [key.rpartition(".")[2] for key, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = [one for one in ("q_proj", "o_proj", "Wqkv") if one in linears]
    model = get_peft_model(base, config(target_modules=targets), adapter_name="x")
    second = {"target_experts": ["down_proj"], "expert_indices": [0, 2]}
    model.add_adapter("y", config(r=5, lora_alpha=3, target_modules=targets[:1], **second))
    for seed, adapter in enumerate("xy"):
        randomise(model, adapter, seed, scale)
    return model.eval()


def prompts(same: bool = False) -> Tensor:
    """Token ids (5, 6); the same for all samples if asked."""
    ids = torch.randint(3, 64, (len(BATCH), 6), generator=torch.Generator().manual_seed(4))
    return ids[:1].expand(len(BATCH), -1).contiguous() if same else ids


def alone(model: PeftModel, adapter: str) -> Any:
    """A context in which only one adapter runs, or none."""
    if adapter == "__base__":
        return model.disable_adapter()
    model.set_adapter(adapter)
    return torch.no_grad()


@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str) -> None:
    model = mixed(build(name))
    ids = prompts()
    expected = []
    for sample, adapter in enumerate(BATCH):
        with alone(model, adapter):
            expected.append(logits(model, {"input_ids": ids[sample : sample + 1]})[0])
    for active in ("x", "y"):  # which adapter is active does not matter
        model.set_adapter(active)
        found = logits(model, {"input_ids": ids}, adapter_names=BATCH)
        for sample, adapter in enumerate(BATCH):
            assert relative(found[sample], expected[sample]) < CLOSE, f"sample {sample}, {adapter}"
    with alone(model, "__base__"):
        plain = logits(model, {"input_ids": ids})
    assert relative(found[0], plain[0]) > 1e-2 and relative(found[2], plain[2]) > 1e-2
    model.set_adapter("x")
    after = logits(model, {"input_ids": ids})  # nothing of the mixed batch is left behind
    assert relative(after[0], expected[0]) < CLOSE and relative(after[2], expected[2]) > 1e-2


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, num_beams: int) -> None:
    model = mixed(build(name))
    ids = prompts(same=True)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    expected = []
    for sample, adapter in enumerate(BATCH):
        one = {"input_ids": ids[sample : sample + 1], "attention_mask": torch.ones_like(ids[:1])}
        with alone(model, adapter):
            expected.append(model.generate(**one, **options)[0])
    assert len({tuple(sequence.tolist()) for sequence in expected[:3]}) == 3, "the adapters say the same"
    model.set_adapter("x")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = model.generate(**batch, **options, adapter_names=BATCH)
    assert torch.equal(found, torch.stack(expected))


def test_dora_and_dropout() -> None:  # on experts alone: PEFT refuses DoRA on linears in a mixed batch
    model = get_peft_model(
        BUILDERS["qwen3_moe"](), config(use_dora=True, lora_dropout=0.5, expert_indices=[0, 3]), adapter_name="x"
    ).eval()
    model.add_adapter("y", config(r=5))
    ids = prompts()
    found = logits(model, {"input_ids": ids}, adapter_names=BATCH)
    for sample, adapter in enumerate(BATCH):
        with alone(model, adapter):
            assert relative(found[sample], logits(model, {"input_ids": ids[sample : sample + 1]})[0]) < CLOSE


def test_refused() -> None:
    model = mixed(BUILDERS["qwen3_moe"]())
    batch = {"input_ids": prompts()}
    before = logits(model, batch)
    with pytest.raises(ValueError, match="non-existing adapter.*unheard-of"):
        model(**batch, adapter_names=["x", "unheard-of", "x", "y", "x"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**batch, adapter_names=BATCH)
    model.eval()
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("names", [["x"], ["x", "y", "x", "y"], BATCH * 2], ids=len)
@pytest.mark.parametrize("targets", [[], ["q_proj"]], ids=["experts alone", "with attention"])
def test_a_name_for_each_sample(names: list[str], targets: list[str]) -> None:
    model = get_peft_model(BUILDERS["qwen3_moe"](), config(target_modules=targets), adapter_name="x").eval()
    model.add_adapter("y", config(target_modules=targets))
    before = logits(model, {"input_ids": prompts()})
    with pytest.raises(ValueError, match=f"{len(names)} .*5|5.*{len(names)}"):
        model(input_ids=prompts(), adapter_names=names)
    with pytest.raises(ValueError, match=f"{len(names)} .*5|5.*{len(names)}"):
        model.generate(input_ids=prompts(), adapter_names=names, max_new_tokens=1)
    assert torch.equal(logits(model, {"input_ids": prompts()}), before)


@pytest.mark.parametrize("targets", [[], ["q_proj"]], ids=["experts alone", "with attention"])
def test_merged_adapters_are_refused(targets: list[str]) -> None:
    model = get_peft_model(BUILDERS["qwen3_moe"](), config(target_modules=targets), adapter_name="x").eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters.*unmerge"):
        model(input_ids=prompts(), adapter_names=["x"] * 5)
    model.unmerge_adapter()
    assert (
        relative(
            logits(model, {"input_ids": prompts()}, adapter_names=["x"] * 5), logits(model, {"input_ids": prompts()})
        )
        < CLOSE
    )


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe", "jetmoe"])
def test_blocks_that_cannot_mix_say_so_by_name(name: str) -> None:
    entry = ENTRIES[name]
    base = entry.build()
    inputs = entry.inputs(base)
    targets = {"switch_transformers": ["q"], "nllb-moe": ["q_proj"], "jetmoe": ["kv_proj"]}[name]
    model = get_peft_model(base, config(target_modules=targets), adapter_name="x").eval()
    model.add_adapter("linears", config(target_modules=targets, target_experts=[]))
    randomise(model, "linears", 1)
    before = logits(model, inputs)
    with pytest.raises(ValueError, match="adapter_names") as error:
        model(**inputs, adapter_names=["x", "__base__"])
    assert str(error.value).split(":")[0] in {layer.name for layer in experts_of(model)}
    assert torch.equal(logits(model, inputs), before), "the refused call left something behind"
    # Samples that need no expert adapter can mix.
    found = logits(model, inputs, adapter_names=["linears", "__base__"])
    model.set_adapter("linears")
    assert relative(found[0], logits(model, inputs)[0]) < CLOSE
    with model.disable_adapter():
        assert relative(found[1], logits(model, inputs)[1]) < CLOSE

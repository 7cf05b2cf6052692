"""The Trainer of transformers and TRL's SFTTrainer: the loss falls, only adapters change, training can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.model.deltas import logits
from tests.model.tiny import BUILDERS, config, text
from tests.reference import relative
from tests.training.data import SENTENCES, Sentences, tokenizer

NAMES = ["qwen3_moe", "gpt_oss"]


def arguments(path: Path, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(values | options))


def adapted(name: str = "qwen3_moe", **options: Any) -> PeftModel:
    torch.manual_seed(1)
    values: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    return get_peft_model(BUILDERS[name](), config(**(values | options)))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "lora_" in key}


@pytest.mark.parametrize("name", NAMES)
def test_trainer(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=16), train_dataset=Sentences())
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.8 * found[0], found
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed and all("lora_" in key for key in changed)
    assert {key for key in before if "lora_B" in key} <= changed
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(BUILDERS[name](), tmp_path / "adapter")
    inputs = text(reloaded.get_base_model())
    assert relative(logits(reloaded.eval(), inputs), logits(model.eval(), inputs)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2},
        {"expert_indices": [0, 2, 3], "expert_rank_pattern": {r".*\.2": 1}},
        {"modules_to_save": ["gate"], "use_dora": True},
    ],
    ids=str,
)
def test_resume(options: dict[str, Any], tmp_path: Path) -> None:
    whole = adapted(**options)
    saving = {"save_strategy": "steps", "save_steps": 4}
    Trainer(model=whole, args=arguments(tmp_path / "whole", **saving), train_dataset=Sentences()).train()
    resumed = adapted(**options)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    start = weights(resumed)
    trainer = Trainer(model=resumed, args=arguments(tmp_path / "rest", **saving), train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 8 and len(losses(trainer)) == 8, "it did not start from the checkpoint"
    expected = {key: value for key, value in whole.state_dict().items()}
    for key, value in resumed.state_dict().items():
        assert relative(value, expected[key]) < 1e-6 or torch.equal(value, expected[key]), key
    assert any(not torch.equal(start[key], value) for key, value in weights(resumed).items())


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted()
    args = arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer = Trainer(model=model, args=args, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = PeftModel.from_pretrained(BUILDERS["qwen3_moe"](), trainer.state.best_model_checkpoint)
    assert all(torch.equal(value, weights(best)[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_on_a_model_that_took_the_adapter_itself(name: str, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    torch.manual_seed(1)
    model.add_adapter(config(init_lora_weights=True), adapter_name="x")
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=Sentences())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(weights(model))


@pytest.mark.parametrize("name", NAMES)
def test_sft_trainer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    base = BUILDERS[name]().requires_grad_(True)
    before = copy.deepcopy(base.state_dict())
    values = arguments(tmp_path, max_steps=16).to_dict()
    keys = ["output_dir", "per_device_train_batch_size", "learning_rate", "max_steps", "logging_steps", "seed"]
    args = SFTConfig(
        **{key: values[key] for key in keys},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=16,
        gradient_checkpointing=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    torch.manual_seed(1)
    trainer = SFTTrainer(
        model=base,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer(),
        peft_config=MoELoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    layers = [module for module in trainer.model.modules() if isinstance(module, MoELoraLayer)]
    assert len(layers) == 2
    trainable = {key for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in key for key in trainable), "the base, its router too, stays frozen"
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.8 * found[0], found
    trained = weights(trainer.model)
    assert all(value.abs().sum() > 0 for key, value in trained.items() if "lora_B" in key)
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())

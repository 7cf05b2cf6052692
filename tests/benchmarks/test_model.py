"""model.py, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.benchmarks.scripts import BENCHMARKS, STACKED, refused, script


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return script("model")


@pytest.mark.skipif(not STACKED, reason="stacked experts: transformers 5")
def test_a_peer_takes_every_layer_of_a_model(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    taken: list[set[str]] = []
    monkeypatch.setattr(model, "build", lambda layers: AutoModelForCausalLM.from_config(config))
    monkeypatch.setattr(model.torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setitem(
        model.peers.PEERS, "one", ("peft", lambda block: taken.append(set(model.peers.wrappers(block))))
    )
    model.contender("one", "bf16", 3, 4, False)
    assert taken == 3 * [{"gate_up_proj", "down_proj"}]


def test_model_refuses_before_it_needs_a_gpu(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(model.main, ["--contenders", "peft-moe@int8"], capsys)
    assert "invalid choice: 'peft-moe@int8'" in said and "grouped" in said.partition("choose from")[2]
    assert "peft runs on bf16 alone" in refused(model.main, ["--contenders", "peft"], capsys)
    assert "loop runs on nf4 alone" in refused(model.main, ["--base", "bf16", "--contenders", "loop"], capsys)
    assert "at least 1, not '0'" in refused(model.main, ["--layers", "0"], capsys)
    said = refused(model.main, [], capsys)
    assert "needs a CUDA device" in said and "80 GiB for 48 layers" in said and "fewer --layers need less" in said


def test_model_goes_on_and_writes_what_it_did(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and a clock in the place of a GPU's."""

    class Model(torch.nn.Module):
        def gradient_checkpointing_enable(self, how: dict[str, bool]) -> None:
            self.how = how

    def contender(name: str, *args: object) -> tuple[Model, int]:
        if name == "attention":
            raise ImportError("no such package")
        return Model(), 7

    def measure(found: Model, tokens: int, seconds: float, resident: int) -> dict[str, float]:
        assert found.training and found.how == {"use_reentrant": False} and resident == 7
        if tokens == 64:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return {"tokens_per_s": tokens + 0.12345}

    for name, value in {"is_available": True, "get_device_name": "a GPU", "empty_cache": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name, function in {"contender": contender, "measure": measure, "experts_hit": lambda *args: [3, 5]}.items():
        monkeypatch.setattr(model, name, function)
    out = tmp_path / "new" / "model.json"
    model.main(["--contenders", "attention", "peft-moe", "--tokens", "64", "32", "--out", str(out)])
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "3 to 5 of 128" in printed and printed.count(" not timed: ") == 2
    assert found["machine"] == "a GPU" and found["settings"]["layers"] == 48
    row = {"contender": "peft-moe", "base": "nf4", "tokens": 32}
    assert found["rows"] == [{**row, "tokens_per_s": 32.123}]
    assert found["not_timed"] == [
        {"contender": "attention", "base": "nf4", "not_timed": "no such package"},
        {**row, "tokens": 64, "not_timed": "out of memory"},
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_the_loop(dtype: torch.dtype, model: ModuleType) -> None:
    """In the dtype asked for, and what the expert computes is what its dequantized weights and factors say."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(2, 96, 64) * 0.1)
    experts.down_proj = torch.nn.Parameter(torch.randn(2, 64, 48) * 0.1)
    loop = model.LoopExperts(experts, 4, dtype)
    factors = [factor for expert in loop.experts for factor in (*expert.a, *expert.b)]
    assert len(factors) == 12 and {factor.dtype for factor in factors} == {dtype}
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.1)
    x = torch.randn(5, 64).bfloat16()
    index, weights = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.rand(5, 2).bfloat16()
    found, expected = loop(x, index, weights).double(), torch.zeros(5, 64, dtype=torch.float64)
    for number, expert in enumerate(loop.experts):
        stored = [bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
                  for linear in expert.linears]  # fmt: skip
        gate, up, down = (
            weight + 2 * b.double() @ a.double() for weight, a, b in zip(stored, expert.a, expert.b, strict=True)
        )
        rows = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        expected += rows * torch.where(index == number, weights.double(), 0.0).sum(1)[:, None]
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 0.03

"""The quickstart, run in this process: what it measures, what it writes, and what it says when the input is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"
SENTENCES = [
    "the red cat sat on the mat",
    "a red dog ran to the cat",
    "the dog sat on a mat",
    "a cat ran to the red mat",
]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A saved Mixtral of a few thousand parameters, with a tokenizer of a dozen words."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    folder = tmp_path / "own"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "data.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return path

    return write


def assert_equal_everywhere(results: dict[str, Any]) -> None:
    differences = results["largest_logit_difference"]
    assert set(differences) == {"reloaded", "merged", "merged, saved, reloaded"}
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.timeout(180)
def test_the_demo_learns_and_its_files_agree(quickstart: ModuleType, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    arguments = ["--steps", "15", "--base-steps", "15", "--batch-size", "8", "--out", str(out)]
    results = quickstart.main(arguments)

    assert results["held_out_loss_after"] < results["held_out_loss_before"] - 0.1
    assert 0 < results["trainable_parameters"] < 0.15 * results["total_parameters"]
    assert results["curve"][0] == (0, results["held_out_loss_before"])
    assert results["curve"][-1] == (15, results["held_out_loss_after"])
    assert_equal_everywhere(results)

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "MOELORA"
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert written["held_out_loss_after"] == results["held_out_loss_after"]

    # Read with PEFT and transformers alone: the adapter on the base is the merged model, and neither is the base.
    ids = torch.arange(64).view(1, -1)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(out / "base").eval()
        untouched = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (merged - untouched).abs().max() > 1e-2

    printed = capsys.readouterr().out
    for line in ("trainable parameters:", "held-out loss:", "sample before", "sample after", "merged, saved, reloaded"):
        assert line in printed


def test_own_model_and_data(quickstart: ModuleType, own_model: Path, tmp_path: Path, write_jsonl: Any) -> None:
    data = write_jsonl(*({"text": SENTENCES[i % len(SENTENCES)], "id": i} for i in range(40)))
    out = tmp_path / "out"
    command = ["--model", str(own_model), "--data", str(data), "--out", str(out)]
    results = quickstart.main([*command, "--steps", "20", "--block-size", "16", "--batch-size", "4", "--lr", "2e-2"])

    assert results["held_out_loss_after"] < results["held_out_loss_before"]
    assert_equal_everywhere(results)
    assert not (out / "base").exists()
    vocabulary = AutoTokenizer.from_pretrained(own_model).get_vocab()
    assert set(results["sample_after"].split()) <= set(vocabulary)


def test_byte_tokenizer_survives_saving(quickstart: ModuleType, tmp_path: Path) -> None:
    text = "def größe(x):\n\treturn 'día' + \"✓\"  # \x00\n"
    tokenizer = quickstart.byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 257 and len(ids) == len(text.encode())
    tokenizer.save_pretrained(tmp_path)
    quickstart.new_model(tokenizer, 128).config.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text, add_special_tokens=False)["input_ids"] == ids
    assert again.decode(ids) == text


def test_docstrings_and_code_are_taken_apart(quickstart: ModuleType, tmp_path: Path) -> None:
    source = """'''A module.'''
\f
import os


class Thing:
    "A thing."

    def name(self):
        '''The name,

        on two lines.
        '''
        return "not a docstring"
"""
    (tmp_path / "b.py").write_text(source)
    (tmp_path / "a.py").write_text("def undocumented(): return 1\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(source)

    code = 'import os\nclass Thing:\n    def name(self):\n        return "not a docstring"'
    docstrings = "A module.\n\nA thing.\n\nThe name,\n\non two lines."
    assert list(quickstart.documented_code(tmp_path)) == [(docstrings, code)]


def test_split_holds_texts_out(quickstart: ModuleType) -> None:
    texts = [str(i) for i in range(25)]
    train, held_out = quickstart.split(texts, seed=1)
    assert sorted(train + held_out) == sorted(texts) and len(held_out) == 3
    assert (train, held_out) == quickstart.split(texts, seed=1)
    assert all(quickstart.split(["a", "b"], seed=0))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{broken"], r"data\.jsonl, line 2: not JSON"),
        ([{"text": "a"}, {"body": "b", "id": 1}], r"line 2: no field \"text\".*found: 'body', 'id'"),
        ([{"text": 3}, {"text": "b"}], r"line 1: no field \"text\""),
        (["[1]"], r"line 1: no field \"text\".*found: list"),
        (['{"text": "a\u2028b"}', '{"txt": ""}'], r"line 2: no field \"text\".*found: 'txt'"),
        ([{"text": "alone"}], r"found 1 texts, expected at least 2"),
        ([], r"found 0 texts"),
    ],
)
def test_unreadable_data(quickstart: ModuleType, write_jsonl: Any, lines: list[Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        quickstart.read_jsonl(write_jsonl(*lines))


def test_wrong_arguments(
    quickstart: ModuleType, own_model: Path, tmp_path: Path, write_jsonl: Any, capsys: Any
) -> None:
    out = ["--out", str(tmp_path / "out")]
    data = write_jsonl({"text": "the cat"}, {"text": "a dog"})
    with pytest.raises(SystemExit, match=r"--data .*absent\.jsonl: no such file"):
        quickstart.main(["--model", str(own_model), "--data", str(tmp_path / "absent.jsonl"), *out])
    with pytest.raises(SystemExit, match=r"text has \d+ tokens, expected 128 or more"):
        quickstart.main(["--model", str(own_model), "--data", str(data), *out])
    with pytest.raises(SystemExit, match=r"--model .*nowhere: cannot be read"):
        quickstart.main(["--model", str(tmp_path / "nowhere"), "--data", str(data), *out])
    for arguments, message in [
        (["--model", str(own_model)], "--model and --data go together"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--block-size", "4"], "--block-size 4: expected 8 or more"),
    ]:
        with pytest.raises(SystemExit):
            quickstart.main(arguments)
        assert message in capsys.readouterr().err

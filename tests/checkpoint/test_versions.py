"""An adapter moves between transformers 4 (lists of experts) and 5 (stacks), either way."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.checkpoint.golden_cases import CASES, HOME, WRITERS, load_base, logits


def test_golden_files_are_small():
    files = [path for path in HOME.rglob("*") if path.is_file()]
    assert len(files) == len(CASES) * (2 + 3 * len(WRITERS)) and sum(path.stat().st_size for path in files) < 200_000


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", CASES)
def test_adapter_of_either_version(name, writer, tmp_path):
    home = HOME / name / writer
    expected = load_file(home / "logits.safetensors")
    base = load_base(name)
    torch.testing.assert_close(logits(base), expected["base"], rtol=1e-5, atol=2e-5)

    model = PeftModel.from_pretrained(base, home).eval()
    torch.testing.assert_close(logits(model), expected["adapted"], rtol=1e-5, atol=2e-5)

    # Saved from here, the values are those of the file, whatever the names.
    model.save_pretrained(tmp_path)
    saved, original = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, home))
    again = PeftModel.from_pretrained(load_base(name), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    values = [
        sorted((tuple(one.shape), float(one.double().sum())) for one in each.values()) for each in (saved, original)
    ]
    assert values[0] == values[1]

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected["adapted"], rtol=1e-4, atol=1e-4)

"""Writes `golden/`: first on transformers 4, which writes the bases too, then on transformers 5.

python -m tests.checkpoint.make_golden
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from tests.checkpoint.golden_cases import CASES, HOME, WRITER, WRITERS, build, config, load_base, logits


def write(name: str) -> None:
    """The base (on transformers 4), an adapter on it, and the logits without and with it."""
    if WRITER == WRITERS[0]:
        shutil.rmtree(HOME / name, ignore_errors=True)
        build(name).save_pretrained(HOME / name / "base")
        (HOME / name / "base" / "generation_config.json").unlink()
    base = load_base(name)
    found = {"base": logits(base)}
    torch.manual_seed(len(WRITER) + WRITERS.index(WRITER))
    model = get_peft_model(base, config(name)).eval()
    found["adapted"] = logits(model)
    assert (found["base"] - found["adapted"]).abs().max() > 0.05, f"{name}: the adapter does next to nothing"
    target = HOME / name / WRITER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        shutil.copy(Path(directory) / "adapter_model.safetensors", target)
        saved = json.loads((Path(directory) / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = None
    (target / "adapter_config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    save_file({key: value.contiguous() for key, value in found.items()}, target / "logits.safetensors")


if __name__ == "__main__":
    for case in CASES:
        write(case)
        print(case, "written on", WRITER)

"""The layouts that stock PEFT has written: read by shapes, else by its version, else by what the user says.

The oracle is each version's own rule, written out by index: which axis of the parameter A lies on, and which column of
B belongs to which expert. Deltas are compared in float64, expert by expert.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe import import_adapter
from peft_moe.checkpoint.formats.stock_layout import layout_of_version
from tests.checkpoint.formats.cases import V5, bring
from tests.zoo.builder import build_model

RANK, ALPHA, EXPERTS = 3, 6, 4
VERSIONS = ["0.17.0", "0.18.1", "0.19.0", "0.19.1", "0.21.2"]
LAYOUTS = ["peft<=0.18.1", "peft==0.19.0", "peft>=0.19.1"]
#: name -> module, class, field of the inner width, whether it holds (in, out), whether it says `is_transposed`.
HELD: dict[str, tuple[str, str, str, bool, bool]] = {
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", "intermediate_size", True, V5),
    "llama4": ("llama4", "Llama4ForCausalLM", "intermediate_size", True, False),
}
if V5:
    HELD["qwen3_moe"] = ("qwen3_moe", "Qwen3MoeForCausalLM", "moe_intermediate_size", False, False)


def base_in(folder: Path, name: str, inner: int) -> nn.Module:
    module, model_class, field, *_ = HELD[name]
    model = build_model(module, model_class, {field: inner})
    model.save_pretrained(folder / "base")
    return model


def a_lies_on_y(version: str, flagged: bool) -> bool:
    """Of a parameter (E, x, y): the rule of each version."""
    release = tuple(int(one) for one in version.split("."))
    if release <= (0, 18, 1):
        return False
    return flagged if release == (0, 19, 0) else not flagged


def write(folder: Path, name: str, model: nn.Module, targets: list[str], version: str) -> dict[str, Tensor]:
    """An adapter as a version of PEFT wrote it. Returns key of each parameter -> its deltas (E, x, y), float64."""
    flagged = HELD[name][4]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters():
        path, _, target = key.rpartition(".")
        if not path.endswith(".experts") or target not in targets:
            continue
        experts, x, y = parameter.shape
        size_a, size_b = (y, x) if a_lies_on_y(version, flagged) else (x, y)
        a = torch.randn(experts * RANK, size_a, generator=generator)
        b = torch.randn(size_b, RANK * experts, generator=generator)
        inner = ".base_layer" if len(targets) == 2 and target == "gate_up_proj" else ""
        tensors[f"base_model.model.{path}{inner}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}{inner}.lora_B.weight"] = b
        delta = torch.zeros(experts, x, y, dtype=torch.float64)
        for expert in range(experts):
            for row in range(RANK):
                outer = torch.outer(b[:, row * experts + expert].double(), a[expert * RANK + row].double())
                delta[expert] += outer if size_b == x and a_lies_on_y(version, flagged) else outer.T
        deltas[key] = delta * (ALPHA / RANK)
    assert deltas
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [], "peft_version": version,
        "target_parameters": [f"experts.{one}" for one in targets], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def assert_deltas(folder: Path, deltas: dict[str, Tensor], transposed: bool) -> None:
    """Those of the native adapter are the same, in the orientation of the parameters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(tensors) == 2 * len(deltas)
    for key, wanted in deltas.items():
        a, b = (tensors[f"base_model.model.{key}.{factor}"].double() for factor in ("lora_A", "lora_B"))
        for expert in range(EXPERTS):
            found = b[expert] @ a[expert] * (config["expert_alpha"] / config["expert_r"])
            torch.testing.assert_close(found.T if transposed else found, wanted[expert], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
@pytest.mark.parametrize("name", HELD)
def test_shapes_tell(name: str, targets: list[str], version: str, tmp_path: Path) -> None:
    model = base_in(tmp_path, name, 40)
    deltas = write(tmp_path / "out", name, model, targets, version)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for stated in {version, "0.18.1", "0.21.2", None}:  # what the config says changes nothing
        (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"peft_version": stated}))
        assert_deltas(bring(tmp_path, target=f"back {stated}"), deltas, HELD[name][3])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", HELD)
def test_both_projections_tell_without_the_base(name: str, version: str, tmp_path: Path) -> None:
    """Square or not: the output of one is the input of the other."""
    for inner in (40, 32):
        folder = tmp_path / str(inner)
        model = base_in(folder, name, inner)
        deltas = write(folder / "out", name, model, ["gate_up_proj", "down_proj"], version)
        assert_deltas(bring(folder, base=None), deltas, HELD[name][3])
        assert_deltas(bring(folder, target="with base"), deltas, HELD[name][3])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("target", "inner"), [("gate_up_proj", 32), ("down_proj", 64)])
@pytest.mark.parametrize("name", HELD)
def test_square(name: str, target: str, inner: int, version: str, tmp_path: Path) -> None:
    model = base_in(tmp_path, name, inner)
    deltas = write(tmp_path / "out", name, model, [target], version)
    transposed, flagged = HELD[name][3:]
    role = f"lora_A_on_{'input' if a_lies_on_y(version, flagged) != transposed else 'output'}"
    if transposed and version >= "0.19.0" and (flagged or not V5):
        with pytest.raises(ValueError, match=f"depends on the version of transformers.* with this one {role}, else"):
            bring(tmp_path)
    else:
        assert_deltas(bring(tmp_path), deltas, transposed)
    assert_deltas(bring(tmp_path, target="outright", assume_layout=role), deltas, transposed)

    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    for unknown in (None, "0.19.1.dev0", "new"):
        path.write_text(json.dumps(config | {"peft_version": unknown}))
        with pytest.raises(ValueError, match="is square.*assume_layout.*peft<=0.18.1"):
            bring(tmp_path, target="never")
    assert not (tmp_path / "never").exists()
    right = LAYOUTS[0 if version <= "0.18.1" else 1 if version == "0.19.0" else 2]
    assert_deltas(bring(tmp_path, target="told", assume_layout=right), deltas, HELD[name][3])
    path.write_text(json.dumps(config | {"peft_version": "0.1.0"}))  # what the user says counts
    assert_deltas(bring(tmp_path, target="told again", assume_layout=right), deltas, HELD[name][3])


def test_a_layout_that_shapes_contradict(tmp_path: Path) -> None:
    model = base_in(tmp_path, "llama4", 40)
    write(tmp_path / "out", "llama4", model, ["gate_up_proj"], "0.21.2")
    for wrong in ("peft<=0.18.1", "lora_A_on_input"):
        with pytest.raises(ValueError, match="contradicts"):
            bring(tmp_path, assume_layout=wrong)
    with pytest.raises(ValueError, match=r"assume_layout='swapped': expected one of peft<=0\.18\.1"):
        bring(tmp_path, assume_layout="swapped")


def test_one_projection_needs_the_base(tmp_path: Path) -> None:
    model = base_in(tmp_path, "llama4", 40)
    write(tmp_path / "out", "llama4", model, ["down_proj"], "0.21.2")
    with pytest.raises(ValueError, match="do not tell which size is its input.*`base=`"):
        import_adapter(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("0.17.1", 0), ("0.18.0", 0), ("0.18.1", 0), ("0.19.0", 1), ("0.19.1", 2), ("0.21.2", 2), ("1.0.0", 2),
        ("0.20.1.dev0@3f2a", 2), ("0.17.2.dev0@UNKNOWN", 0), ("0.18.1.dev0", None), ("0.18.2.dev0@abc", None),
        ("0.19.0.dev0", None), ("0.19.1.dev0@abc", None), ("0.19.0rc1", None), (None, None), ("main", None), (18, None),
    ],
)  # fmt: skip
def test_versions(version: Any, layout: int | None) -> None:
    """A development version near a change may be from before or after it."""
    assert layout_of_version(version) == (None if layout is None else LAYOUTS[layout])

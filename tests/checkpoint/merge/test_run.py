"""The run: files complete or absent, interrupted and continued, refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_moe
from peft_moe.checkpoint.merge import writer
from peft_moe.checkpoint.merge.produce import Plain
from tests.checkpoint.merge.cases import case, files_of, merge, write_adapter
from tests.weights.checkpoints import read, save_shards
from tests.zoo import ENTRIES


def sharded(folder: Path, shards: int = 3) -> None:
    """A sharded base with files beside it, and an adapter."""
    case("qwen3_moe", folder)
    tensors = read(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    save_shards(tensors, folder / "base", shards)
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "base" / "more").mkdir()
    (folder / "base" / "more" / "template.jinja").write_text("{{ messages }}")
    (folder / "base" / "old.bin").write_text("weights in another format")
    (folder / "base" / ".hidden").write_text("not for others")


def test_files_and_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    result = merge(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"
    assert set(files_of(out)) == set(files_of(base)) - {"old.bin", ".hidden"}
    for name in ("tokenizer.json", "more/template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    for path in base.glob("*.safetensors"):
        assert set(load_file(out / path.name)) == set(load_file(path)), "the plan of files is that of the base"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in read(out).values()) == result.nbytes
    assert result.files == 3 and result.tensors == len(read(base))


def test_files_are_as_safetensors_would_write_them(tmp_path: Path) -> None:
    """Aligned tensors under a padded header, wide dtypes first, and the metadata of the base."""
    case("deepseek_v3", tmp_path)
    merge(tmp_path)
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(one["data_offsets"][0] % 4 == 0 for one in header.values() if one["dtype"] == "F32")


@pytest.mark.parametrize("stop_after", [0, 1, 9, 30, 40])
def test_an_interrupted_run_goes_on(stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    merge(tmp_path)
    whole = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(writer, "_DURABLE", 1)  # durable after every tensor
    monkeypatch.setattr(writer.Run.__init__, "__defaults__", (1,))
    written: list[str] = []
    honest = writer.Run._write_tensor

    def fails(run: Any, file: Any, one: Any, device: Any) -> int:
        if len(written) == stop_after:
            file.write(b"\0" * (one.nbytes // 2))  # half of a tensor
            raise KeyboardInterrupt
        written.append(one.key)
        return honest(run, file, one, device)

    monkeypatch.setattr(writer.Run, "_write_tensor", fails)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path)
    found = files_of(tmp_path / "out")
    assert "config.json" not in found, "a folder that is not finished cannot be loaded"
    assert all(found[name] == whole[name] for name in found if name in whole), "what has its name is complete"

    again: list[str] = []

    def counts(run: Any, file: Any, one: Any, device: Any) -> int:
        again.append(one.key)
        return honest(run, file, one, device)

    monkeypatch.setattr(writer.Run, "_write_tensor", counts)
    merge(tmp_path)
    assert files_of(tmp_path / "out") == whole
    assert not set(written) & set(again), "nothing is made twice"


SCRIPT = """
import sys, time
from peft_moe.checkpoint.merge import produce, merge_checkpoint
honest = produce.Plain.parts
def slow(self, device):
    for part in honest(self, device):
        time.sleep(0.02)
        yield part
produce.Plain.parts = slow
merge_checkpoint(*sys.argv[1:], progress=False)
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    sharded(tmp_path)
    merge(tmp_path)
    whole = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": str(Path(peft_moe.__file__).parents[1])}
    arguments = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    last = tmp_path / "out" / "model-00003-of-00003.safetensors"
    started = time.time()
    while not (tmp_path / "out" / "model-00001-of-00003.safetensors").exists():
        assert process.poll() is None and time.time() - started < 120
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not last.exists(), "it was killed too late to tell anything"
    merge(tmp_path)
    assert files_of(tmp_path / "out") == whole


def test_another_merge_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)

    def fails(self: Any, device: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Plain, "parts", fails)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path)
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished merge of another"):
        merge(tmp_path, dtype=torch.bfloat16)
    shutil.rmtree(tmp_path / "adapter")
    write_adapter(ENTRIES["qwen3_moe"].build(), tmp_path / "adapter", r=2)
    with pytest.raises(ValueError, match="unfinished merge of another"):
        merge(tmp_path)
    assert files_of(tmp_path / "out") == before


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process is refused, and the first one ends as if it had been alone."""
    pytest.importorskip("fcntl")
    sharded(tmp_path)
    merge(tmp_path)
    whole = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    honest = writer.Run._write_tensor
    refused: list[str] = []

    def meanwhile(run: Any, file: Any, one: Any, device: Any) -> int:
        if not refused:
            with pytest.raises(ValueError, match="another process is merging"):
                merge(tmp_path)
            refused.append(one.key)
        return honest(run, file, one, device)

    monkeypatch.setattr(writer.Run, "_write_tensor", meanwhile)
    merge(tmp_path)
    assert refused and files_of(tmp_path / "out") == whole


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    before = files_of(tmp_path)
    for target in ("base", "adapter"):
        with pytest.raises(ValueError, match="cannot take the place"):
            peft_moe.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / target, progress=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        merge(tmp_path)
    assert files_of(tmp_path) == before | {"out/thesis.tex": b"years of work"}


def test_stopped_before_the_first_mark(tmp_path: Path) -> None:
    """What a run leaves that dies right after it made the folder does not stand in the way of the next."""
    case("qwen3_moe", tmp_path)
    (tmp_path / "out").mkdir()
    for name in (writer.LOCK, f".{writer.STATE}.partial"):
        (tmp_path / "out" / name).write_text("")
    merge(tmp_path)
    assert sorted(files_of(tmp_path / "out")) == sorted(files_of(tmp_path / "base"))


def test_a_result_inside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run has written there is not taken for files of the base."""
    case("qwen3_moe", tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    merge(tmp_path)
    arguments = (tmp_path / "base", tmp_path / "adapter", tmp_path / "base" / "out")

    def fails(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.Run, "finish", fails)
        peft_moe.merge_checkpoint(*arguments, progress=False)
    peft_moe.merge_checkpoint(*arguments, progress=False)
    assert files_of(arguments[2]) == files_of(tmp_path / "out")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match=f"`device='{device}'` cannot be used here"):
        merge(tmp_path, device=device)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case("qwen3_moe", tmp_path)
    monkeypatch.setattr(writer, "free_space", lambda path: 10_000)
    with pytest.raises(ValueError, match="the result needs .* GB more and 0.00 GB are free"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_unused_tensors_of_the_adapter(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    stray = ["base_model.model.model.layers.0.mlp.gate.surprise", "something_else"]
    save_file(tensors | {key: torch.zeros(1) for key in stray}, path)
    with pytest.raises(ValueError, match="not used by this model: .*surprise, something_else"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["experts.down_proj.lora_B", "q_proj.lora_A.weight"])
def test_missing_tensors_of_the_adapter(part: str, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in tensors if key.endswith(part))
    save_file({key: value for key, value in tensors.items() if key != lost}, path)
    with pytest.raises(ValueError, match=f"missing.*{lost.removeprefix('base_model.model.')}"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    """The config says one thing and the files another: nothing is written that does not fit."""
    case("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "experts.0.gate_proj" in key)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="shape"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_an_expert(tmp_path: Path) -> None:
    """Its neighbours would move up by one."""
    case("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    lost = [key for key in tensors if "layers.1.mlp.experts.1." in key]
    save_file({key: one for key, one in tensors.items() if key not in lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_overflows(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build().to(torch.float16)
    base.save_pretrained(tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", lora_alpha=1e7)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        merge(tmp_path)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_damaged_file(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        merge(tmp_path)


@pytest.mark.parametrize("where", ["../", "absolute", "sub/", "sub/../"])
def test_an_index_that_leads_out_of_the_folder(where: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    outside = tmp_path / "model-00001-of-00003.safetensors"
    shutil.copy(tmp_path / "base" / outside.name, outside)
    (tmp_path / "base" / "sub").mkdir()
    shutil.move(tmp_path / "base" / outside.name, tmp_path / "base" / "sub" / outside.name)
    path = tmp_path / "base" / "model.safetensors.index.json"
    start = f"{tmp_path}/" if where == "absolute" else where
    path.write_text(path.read_text().replace(outside.name, f"{start}{outside.name}"))
    with pytest.raises(ValueError, match=r"index\.json names .*expected safetensors files that lie beside it"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_stock_expert_adapters_are_refused_with_the_way_out(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"peft_type": "LORA", "target_parameters": ["mlp.experts.down_proj"]}
    path.write_text(json.dumps(config))
    way_out = r'import_adapter\(".*adapter", "<new folder>"\)`, or `peft-moe convert .*adapter <new folder>`'
    with pytest.raises(ValueError, match=way_out):
        merge(tmp_path)
    # On linears of single experts: where the base has stacks there is nothing that they fit.
    path.write_text(json.dumps(config | {"target_parameters": None, "target_modules": ["gate_proj"]}))
    key = "base_model.model.model.layers.0.mlp.experts.7.gate_proj.lora_A.weight"
    other = key.replace("lora_A", "lora_B")
    file = path.with_name("adapter_model.safetensors")
    save_file({key: torch.zeros(3, 64), other: torch.zeros(40, 3)}, file)
    with pytest.raises(ValueError, match=f"experts.7.gate_proj.*If it was trained on lists.*{way_out}"):
        merge(tmp_path)


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match="contradict"):
        merge(tmp_path, dtype="bfloat16", requantize=True)
    with pytest.raises(ValueError, match="none of bfloat16"):
        merge(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="requantize=True. is for FP8"):
        merge(tmp_path, requantize=True)


@pytest.mark.parametrize(
    ("kind", "start"),
    [("MOELORA", "pissa"), ("MOELORA", "olora"), ("LORA", "pissa_niter_4"), ("LORA", "olora"), ("LORA", "corda")],
)
def test_starts_that_changed_the_base_are_refused(kind: str, start: str, tmp_path: Path) -> None:
    """The residual that such an adapter was trained on is not what lies on the disk."""
    case("qwen3_moe", tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"peft_type": kind, "init_lora_weights": start}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*not repeated on disk.*`merge_and_unload`"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()

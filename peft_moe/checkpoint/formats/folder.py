"""Writing an adapter folder: tensor by tensor, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..durable import free_space, sync_directory, write_file
from ..merge.writer import header_of
from .plan import Converted, Planned


def check_target(target: Path, source: Path) -> None:
    """Raise `ValueError` if a result cannot be written there."""
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: the result cannot take the place of what it is made of; name another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: name a new one")


def write_folder(target: Path, converted: Converted, card: str, progress: bool) -> None:
    """Write config, tensors and card under a temporary name beside the target, and rename it.

    If anything fails nothing is left behind. Raises `ValueError` for keys that occur twice or too little space.
    """
    tensors = sorted(converted.tensors, key=lambda one: (-_itemsize(one), one.key))  # aligned, as safetensors writes
    keys = [one.key for one in tensors]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice}: two tensors of the adapter have this name in the other format")
    size = sum(one.nbytes for one in tensors)
    free = free_space(target.parent)
    if size > free:
        raise ValueError(
            f"{target}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. Nothing was written."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        temporary.chmod(0o755)  # of a temporary folder it would be 0o700
        _write_tensors(temporary / "adapter_model.safetensors", tensors, converted.metadata, size, progress)
        config = json.dumps(converted.config, indent=2, sort_keys=True, ensure_ascii=False)
        write_file(temporary / "adapter_config.json", config.encode())
        write_file(temporary / "README.md", card.encode())
        sync_directory(temporary)
        if target.exists():
            target.rmdir()  # it is empty; elsewhere than on POSIX a folder is not renamed onto another
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _write_tensors(path: Path, tensors: list[Planned], metadata: dict[str, str], size: int, progress: bool) -> None:
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar,
        open(path, "wb") as file,
    ):
        file.write(header_of(list(tensors), {"format": "pt"} | metadata))
        for one in tensors:
            for part in one.parts(torch.device("cpu")):
                bar.update(file.write(part))
        file.flush()
        os.fsync(file.fileno())


def _itemsize(one: Planned) -> int:
    return one.nbytes // max(1, torch.Size(one.shape).numel())

"""Writing the files of the result: tensor by tensor, under a temporary name, from where a run was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..durable import free_space, sync_directory, write_file
from .plan import Plan
from .produce import Output

try:
    import fcntl
except ImportError:  # not on this system: whoever starts two merges into one folder gets no warning there
    fcntl = None  # type: ignore[assignment]

STATE = ".peft_moe_merge.json"
LOCK = ".peft_moe_merge.lock"
_BEFORE = (LOCK, f".{STATE}.partial")  # what a run has left that was stopped before its first mark
_DURABLE = 2**30  # bytes after which a file that is being written is made durable, so that a later run goes on there


def header_of(outputs: list[Output], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file with its length before it, padded as safetensors pads it."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for one in outputs:
        content[one.key] = {
            "dtype": one.code,
            "shape": list(one.shape),
            "data_offsets": [start, start + one.nbytes],
        }
        start += one.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Run:
    """The result folder while it is filled.

    Args:
        folder: where. fingerprint: of everything that the result depends on. metadata: file -> that of its header.
        advance: called with a number of bytes as they are written, or found written already.

    Raises `ValueError` if the folder holds something else than an interrupted run of the same merge, or there is not
    enough space on the disk.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        metadata: Mapping[str, Mapping[str, str]],
        fingerprint: str,
        others: int,
        advance: Callable[[int], None],
        durable: int = _DURABLE,
    ) -> None:
        self.folder, self.plan, self.metadata, self.advance = folder, plan, metadata, advance
        self.fingerprint, self.durable = fingerprint, durable
        self.partial: dict[str, Any] = {}
        self._open()
        self._check_space(others)

    def _open(self) -> None:
        state = self.folder / STATE
        if state.is_file():
            found = json.loads(state.read_text())
            if found["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds an unfinished merge of another base, adapter or dtype, or another "
                    "version's. Remove the folder, or name another one."
                )
            self.partial = found["partial"]
        elif self.folder.exists() and any(path.name not in _BEFORE for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no unfinished merge: name a new folder")

    def _check_space(self, others: int) -> None:
        needed = others + sum(self._size(name) for name in self.plan.shards if not (self.folder / name).is_file())
        written = self.folder / self._partial_name()
        needed -= written.stat().st_size if self.partial and written.is_file() else 0
        free = free_space(self.folder)
        if needed > free:
            raise ValueError(
                f"{self.folder}: the result needs {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free on this "
                "disk. Nothing was written."
            )

    def _size(self, name: str) -> int:
        outputs = self.plan.shards[name]
        return len(header_of(outputs, self.metadata[name])) + sum(one.nbytes for one in outputs)

    def _partial_name(self) -> str:
        return f".{self.partial.get('file', '')}.partial"

    def _save(self, partial: dict[str, Any]) -> None:
        self.partial = partial
        write_file(self.folder / STATE, json.dumps({"fingerprint": self.fingerprint, "partial": partial}).encode())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system takes the lock back when this one ends, however it does.

        Raises `ValueError` if another process is writing there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK, "w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(f"{self.folder}: another process is merging into this folder") from error
            yield

    def write(self, device: torch.device) -> None:
        """All files of weights."""
        if not (self.folder / STATE).is_file():
            self._save({})
        for name in self.plan.shards:
            if (self.folder / name).is_file():  # complete: it got its name last
                self.advance(sum(one.nbytes for one in self.plan.shards[name]))
            else:
                self._write_shard(name, device)

    def _write_shard(self, name: str, device: torch.device) -> None:
        outputs = self.plan.shards[name]
        header = header_of(outputs, self.metadata[name])
        temporary = self.folder / f".{name}.partial"
        done = self.partial.get("tensors", 0) if self.partial.get("file") == name and temporary.is_file() else 0
        start = len(header) + sum(one.nbytes for one in outputs[:done])
        if done and temporary.stat().st_size < start:
            done, start = 0, len(header)
        with open(temporary, "rb+" if done else "wb") as file:
            if done:
                file.truncate(start)
                file.seek(start)
            else:
                file.write(header)
            self.advance(start - len(header))
            since = 0
            for number, one in enumerate(outputs[done:], start=done + 1):
                since += self._write_tensor(file, one, device)
                if since >= self.durable and number < len(outputs):
                    file.flush()
                    os.fsync(file.fileno())
                    self._save({"file": name, "tensors": number})
                    since = 0
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        sync_directory(self.folder)

    def _write_tensor(self, file: Any, one: Output, device: torch.device) -> int:
        written = 0
        for part in one.parts(device):
            count = file.write(part)
            written += count
            self.advance(count)
        if written != one.nbytes:
            raise RuntimeError(f"{one.key}: {written} bytes were made, {one.nbytes} planned")
        return written

    def finish(self) -> None:
        """Everything is there: take the marks of the run away."""
        (self.folder / STATE).unlink()
        (self.folder / LOCK).unlink()
        sync_directory(self.folder)


def fingerprint(parts: list[Any]) -> str:
    """Of what a result depends on. Args: parts: bytes, paths of files (their content counts), and what JSON can say."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        else:
            digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()

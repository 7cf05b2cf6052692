"""Which launches share a compiled version, told apart without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def test_large_tensors_on_amd_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that addresses by 32 bits is not used beyond 2 GB, though shapes and dtypes are the same."""
    from peft_moe.ops.triton import launch

    compiled: list[int] = []
    run: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_and_run(tensor: torch.Tensor) -> Any:
                compiled.append(tensor.untyped_storage().size())
                return SimpleNamespace(packed_metadata=(), number=len(compiled))

            return compile_and_run

    monkeypatch.setattr(launch, "_BY_SIZE", True)
    monkeypatch.setattr(launch, "_run", lambda version, *rest: run.append(version.number))
    small = torch.empty(4, 8)
    large = torch.empty(2**29)[:32].view(4, 8)  # memory that nobody touches
    once = launch.Launch(Kernel(), (1,), ())
    for tensor in (small, large, small, large):
        once(tensor)
    assert compiled == [128, 2**31] and run == [1, 2]

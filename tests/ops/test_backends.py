"""Which backend "auto" takes, and what it says when that is not the fast one."""

from __future__ import annotations

import logging

import pytest
import torch

from peft_moe.ops import backends, grouped


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that runs the kernels, in a process that has said nothing yet."""
    monkeypatch.setattr(backends, "triton_runs", lambda device, dtype: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    grouped.log_once.cache_clear()


def choose(rank: int, experts: int, requested: str = "auto") -> str:
    return backends.choose(requested, torch.device("cpu"), torch.bfloat16, rank, experts)


@pytest.mark.parametrize(("rank", "experts"), [(0, 128), (16, 8), (256, 1024)])
def test_kernels(kernels_run: None, caplog: pytest.LogCaptureFixture, rank: int, experts: int) -> None:
    assert choose(rank, experts) == "triton" and not caplog.records


@pytest.mark.parametrize(("rank", "experts"), [(257, 128), (16, 1025)])
def test_past_the_limits_says_so_once(
    kernels_run: None, caplog: pytest.LogCaptureFixture, rank: int, experts: int
) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        assert [choose(rank, experts) for _ in range(3)] == 3 * ["grouped_mm"]
    assert len(caplog.records) == 1 and f"{rank} on {experts} experts" in caplog.text
    assert choose(rank, experts, "triton") == "triton"


def test_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """Where no kernel could run, ranks make no difference."""
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        assert choose(300, 8) == choose(8, 8) == "grouped_mm"
    assert not caplog.records
    with pytest.raises(ValueError, match="experts_backend='triton'"):
        choose(8, 8, "triton")

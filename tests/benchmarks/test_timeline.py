"""timeline.py: kinds and tables of made-up kernels."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, refused, script


@pytest.fixture
def timeline(block: ModuleType) -> ModuleType:
    return script("timeline")


EVENTS = [  # name, start, length: in no order, two of them at the same time
    ("void at::native::radixSortKVInPlace<2, -1>", 130.0, 20.0),
    ("_project_kernel", 100.0, 30.0),
    ("Memset (Device)", 110.0, 4.0),
    ("_outer_kernel", 170.0, 40.0),
    ("never_heard_of", 160.0, 2.0),
]


@pytest.mark.parametrize(
    "kind, names",
    [
        ("products", ["_project_kernel", "_specialized_project_kernel", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
                      "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GroupProblemShape>>(Gather)",
                      "sm90_xmma_gemm_bf16bf16_bf16f32", "cublasLt::splitKreduce_kernel", "prepare_grouped_data"]),
        ("sorting and routing", ["_count_kernel", "_place_kernel", "_compare_kernel", "at::native::bitonicSortKV",
                                 "at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "searchsorted_cuda_kernel",
                                 "at_cuda_detail::cub::DeviceScanKernel", "kernelHistogram1D"]),
        ("elementwise and swish", ["_gated_kernel", "_gated_backward_kernel", "_combine_kernel",
                                   "at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>",
                                   "at::native::reduce_kernel<512, 1>", "silu_and_mul"]),
        ("copies, gathers and index backward", [
            "at::native::vectorized_gather_kernel<16, long>", "at::native::indexing_backward_kernel<float>",
            "at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "Memcpy DtoD (Device)",
            "Memset (Device)", "at::native::CatArrayBatchedCopy<float>", "at::native::_scatter_gather_elementwise"]),
        ("factor gradients", ["_outer_kernel"]),
        ("dequantization", ["_four_bit_kernel", "_dequantize_kernel", "_dequantize_rows_kernel",
                            "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"]),
        ("other", ["never_heard_of", "at::native::cunn_SoftMaxForward"]),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kind: str, names: list[str], timeline: ModuleType) -> None:
    assert {name: timeline.kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_kernels_of_this_package_have_a_kind(timeline: ModuleType) -> None:
    """One that is new or renamed must not count as "other"."""
    found: set[str] = set()
    for path in (BENCHMARKS.parent / "peft_moe" / "ops" / "triton").glob("*.py"):
        found.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert found == set(timeline.OURS)


def test_timeline_of_events(timeline: ModuleType) -> None:
    # [100, 130) with a copy inside, [130, 150), [160, 162), [170, 210)
    assert timeline.extent(EVENTS) == (30 + 20 + 2 + 40, 110)
    assert timeline.extent([]) == (0, 0)
    assert timeline.shares(EVENTS) == [
        ("products", 1, 30.0, 30 / 96), ("sorting and routing", 1, 20.0, 20 / 96),
        ("copies, gathers and index backward", 1, 4.0, 4 / 96), ("factor gradients", 1, 40.0, 40 / 96),
        ("other", 1, 2.0, 2 / 96),
    ]  # fmt: skip
    header, *lines, rest = timeline.table(EVENTS, 5)
    assert header.split() == ["start,", "us", "us", "kernel"]
    assert [line.split() for line in lines] == [
        ["0.0", "30.0", "_project_kernel"], ["30.0", "20.0", "at::native::radixSortKVInPlace<2,", "-1>"],
        ["70.0", "40.0", "_outer_kernel"],
    ]  # fmt: skip
    assert rest.split() == ["6.0", "2", "shorter", "than", "5", "us"]
    assert len(timeline.table(EVENTS, 2)) == 6 and timeline.table([], 5) == [header]


def test_report_of_steps(timeline: ModuleType) -> None:
    """The numbers are medians over steps, the table is of the step whose span is the median."""
    steps = [EVENTS, [("_gated_kernel", 0.0, 500.0)], [("_outer_kernel", 7.0, 10.0), ("_place_kernel", 27.0, 10.0)]]
    first, *lines = timeline.report(steps, 5)
    assert first == "1 to 5 kernels a step, busy 0.092 ms, span 0.110 ms, idle inside 0.010 ms"
    assert lines[:-5] == timeline.table(EVENTS, 5)
    assert lines[-5] == " 31.2 %      30.0 us in   1  products"
    assert timeline.report(steps[1:2], 5)[0].startswith("1 kernels a step, busy 0.500 ms, span 0.500 ms")


def test_timeline_of_a_step(
    timeline: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the profiler's events of a CPU in the place of a GPU's."""
    seen: list[list[tuple[str, float, float]]] = []
    original = timeline.report
    monkeypatch.setattr(timeline, "report", lambda steps, least: seen.extend(steps) or original(steps, least))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("ProfilerActivity", "DeviceType"):
        monkeypatch.setattr(timeline, name, SimpleNamespace(CUDA=getattr(timeline, name).CPU))
    given = {"contender": "plain", "shape": "tiny", "tokens": [8, 16], "rank": 4, "zipf": True, "forward_only": True}
    timeline.run(SimpleNamespace(**given, steps=2, repeats=2, least=0.0), torch.device("cpu"), torch.float32)
    printed = capsys.readouterr().out
    assert len(seen) == 4 and all(length >= 0 for events in seen for _, _, length in events)
    assert all("aten::index" in {name for name, _, _ in events} for events in seen)
    assert "plain T=8, tiny, r=4, zipf, forward_only\nsingle steps " in printed and "plain T=16, tiny" in printed
    monkeypatch.setattr(timeline, "record", lambda step: [])
    with pytest.raises(timeline.NotTimed, match="saw no kernels"):
        timeline.recorded(lambda: None, torch.device("cpu"), 2)


def test_timeline_refuses(
    timeline: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refused(timeline.main, [], capsys)
    assert "invalid choice: 'peft@nf4'" in refused(timeline.main, ["--contender", "peft@nf4"], capsys)
    assert "at least 1" in refused(timeline.main, ["--tokens", "0"], capsys)

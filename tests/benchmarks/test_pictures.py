"""plot.py, and what `make bench` draws."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.scripts import BENCHMARKS, script


@pytest.fixture
def plot() -> ModuleType:
    pytest.importorskip("matplotlib")
    return script("plot")


@pytest.mark.parametrize(
    "settings, peak, title, axes, floor",
    [
        (None, 12.5, "Forward and backward", 2, True),  # from before there were settings
        (None, float("nan"), "Forward and backward", 1, True),
        ({"forward_only": False, "queued": False, "zipf": False}, None, "Forward and backward", 1, True),
        ({"forward_only": True, "queued": False, "zipf": False}, 12.5, "Forward", 2, False),
        ({"forward_only": False, "queued": True, "zipf": False}, 12.5, "Forward and backward, queued", 2, True),
        ({"forward_only": True, "queued": True, "zipf": True}, None, "Forward, queued, zipf", 1, False),
    ],
)
def test_picture(
    settings: dict[str, bool] | None, peak: float | None, title: str, axes: int, floor: bool, plot: ModuleType,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = [
        {"shape": "qwen3-30b", "rank": 16, "contender": name, "tokens": tokens, "ms": 1.5, "peak_mib": peak}
        for name in ("peft", "peft-moe") for tokens in (64, 512)
    ]  # fmt: skip
    data = {"machine": "NVIDIA H200", "rows": rows} | ({} if settings is None else {"settings": settings})
    (tmp_path / "block.json").write_text(json.dumps(data))
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.main(tmp_path / "block.json", tmp_path / "block.png")
    (figure,) = figures
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG") and len(figure.axes) == axes
    assert figure.axes[0].get_title() == title
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert len(labels) == 2 + floor and ("floor" in labels) is floor


def test_says_what_it_leaves_out(plot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"shape": "qwen3-30b", "contender": "peft", "tokens": 64, "ms": 1.5, "peak_mib": None}
    rows = [{**row, "rank": rank} for rank in (8, 16)] + [{**row, "rank": 8, "shape": "olmoe"}]
    (tmp_path / "block.json").write_text(json.dumps({"machine": "a GPU", "rows": rows}))
    plot.main(tmp_path / "block.json", tmp_path / "block.png")
    assert "shows qwen3-30b, r=8; not drawn: olmoe, r=8; qwen3-30b, r=16" in capsys.readouterr().out


def test_picture_of_nothing(plot: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "block.json").write_text(json.dumps({"machine": "a GPU", "rows": []}))
    with pytest.raises(SystemExit, match="nothing was timed"):
        plot.main(tmp_path / "block.json", tmp_path / "block.png")


def test_make_draws_what_this_run_wrote(tmp_path: Path) -> None:
    """With scripts in the place of the benchmark and the picture: `--help` and another `--out` leave old ones alone."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(BENCHMARKS.parent / name, tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "block.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--out')\n"
        "parser.add_argument('--fail', action='store_true')\ngiven = parser.parse_args()\n"
        "assert not given.fail\nopen(given.out, 'w').write('measured')\n"
    )
    (tmp_path / "benchmarks" / "plot.py").write_text(
        "import sys\nopen(sys.argv[2], 'w').write('of ' + open(sys.argv[1]).read())\n"
    )
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / ".installed").touch()
    out = tmp_path / "benchmarks" / "out"

    def bench(options: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-C", str(tmp_path), "bench", f"VENV={environment}", f"BENCH={options}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for before in (False, True):
        for options in ("--help", f"--out {tmp_path}/elsewhere.json"):
            done = bench(options)
            assert done.returncode == 0 and "No picture" in done.stdout, done.stderr
            assert (out / "block.json").exists() is (out / "block.png").exists() is before
        assert bench("--fail").returncode != 0
        if not before:
            done = bench("")
            assert done.returncode == 0 and "No picture" not in done.stdout, done.stderr
            assert (out / "block.png").read_text() == "of measured"
            (out / "block.png").write_text("old")
    assert (out / "block.png").read_text() == "old" and (out / "block.json").read_text() == "measured"
    assert (tmp_path / "elsewhere.json").read_text() == "measured"

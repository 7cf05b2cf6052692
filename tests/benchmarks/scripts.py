"""What the tests of benchmark scripts share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

STACKED = int(version("transformers").split(".")[0]) >= 5  # what most scripts measure
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"layers": 2, "hidden": 128, "inner": 128, "experts": 4}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def refused(main: Callable[[list[str]], object], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What argparse says before it ends with 2; nothing may have been printed as measured."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    return printed.err

"""Scripts as fixtures."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import pytest

from tests.benchmarks.scripts import BENCHMARKS, STACKED, script

# the scripts measure quantized experts too
collect_ignore_glob = ["test_*.py"] if find_spec("bitsandbytes") is None else []


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not STACKED:
        pytest.skip("stacked experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where its neighbours are
    return script("block")

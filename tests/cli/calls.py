"""Calling commands, and folders to call them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner, Result

from peft_moe.cli.app import app
from tests.checkpoint.merge.cases import case

COMMANDS = ["inspect", "convert", "merge", "verify", "quantize", "doctor"]


def call(*arguments: Any) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(one) for one in arguments], terminal_width=200)


def result(*arguments: Any, code: int = 0) -> Any:
    """The JSON object that a command prints."""
    found = call(*arguments, "--json")
    assert found.exit_code == code, found.output
    return json.loads(found.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `base` and `adapter`, of a Qwen3-MoE."""
    case("qwen3_moe", tmp_path, expert_indices=[0, 2, 3])
    return tmp_path

"""The documentation names what the tests cover."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.zoo import ENTRIES

DOCS = Path(__file__).parent.parent / "docs"
VARIANTS = {"nemotron_h_latent": "nemotron_h", "jetmoe_attention": "jetmoe"}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_architecture_is_listed(name: str) -> None:
    text = (DOCS / "supported.md").read_text()
    part = text.split("## transformers 4.57")[0 if transformers.__version__.startswith("5") else 1]
    listed = re.split(r"[\s,|():;]+", part)
    assert VARIANTS.get(name, name) in listed, f"docs/supported.md does not say how {name} runs"

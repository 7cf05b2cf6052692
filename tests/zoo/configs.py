"""The catalogue for the installed transformers."""

from __future__ import annotations

import transformers

from .entry import Entry

if int(transformers.__version__.split(".")[0]) >= 5:
    from .configs_v5 import BROKEN, LISTED
else:
    from .configs_v4 import BROKEN, LISTED

ENTRIES: dict[str, Entry] = {listed.name: listed for listed in LISTED}
"""By name; on transformers 5 the layouts of 5.23, on transformers 4 those of 4.57."""

BROKEN_UPSTREAM: dict[str, str] = BROKEN
"""Architectures whose own forward fails on a CPU in float32, each with the reason."""

if len(ENTRIES) != len(LISTED):
    raise ValueError("two entries of the zoo share a name")

"""Tiny models of every mixture-of-experts architecture that the installed transformers has."""

from .configs import BROKEN_UPSTREAM, ENTRIES
from .entry import Entry, first_floating, loss

__all__ = ["BROKEN_UPSTREAM", "ENTRIES", "Entry", "first_floating", "loss"]

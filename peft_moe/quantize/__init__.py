"""Quantizing routed experts with bitsandbytes: while a model loads, or in memory."""

from .config import BnbExpertsConfig
from .experts import quantize_experts

__all__ = ["BnbExpertsConfig", "quantize_experts"]

"""Small models that behave as the remote code of public Mixture-of-Experts models does, quirks included."""

from .bailing import BailingBlock
from .deepseek_v3 import DeepseekBlock
from .kimi import KimiBlock
from .model import RemoteConfig, RemoteForCausalLM

__all__ = ["BailingBlock", "DeepseekBlock", "KimiBlock", "RemoteConfig", "RemoteForCausalLM"]

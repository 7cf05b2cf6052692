"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner.

Importing this package registers the tuner type `MOELORA` with PEFT and the method of `BnbExpertsConfig` with
transformers, and changes nothing else.
"""

from .auto import auto_enable_grouped_experts
from .checkpoint.formats import export_adapter, import_adapter
from .checkpoint.merge import merge_checkpoint
from .checkpoint.packed import packed_config
from .config import MoELoraConfig
from .grouped import disable_grouped_experts, enable_grouped_experts
from .layer import MoELoraLayer
from .model import MoELoraModel
from .quantize import BnbExpertsConfig, quantize_experts
from .quantize import loader as _loader
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "BnbExpertsConfig",
    "MoELoraConfig",
    "MoELoraLayer",
    "MoELoraModel",
    "__version__",
    "auto_enable_grouped_experts",
    "disable_grouped_experts",
    "enable_grouped_experts",
    "export_adapter",
    "import_adapter",
    "merge_checkpoint",
    "packed_config",
    "quantize_experts",
]

register(MoELoraConfig, MoELoraModel)
_loader.register()

"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner.

Importing this package registers the tuner type `MOELORA` with PEFT and changes nothing else.
"""

from .config import MoELoraConfig
from .layer import MoELoraLayer
from .model import MoELoraModel
from .registration import register

__version__ = "0.1.0"
__all__ = ["MoELoraConfig", "MoELoraLayer", "MoELoraModel", "__version__"]

register(MoELoraConfig, MoELoraModel)

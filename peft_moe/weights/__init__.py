"""How one frozen stack of expert weights is stored: one file a storage, all behind `ExpertWeight`."""

from .base import ExpertWeight
from .dense import DenseStack, ModuleStack

__all__ = ["DenseStack", "ExpertWeight", "ModuleStack"]

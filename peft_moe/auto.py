"""`auto_enable_grouped_experts`: the grouped forward for every model that is loaded or adapted from then on."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel

from .grouped import enable_grouped_experts


class AutoGrouped:
    """Calls `enable_grouped_experts` on every model that transformers loads or PEFT adapts.

    Made by `auto_enable_grouped_experts`. `remove()` takes it out; as a context manager it lasts for the `with` block.
    """

    def __init__(self, options: dict[str, str]) -> None:
        self.options = options
        self._original: dict[type, Any] = {}
        self._ours: dict[type, Any] = {}

    def install(self) -> None:
        """Wrap the three entry points."""
        # `get_peft_model` and `PeftModel.from_pretrained` both end in the constructor, and may be imported by name.
        for cls in (PeftModel, PeftMixedModel):
            self._wrap(cls, "__init__", self._constructor(cls.__init__))
        self._wrap(
            PreTrainedModel, "from_pretrained", classmethod(self._loader(vars(PreTrainedModel)["from_pretrained"]))
        )

    def _wrap(self, cls: type, name: str, ours: Any) -> None:
        self._original[cls] = vars(cls)[name]
        self._ours[cls] = ours
        setattr(cls, name, ours)

    def _constructor(self, original: Any) -> Any:
        @functools.wraps(original)
        def construct(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            self._enable(model)

        return construct

    def _loader(self, original: Any) -> Any:
        @functools.wraps(original.__func__)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            found = original.__get__(None, cls)(*args, **kwargs)
            model = found[0] if isinstance(found, tuple) else found  # with `output_loading_info`
            self._enable(model)
            return found

        return load

    def _enable(self, model: nn.Module) -> None:
        if _installed is self:  # what others have wrapped since may call it still
            enable_grouped_experts(model, **self.options)

    def remove(self) -> None:
        """Take it out. Models that have the grouped forward keep it; what others have wrapped since is left alone."""
        global _installed
        for cls, ours in self._ours.items():
            name = "from_pretrained" if cls is PreTrainedModel else "__init__"
            if vars(cls).get(name) is ours:
                setattr(cls, name, self._original[cls])
        if _installed is self:
            _installed = None

    def __enter__(self) -> AutoGrouped:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


_installed: AutoGrouped | None = None


def auto_enable_grouped_experts(dequantize: str = "recompute", experts_backend: str = "auto") -> AutoGrouped:
    """Call `enable_grouped_experts` on every model that transformers or PEFT returns from now on.

    Args: dequantize, experts_backend: see `enable_grouped_experts`.

    Returns a handle whose `remove()` takes it out. A second call returns the same one, with the options of the second.
    """
    global _installed
    options = {"dequantize": dequantize, "experts_backend": experts_backend}
    if _installed is None:
        _installed = AutoGrouped(options)
        _installed.install()
    _installed.options = options
    return _installed

"""`enable_grouped_experts`: the grouped forward for frozen experts without adapters.

The forward of each known block (of each module of stacked experts) is replaced on that instance. At every call the
replacement asks whether the experts are still what it runs: frozen, without adapters, hooks or offloading, on one
device. If they are not, the block's own forward runs, and a log line says why, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from . import attached
from .binding import ReplacedForward, has_own_forward, replaced_forwards
from .compat import BaseTunerLayer
from .eligibility import Watch, class_path, reason_against
from .frozen import FrozenExperts
from .grouped_report import BlockReport, GroupedReport
from .layer import MoELoraLayer
from .layouts import ExpertsSpec, describe
from .ops.backends import BACKENDS, SWITCH, grouped_is_off
from .ops.grouped import logger
from .quantize.forward import PackedForward
from .targets import all_experts

_NONE = ExpertsSpec(0, (), None)
_said: set[tuple[str, str]] = set()  # what was logged, by class of block and reason
_living: WeakSet[GroupedForward] = WeakSet()  # to find those that someone else's forward calls


class GroupedForward(ReplacedForward):
    """The forward of a block (of stacked experts) with its frozen experts run grouped, while that is right.

    Args:
        module: the block around a list of experts, or the module of stacked experts itself.
        name: path of the experts. leaf: their name in the block; `None` for stacked experts.
        backend, keep_built: see `enable_grouped_experts`.
    """

    def __init__(self, module: nn.Module, name: str, leaf: str | None, backend: str, keep_built: bool) -> None:
        super().__init__(module)
        self.name, self.leaf = name, leaf
        self.backend, self.keep_built = backend, keep_built
        self.experts: FrozenExperts | None = None
        self.reason: str | None = None
        self._watch: Watch | None = None
        self._container: Any = None
        self._class_forward = self._looked_at = type(module).forward
        self.enabled = True
        _living.add(self)
        attached.watch()
        self.install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _living.add(self)
        attached.watch()

    # --- is it right? ----------------------------------------------------------------------------------------------

    @property
    def container(self) -> Any:
        """The experts: a list, or stacked; below the layer that adapts them."""
        found = self.module if self.leaf is None else self.module._modules.get(self.leaf)
        return found.base_layer if isinstance(found, MoELoraLayer) else found

    @property
    def trains(self) -> bool:
        """Whether a weight requires a gradient: then only calls without gradients run grouped."""
        return self._watch is not None and self._watch.trains

    def examine(self) -> str | None:
        """Look at every expert. Returns why they do not run grouped; `None` if they do."""
        container, before = self.container, self.experts
        self.experts = self._watch = None
        self._container, self._looked_at = container, type(self.module).forward
        self.reason, spec = self._look(container)
        if self.reason is None:
            try:
                self.experts = self._take_up(container, spec, before)
            except ValueError as error:  # weights that no store reads, but which may have a forward of their own
                self.reason = str(error)
        if before is not None and before is not self.experts:
            before.abandon()
        if isinstance(container, nn.Module):
            self._watch = Watch(container, everything=self.leaf is not None)
        return self.reason

    def _look(self, container: Any) -> tuple[str | None, ExpertsSpec]:
        if type(self.module).forward is not self._class_forward:
            return f"its class {type(self.module).__name__} has got another forward", _NONE
        if not isinstance(container, nn.Module):
            return "it has no experts any more", _NONE
        spec = None if isinstance(container, BaseTunerLayer) else describe(self.name, container, self.module)
        if spec is None:
            return f"its experts are held by a {class_path(container)}", _NONE
        return _against_layout(spec) or reason_against(container, spec), spec

    def _take_up(self, container: nn.Module, spec: ExpertsSpec, before: FrozenExperts | None) -> FrozenExperts:
        above = self.module if self.leaf is None else self.module._modules.get(self.leaf)
        stores = above.stores if isinstance(above, MoELoraLayer) else None
        experts = FrozenExperts(container, spec, self.name, self.backend, self.keep_built, stores)
        if stores is None and before is not None and before.holds_the_same(experts):
            experts = before  # nothing has to be housed anew
        experts.prepare()
        return experts

    def ready(self, x: Any) -> FrozenExperts | None:
        """The experts if they run grouped on this input, else `None`."""
        if torch.compiler.is_compiling():
            # Without Dynamo (`torch.export`) the weights are fake: what was found before holds.
            runs = not torch.compiler.is_dynamo_compiling() or self._runs_now(attached.state)
            return self.experts if runs and not (self.trains and torch.is_grad_enabled()) else None
        reason = self._reason_now(x)
        if reason is None:
            return self.experts
        kind = type(self.module).__name__
        if (kind, reason) not in _said:
            _said.add((kind, reason))
            logger.warning("%s: experts run as %s runs them by itself: %s", self.name, kind, reason)
        return None

    def set_options(self, backend: str, keep_built: bool) -> None:
        """Those of `enable_grouped_experts`, at a later call."""
        if (backend, keep_built) != (self.backend, self.keep_built):
            self.rest()
            self.backend, self.keep_built = backend, keep_built

    def _reason_now(self, x: Any) -> str | None:
        reason = self._reason_of_experts()
        if reason is not None or self.experts is None:
            return reason
        if self.trains and torch.is_grad_enabled():
            return "its weights require gradients, and the grouped forward computes none for them"
        return self.experts.reason_against(x) if isinstance(x, Tensor) else None

    def _reason_of_experts(self) -> str | None:
        if grouped_is_off():
            return f"{SWITCH}=0 is set"
        known = self.container is self._container and self._looked_at is type(self.module).forward
        if not known or self._watch is None or not self._watch.unchanged():
            self.examine()
        return self.reason

    @torch.compiler.assume_constant_result
    def _runs_now(self, state: str) -> bool:
        """Whether the experts run grouped, looked at while a graph is traced: a constant until `state` changes."""
        return self._reason_of_experts() is None

    # --- the forward -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:  # someone else calls it still
            return self.original(*args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        experts = self.ready(x)
        if experts is None:
            return self.original(*args, **kwargs)
        spec = experts.spec
        if spec.block_forward is not None:
            return spec.block_forward(self.module, experts.run_experts, *args, **kwargs)
        assert spec.call is not None
        return spec.call(self.module, experts, *args, **kwargs)

    # --- giving it up ----------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Forget the weights: a layer that adapts them, and runs them while it is idle, houses them now."""
        if self.experts is not None:
            self.experts.abandon()
        self.experts = self._watch = None

    def remove(self) -> None:
        """See `ReplacedForward.remove`; each weight gets a storage of its own again."""
        super().remove()
        if self.experts is not None:
            self.experts.release()
        self.experts = self._watch = None
        self.enabled = False
        if not any(one.enabled for one in _living):
            attached.rest()


def _against_layout(spec: ExpertsSpec) -> str | None:
    if spec.refused is not None:
        return spec.refused
    if spec.one_by_one:
        return "it is not a known block of experts"
    return None


# --- a whole model -------------------------------------------------------------------------------------------------


def enable_grouped_experts(
    model: nn.Module, dequantize: str = "recompute", experts_backend: str = "auto"
) -> GroupedReport:
    """Run the frozen experts of a model grouped: one product for all experts instead of a loop over them.

    Call it once, before or after adapters are attached to other modules. Experts that get an adapter later, or whose
    weights are unfrozen, run as before from then on; they run grouped again when the adapter is gone.

    Args:
        model: any model, wrapped by PEFT or not.
        dequantize: for quantized experts, `"recompute"` rebuilds 16-bit weights in backward, `"cache"` keeps them.
        experts_backend: see `MoELoraConfig`.

    Returns what was done per block, and why a block was left alone. Calling it again changes nothing.
    Raises `ValueError` for an unknown option.
    """
    if dequantize not in ("recompute", "cache"):
        raise ValueError(f"dequantize={dequantize!r} is unknown; expected 'recompute' or 'cache'")
    if experts_backend not in BACKENDS:
        raise ValueError(f"experts_backend={experts_backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    return group(model, all_experts(model), experts_backend, dequantize == "cache")


def group(
    model: nn.Module, experts: dict[str, ExpertsSpec], backend: str, keep_built: bool, override: bool = True
) -> GroupedReport:
    """`enable_grouped_experts` for some experts, by path. Args: override: options of an earlier call."""
    blocks = [_enable(model, name, spec, backend, keep_built, override) for name, spec in experts.items()]
    return GroupedReport(tuple(blocks))


def _enable(
    model: nn.Module, name: str, spec: ExpertsSpec, backend: str, keep_built: bool, override: bool
) -> BlockReport:
    found = model.get_submodule(name)
    module = found.base_layer if isinstance(found, MoELoraLayer) else found
    parent_name, _, leaf = name.rpartition(".")
    owner: nn.Module = model.get_submodule(parent_name) if spec.experts else module  # type: ignore[assignment]
    kind = type(owner).__name__
    if grouped_is_off():
        return BlockReport(name, kind, False, f"{SWITCH}=0", enabled=False)
    places = replaced_forwards(owner)
    mine = next((one for one in places if isinstance(one, GroupedForward)), None)
    new = mine is None
    if mine is None:
        reason = _against_layout(spec)
        if reason is None and not has_own_forward(owner):
            reason = "its forward was replaced by someone else"
        if any(isinstance(one, PackedForward) for one in places):  # packed stacks run no other way
            return BlockReport(name, kind, True)
        if reason is not None:
            return BlockReport(name, kind, False, reason, enabled=False)
        mine = GroupedForward(owner, name, leaf if spec.experts else None, backend, keep_built)
    if override or not mine.enabled:
        mine.set_options(backend, keep_built)
    new, mine.enabled = new or not mine.enabled, True
    reason = mine.examine()
    if reason is None and mine.trains:
        reason = "its weights require gradients: only calls without gradients run grouped"
    return BlockReport(name, kind, reason is None, reason or "", new=new)


def disable_grouped_experts(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Give every block its own forward back, where `enable_grouped_experts` replaced it.

    A forward that someone else has put in its place since is left alone; if it calls the grouped one, that passes on
    to the block's own.

    Args: names: paths of experts, as the report of `enable_grouped_experts` gives them; `None`: all.

    Returns the paths of the experts that run as before.
    """
    chosen = None if names is None else set(names)
    order = {id(module): number for number, module in enumerate(model.modules())}
    found = [one for one in _living if one.enabled and id(one.module) in order]
    found = sorted(
        (one for one in found if chosen is None or one.name in chosen), key=lambda one: order[id(one.module)]
    )
    for one in found:
        one.remove()
    return [one.name for one in found]

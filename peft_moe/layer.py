"""`MoELoraLayer`: the adapters of one experts module."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import forward, initialisation, merging, placement
from .adapter import ProjectionAdapter, pack
from .binding import BlockForward, LinearHook, hook_linears
from .compat import LoraLayer, check_adapters_to_merge, onload, through_hook
from .config import MoELoraConfig
from .layouts import ExpertsSpec, ProjectionSpec
from .ops.grouped import log_once
from .settings import AdapterSettings, decomposes, nominal_scaling, resolve
from .stores import open_store


def _parameters_are_created_on_meta() -> bool:
    """Whether `low_cpu_mem_usage` is on: parameters land on the meta device, their values come from a checkpoint."""
    probe = nn.Module()
    probe.parameter = nn.Parameter(torch.empty(0))
    return probe.parameter.device.type == "meta"


class MoELoraLayer(nn.Module, LoraLayer, forward.RunsExperts):
    """Per-expert LoRA around one experts module, stacked or a list.

    Children: `base_layer`, the module as it was, and one `ProjectionAdapter` a projection, so that the parameters are
    `<experts>.gate_up_proj.lora_A.<adapter>` and so on. A list of experts behaves as the list still: it can be
    indexed, iterated and measured.

    Args:
        base_layer: the experts module. spec: what `layouts.describe` says of it. name: its path, for messages.
        block: the module around a list of experts.
    """

    adapter_layer_names = ()  # the parameters live in the ProjectionAdapters
    other_param_names = ("adapters", "r", "lora_alpha", "scaling", "use_rslora", "use_dora")

    def __init__(self, base_layer: nn.Module, spec: ExpertsSpec, name: str, block: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.spec, self.name = spec, name
        self.stores = {one.name: open_store(base_layer, spec, one, name) for one in spec.projections}
        self.adapters: dict[str, AdapterSettings] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_variant: dict[str, Any] = {}
        self.lora_embedding_A: dict[str, Any] = {}
        self.lora_embedding_B: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self.backend = "auto"
        self.mixed_batch: list[str] | None = None  # set by the model for the length of a call
        self.dense_dtype: torch.dtype | None = None  # merging brings packed weights into it
        self.keep_base = True  # merging keeps the base's bytes for unmerge; merge_and_unload has no use for them
        self.hidden_from_lora_model = False
        self._disable_adapters = False
        self._base_bytes: dict[str, Any] = {}
        if hasattr(base_layer, "forward_routed"):
            self._is_hooked = True  # the block of MXFP4 experts then calls `forward`, not the base's kernels past it
        self._bindings: list[BlockForward | LinearHook] = []
        for store in self.stores.values():
            store.freeze()
        self._bind(block)

    def _bind(self, block: nn.Module | None) -> None:
        if self.spec.block_forward is not None and block is not None:
            self._bindings = [BlockForward(block, self)]
            self._house()
        elif self.spec.one_by_one:
            log_once(
                f"{type(block).__name__}: not a known block of experts; its experts are adapted one by one, which is "
                "right but slow"
            )
            self._bindings = list(hook_linears(self))

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Tell packed weights, whose own dtype says nothing of it, in which dtype the model computes."""
        for store in self.stores.values():
            if dtype is not None and hasattr(store, "activation_dtype"):
                store.activation_dtype = dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._house()
        return self

    def _house(self) -> None:
        """House the weights of a list of experts now, not in the next call: it may be compiled, and could not."""
        if self._bindings and not self.spec.one_by_one:
            for store in self.stores.values():
                store.prepare()

    # --- what PEFT's LoraModel looks at --------------------------------------------------------------------------

    @property
    def lora_A(self) -> dict[str, AdapterSettings]:
        """The adapters by name, for PEFT code that asks which adapters a LoRA layer has."""
        return {} if self.hidden_from_lora_model else self.adapters

    @property
    def projections(self) -> dict[str, ProjectionAdapter]:
        """Slot name (`gate_up_proj`, `down_proj`, ...) -> its parameters."""
        return {name: child for name, child in self._modules.items() if isinstance(child, ProjectionAdapter)}

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base, which its block may read (`num_experts` and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    # --- adapters ------------------------------------------------------------------------------------------------

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    @property
    def weight(self) -> Tensor:
        """One of the base's weights, for PEFT code that asks a LoRA layer where it lies."""
        return next(self.base_layer.parameters())

    @property
    def active(self) -> list[str]:
        """The adapters that take part in the forward."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.adapters]

    @property
    def idle(self) -> bool:
        """Whether the base runs by itself: no adapter active, or all merged."""
        if self.mixed_batch is not None and not (self._disable_adapters or self.merged_adapters):
            return not any(name in self.adapters for name in self.mixed_batch)
        return not self.active

    @property
    def left_to_base(self) -> bool:
        """Whether the base's own forward computes this call: nothing to add, and it can run.

        Packed weights on a CPU are what the base's own kernels cannot multiply with: then the layer runs them itself.
        """
        idle = self.idle
        if not idle or self.spec.one_by_one:
            return idle
        stores = self.stores.values()
        return not any(getattr(store, "packed", False) and store.device.type in ("cpu", "meta") for store in stores)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MoELoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Rank and scaling of the experts come from the config, not from `r` and `lora_alpha`.

        Raises `ValueError` for what the config asks and this module cannot give; the layer is then unchanged.
        """
        with placement.onloaded(self):  # adapters start from the weights, and lie where these will be used
            self._update_layer(adapter_name, config)

    def _update_layer(self, adapter_name: str, config: MoELoraConfig) -> None:
        settings = resolve(config, self.spec, self.name)
        if decomposes(config.init_lora_weights) and self.merged_adapters:
            raise ValueError(f"{self.name}: unmerge before adding an adapter that starts from the base weights")
        parameters = {
            slot: found
            for projection in self.spec.projections
            if projection.name in settings.projections
            for slot, found in self._new_parameters(settings, projection, config).items()
        }
        self.adapters[adapter_name] = settings
        self.r[adapter_name], self.lora_alpha[adapter_name] = config.r, config.lora_alpha
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, config.use_dora
        self.scaling[adapter_name] = nominal_scaling(config)
        self.backend = config.experts_backend
        for store in self.stores.values():
            store.keep_built = config.dequantize == "cache"
        for slot, (a, b, magnitudes) in parameters.items():
            if slot not in self.projections:
                setattr(self, slot, ProjectionAdapter(self.merged_adapters))
            child = self.projections[slot]
            child.lora_A[adapter_name], child.lora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
            if magnitudes is not None:
                child.lora_magnitude_vector[adapter_name] = nn.Parameter(magnitudes)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        everything: list[Any] = [self, *self.projections.values()]
        for layer in everything:
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_parameters(
        self, settings: AdapterSettings, projection: ProjectionSpec, config: MoELoraConfig
    ) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        store, experts = self.stores[projection.name], settings.adapted(self.spec.num_experts)
        init, nominal = config.init_lora_weights, nominal_scaling(config)
        awaits_values = _parameters_are_created_on_meta()
        found = {}
        for slot in settings.slots(projection):
            rows, where = settings.slot_rows(projection, slot), f"{self.name}.{slot}"
            out_features = settings.slot_out_features(projection, slot)
            a = torch.zeros(
                1 if settings.shares(projection, "A") else len(experts), settings.rank, projection.in_features
            )
            b = torch.zeros(1 if settings.shares(projection, "B") else len(experts), out_features, settings.rank)
            magnitudes = torch.zeros(len(experts), out_features) if settings.use_dora else None
            if store.device.type != "meta":
                if decomposes(init):  # also where values come later: the base becomes the residual
                    placement.check_start(self, init)
                    initialisation.take_out(store, experts, rows, a, b, str(init), settings, nominal, where)
                elif not awaits_values:
                    initialisation.fill(a, b, init, settings.ranks, where)
                if settings.use_dora and not awaits_values:
                    magnitudes = initialisation.magnitudes(store, experts, rows, a, b, settings, nominal)
            if settings.ragged:
                a, b = pack(a, settings), pack(b.transpose(1, 2), settings)
            found[slot] = (a, b, magnitudes)
        return found

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        store = next(iter(self.stores.values()))
        target = device or store.device
        if target.type == "meta":
            return
        for child in self.projections.values():
            for parameters in (child.lora_A, child.lora_B, child.lora_magnitude_vector):
                old = parameters[adapter_name] if adapter_name in parameters else None
                if old is not None and old.device.type != "meta":
                    parameters[adapter_name] = nn.Parameter(old.data.to(target, store.dtype), old.requires_grad)

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's forward, with the adapters of each expert added."""
        kwargs.pop("adapter_names", None)  # PEFT's hook passes it; the model has set `mixed_batch`
        if self.left_to_base or self.spec.call is None:
            return self.base_layer(*args, **kwargs)
        run = partial(self.spec.call, self.base_layer, self)
        return through_hook(self.base_layer, run, *args, **kwargs)

    def run_experts(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `RunsExperts.run_experts`. Raises `ValueError` where weights or adapters lie on another device than x."""
        return placement.run(self, super().run_experts, x, *args, **kwargs)

    def run_projection(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See `RunsExperts.run_projection` and `run_experts`."""
        return placement.run(self, super().run_projection, rows, offsets)

    def expert_bias(self, projection: ProjectionSpec, expert: int, rows: slice) -> Tensor | None:
        """The bias of the linear of one expert that computes the given rows."""
        start = 0
        for part in projection.parts:
            linear: Any = self.base_layer.get_submodule(f"{self.spec.experts[expert]}.{part.path}".rstrip("."))
            if start == rows.start:
                return linear.bias
            start += linear.out_features
        return None

    # --- merge ---------------------------------------------------------------------------------------------------

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError` if merging would leave a value that is not finite. Changes nothing."""
        names = adapter_names if adapter_names is not None else self.active_adapters
        with onload(self.base_layer):
            merging.check_finite(self, [name for name in names if name in self.adapters])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weights: summed in fp32, rounded once.

        Adapters merged before are merged anew together with these, from the base's own bytes.

        Args: safe_merge: check the result first (see `check_merge`). adapter_names: `None`: the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if self.dense_dtype is not None:
            self._densify(torch.float32)  # in fp32 until the deltas are in: rounded once
        if names:
            self._merge(names, safe_merge)
        if self.dense_dtype is not None:
            self._densify(self.dense_dtype)

    def _densify(self, dtype: torch.dtype) -> None:
        for store in self.stores.values():
            if hasattr(store, "densify"):
                store.densify(dtype)

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        names = [*self.merged_adapters, *names]
        already = bool(self.merged_adapters)
        if already and self._base_bytes:
            self._restore_base()
        try:
            if safe_merge:
                merging.check_finite(self, names)
        except ValueError:
            if already:
                merging.add_deltas(self, self.merged_adapters)
            raise
        if not self._base_bytes:
            self._base_bytes = {name: store.snapshot() for name, store in self.stores.items()}
        try:
            merging.add_deltas(self, names)
        except BaseException:
            # One projection may be merged already: take it back, and what was merged before with it goes in again.
            self._restore_base()
            if already:
                merging.add_deltas(self, self.merged_adapters)
            else:
                self._base_bytes = {}
            raise
        if not self.keep_base:
            self._base_bytes = {}
        self.merged_adapters[:] = names

    def enable_adapters(self, enabled: bool) -> None:
        """See PEFT. Disabled adapters that are merged are taken out of the base weights."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def _restore_base(self) -> None:
        for name, saved in self._base_bytes.items():
            self.stores[name].restore(saved)

    def unmerge(self) -> None:
        """Put the base's own bytes back."""
        if not self.merged_adapters:
            return
        if not self._base_bytes:
            raise RuntimeError(f"{self.name}: its base weights were not kept when adapters were merged to be unloaded")
        self._restore_base()
        self._base_bytes = {}
        self.merged_adapters.clear()

    def unbind(self) -> None:
        """Give the block around a list of experts its own forward back: the layer is about to be unloaded."""
        for binding in self._bindings:
            binding.remove()
        self._bindings = []
        for store in self.stores.values():
            store.release()

    # --- a list of experts is a list still -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.base_layer)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.base_layer)  # type: ignore[call-overload]

    def __getitem__(self, key: Any) -> nn.Module:
        return self.base_layer[key]  # type: ignore[index]

    def __bool__(self) -> bool:
        return True  # also around stacked experts, which have no length

    def extra_repr(self) -> str:
        kind = "grouped" if self.spec.one_by_one is False else "one by one"
        stores = "".join(f"\n{name}: {store!r}" for name, store in self.stores.items())
        adapters = ", ".join(self.adapters)
        return f"{self.spec.num_experts} experts, {kind}, backend={self.backend}, adapters: {adapters}{stores}"

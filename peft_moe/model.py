"""`MoELoraModel`: LoRA on linears by PEFT, LoRA on experts by this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import weighting
from .checkpoint import densify, native, trainable
from .compat import BaseTunerLayer, ExcludedModule, LoraLayer, LoraModel, check_target_module_exists
from .forward import check_mixed_batch
from .grouped import disable_grouped_experts, group
from .layer import MoELoraLayer
from .linears import FP8LoraLinear, check_options, is_fp8_linear
from .ops.grouped import log_once
from .ranks import check_ranks
from .settings import check_against_model, resolve
from .targets import all_experts, asks_for, check_target_modules, is_inside, targeted_experts
from .weights import is_packed_linear, put_linear, saved_linear

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class MoELoraModel(LoraModel):
    """The tuner of `MoELoraConfig`.

    Linears become PEFT's own LoRA layers; experts modules become `MoELoraLayer`s. Everything of `LoraModel` works on
    both, with two promises beyond it: `unmerge_adapter` gives every base weight back bit for bit, and `safe_merge`
    looks at all layers before it changes the first.
    """

    prefix = "lora_"
    tuner_layer_cls = BaseTunerLayer
    weighting: weighting.Plan | None = None  # while adapters are being combined

    # --- which module becomes what ---------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See PEFT. Everything that can be wrong with the config is found before the first module is replaced."""
        config = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = weighting.adjusted(self, config)
        self._experts = all_experts(model)
        self._targets = targeted_experts(model, config, self._experts)
        check_against_model(config, self._targets)
        if config.expert_targets:
            check_target_modules(model, config, self._experts)
        if config.file_shapes is not None:  # read from a file whose tensors come next: they have to fit
            expected = {
                key: shape
                for name, spec in self._targets.items()
                for key, shape in native.expected_shapes(name, spec, resolve(config, spec, name)).items()
            }
            native.check_shapes(config.file_shapes, expected, adapter_name)
            if config.expert_targets:  # else variants may be on that shape linears otherwise
                native.check_linears(config.file_shapes, model, config, adapter_name)
        if self._targets:
            trainable.prepare(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._group_frozen(model, config)

    def _group_frozen(self, model: nn.Module, config: Any) -> None:
        """Run listed experts grouped while they have no adapter, or none that is active; stacks are grouped already."""
        lists = {name: spec for name, spec in self._experts.items() if spec.experts}
        report = group(model, lists, config.experts_backend, config.dequantize == "cache", override=False)
        self._grouped = [*getattr(self, "_grouped", ()), *(one.name for one in report.blocks if one.new)]

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._targets:
            return True
        if is_inside(key, self._experts):
            # The children of a list of experts may match `target_modules` too: they are adapted as experts or not
            # at all. Experts that are excluded are reported as such, so that PEFT does not warn of a vain exclusion.
            return ExcludedModule() if key in self._experts and not asks_for(peft_config, key) else False
        if not peft_config.target_modules:
            return False
        return check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            known = self.target_module_mapping.get(kind, ())
            if not known:
                log_once(
                    f"target_modules is None and PEFT knows no usual projections of {kind}: the experts alone are "
                    "adapted. Name the attention projections to adapt them too"
                )
            peft_config.target_modules = known if isinstance(known, str) else set(known)
        everywhere = peft_config.target_modules == "all-linear"
        check_ranks(
            self.model, peft_config,
            lambda name: not is_inside(name, self._experts)
            and (everywhere or self._check_target_module_exists(peft_config, name)),
        )  # fmt: skip
        return peft_config

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key not in self._targets:
            check_options(lora_config, target, current_key)
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )
            return
        if isinstance(target, MoELoraLayer):
            layer = target
        else:
            layer = MoELoraLayer(target, self._targets[current_key], current_key, block=parent)
            layer.compute_in(self._activation_dtype())
        layer.update_layer(adapter_name, lora_config.r, lora_config.lora_alpha, config=lora_config)
        if adapter_name not in self.active_adapters:
            children: list[Any] = list(layer.projections.values())
            for child in children:
                child.set_requires_grad(adapter_name, False)
        if layer is not target:
            layer.train(target.training)
            setattr(parent, target_name, layer)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if is_fp8_linear(base):
            kwargs.pop("parameter_name", None)
            lora_config.fan_in_fan_out = False
            return FP8LoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _activation_dtype(self) -> torch.dtype | None:
        """The dtype that flows through the model, told by its first norm; `None` if it has none."""
        for name, parameter in self.model.named_parameters():
            if "norm" in name.lower() and parameter.dtype in ACTIVATION_DTYPES:
                return parameter.dtype
        return None

    @property
    def expert_layers(self) -> list[MoELoraLayer]:
        """All adapted experts modules."""
        return [module for module in self.model.modules() if isinstance(module, MoELoraLayer)]

    # --- mixed batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = list(kwargs.get("adapter_names") or ())
        layers = self.expert_layers if names else []
        if names:  # before PEFT puts its hooks in, which an exception would leave behind
            _check_samples(names, args, kwargs)
            for layer in layers:
                check_mixed_batch(layer, names)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            # A block reads single experts from a list, past any hook on it: the layers are told directly.
            for layer in layers:
                layer.mixed_batch = names
            try:
                yield
            finally:
                for layer in layers:
                    layer.mixed_batch = None

    # --- merge -------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """See PEFT; `unmerge_adapter` afterwards restores every base weight bit for bit.

        Raises `ValueError` with `safe_merge` if any merged weight were not finite, before anything is changed.
        """
        if safe_merge:
            self._check_merge_everywhere(adapter_names)
        if not hasattr(self, "_linear_bytes"):
            self._linear_bytes: dict[str, Any] = {}
        for name, layer in self._stock_layers():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if isinstance(layer, FP8LoraLinear):
                continue  # keeps codes and scales itself
            if isinstance(weight, Tensor) and not layer.merged and name not in self._linear_bytes:
                self._linear_bytes[name] = saved_linear(layer.get_base_layer())
        first = not any(layer.merged for layer in self.expert_layers) and not any(
            layer.merged for _, layer in self._stock_layers()
        )
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            if first:
                self.unmerge_adapter()  # the layers before the one that failed
            raise

    def disable_adapter_layers(self) -> None:
        """See PEFT. What is merged is unmerged first, bit for bit: disabled means the base."""
        if any(layer.merged for layer in [*self.expert_layers, *(one for _, one in self._stock_layers())]):
            self.unmerge_adapter()
        super().disable_adapter_layers()

    @torch.no_grad()
    def unmerge_adapter(self) -> None:
        """See PEFT. The base weights are those of before the merge, bit for bit."""
        super().unmerge_adapter()
        saved = getattr(self, "_linear_bytes", {})
        for name, layer in self._stock_layers():
            if name in saved:
                put_linear(layer.get_base_layer(), saved[name])
        self._linear_bytes = {}

    def merge_and_unload(  # type: ignore[override]
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """See PEFT.

        Args: dtype: merge packed weights (bitsandbytes, FP8, MXFP4) into plain ones of this dtype, summed in fp32 and
            rounded once, instead of requantizing them. Weights that are not packed keep their dtype.
        """
        if dtype is None:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if safe_merge:
            self._check_merge_everywhere(adapter_names)
        layers = self.expert_layers
        names = tuple(f"{name}." for name, one in self.model.named_modules() if isinstance(one, MoELoraLayer))
        densify.plain_linears(self.model, dtype, skip=names)
        for layer in layers:
            layer.dense_dtype = dtype
        unloaded = super().merge_and_unload(progressbar, False, adapter_names)
        densify.plain_experts(unloaded, dtype)
        densify.unmark(unloaded, dtype)
        return unloaded

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and safe_merge:
            self._check_merge_everywhere(adapter_names)
        layers = self.expert_layers
        for layer in layers:
            layer.keep_base = False
        try:
            unloaded = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        except BaseException:
            for layer in layers:
                layer.keep_base, layer.dense_dtype = True, None
            raise
        for layer in layers:
            layer.unbind()
        disable_grouped_experts(unloaded, self._grouped)
        return unloaded

    def _stock_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """PEFT's own LoRA layers."""
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and not isinstance(module, MoELoraLayer):
                yield name, module

    @torch.no_grad()
    def _check_merge_everywhere(self, adapter_names: list[str] | None) -> None:
        for layer in self.expert_layers:
            layer.check_merge(adapter_names)
        for name, layer in self._stock_layers():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if (
                not isinstance(weight, Tensor)
                or not weight.is_floating_point()
                or is_packed_linear(layer.get_base_layer())  # in bytes that are called numbers
                or not hasattr(layer, "get_delta_weight")
            ):
                continue
            # Tried and taken back: only PEFT's own merge knows what its variants (DoRA) and its roundings give.
            saved = {key: one.detach().clone() for key, one in layer.get_base_layer().named_parameters(recurse=False)}
            merged = list(layer.merged_adapters)
            try:
                layer.merge(safe_merge=True, adapter_names=adapter_names)
            except ValueError as error:
                names = ", ".join(adapter_names or self.active_adapters)
                raise ValueError(
                    f"NaNs detected in the merged weights. {name}: merging {names} leaves values that are not finite "
                    f"in {weight.dtype}; the adapter seems broken. Nothing was changed."
                ) from error
            finally:
                for key, one in saved.items():
                    getattr(layer.get_base_layer(), key).data.copy_(one)
                layer.merged_adapters[:] = merged

    # --- weighted adapters -------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd", **kwargs: Any
    ) -> None:
        """See PEFT; experts are combined as linears are, expert by expert."""
        if adapter_name in self.peft_config:
            warnings.warn(f"There is an adapter {adapter_name!r} already: nothing was combined.", stacklevel=2)
            return
        plan = weighting.plan(self, adapters, weights, combination_type, **kwargs)
        try:
            with weighting.in_progress(self, plan):
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type=combination_type, **kwargs
                )
            for layer in self.expert_layers:
                weighting.combine(layer, adapter_name, plan)
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    # --- state dicts -------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """See PEFT. Expert tensors are matched by what transformers 4 and 5 agree on in their names."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MoELoraLayer) and adapter_name in layer.adapters:
                path = name.removeprefix(native.PREFIX)
                expected |= native.expected_shapes(path, layer.spec, layer.adapters[adapter_name])
        mine = native.expert_keys(state_dict)
        experts = {native.full_key(key): value for key, value in state_dict.items() if key in mine}
        rest = {key: value for key, value in state_dict.items() if key not in mine}
        matched = native.check_shapes({key: value.shape for key, value in experts.items()}, expected, adapter_name)
        if config.expert_targets:
            native.check_linears({key: value.shape for key, value in rest.items()}, model, config, adapter_name)
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        in_memory = native.PREFIX if any(name.startswith(native.PREFIX) for name, _ in model.named_modules()) else ""
        for own, key in matched.items():
            loaded[f"{in_memory}{own.removeprefix(native.PREFIX)}.{adapter_name}"] = experts[key]
        native.check_taken(loaded, model, adapter_name)
        return loaded

    def subtract_mutated_init(self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None) -> Any:
        """Refused where experts are adapted: see PEFT's `path_initial_model_for_weight_conversion`."""
        if self.expert_layers:
            raise ValueError(
                "`path_initial_model_for_weight_conversion` is not implemented for expert adapters. Save the adapter "
                "as it is and load it on the residual base, or merge it."
            )
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)


def _check_samples(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` unless a batch has as many samples as `adapter_names` has names."""
    values = [*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds", "pixel_values"))]
    samples = next((value.shape[0] for value in values if isinstance(value, Tensor)), len(names))
    if samples != len(names):
        raise ValueError(
            f"`adapter_names` has {len(names)} names, found a batch of {samples} samples; expected a name for each."
        )

"""`MoELoraConfig`: LoRA's options, and those of the experts."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .checkpoint.card import add_loading_section
from .checkpoint.files import check_adapter_tensors
from .checkpoint.header import read_header
from .config_input import adapter_home, check_input, check_pickle, check_types, checked
from .layouts import TARGETS
from .ops.backends import BACKENDS
from .patterns import check_patterns
from .registration import peft_type

FORMAT_VERSION = 1
LAYOUT = "contiguous_r"

# LoRA options that cannot hold on experts: name -> (is it set?, why)
_REFUSED: dict[str, str] = {
    "fan_in_fan_out": "the orientation of expert weights is read from their layout",
    "lora_bias": "expert adapters have no bias",
    "layer_replication": "replicated layers would share their experts' storage",
    "megatron_config": "Megatron's parallel layers hold no experts of these layouts",
    "target_parameters": "experts are targeted by `target_experts`",
    "eva_config": "EVA initialises from the inputs of single linears",
    "corda_config": "CorDA initialises from the covariance of single linears' inputs",
    "lora_ga_config": "LoRA-GA initialises from gradients of the base weights, which are never formed for experts",
    "velora_config": "VeLoRA replaces the backward of single linears",
    "alora_invocation_tokens": "aLoRA switches by token position, which routed experts do not see",
    "use_qalora": "QA-LoRA is defined for single GPTQ linears",
    "monteclora_config": "MonteCLoRA samples per linear",
    "use_bdlora": "BD-LoRA shards single linears",
    "arrow_config": "Arrow routes between adapters of single linears",
    "kasa_config": "KaSA truncates the weights of single linears",
}
_INITIALISATIONS = ("gaussian", "pissa", "olora", "orthogonal")


def _fail(option: str, found: object, reason: str) -> None:
    raise ValueError(f"MoELoraConfig: `{option}={found!r}` {reason}.")


@dataclass
class MoELoraConfig(LoraConfig):
    """LoRA on the routed experts of a Mixture-of-Experts model, and on its linears.

    Everything of [`peft.LoraConfig`] holds on linears, and `r`, `lora_alpha`, `use_rslora`, `lora_dropout`, `use_dora`
    and `init_lora_weights` on experts too. A LoRA option that cannot hold on experts raises a `ValueError` unless
    `target_experts` is empty.

    `target_modules`: `None` means the architecture's usual attention projections (experts alone where PEFT knows
    none), `"all-linear"` every linear plus the experts, `[]` experts alone.

    Args:
        target_experts: which projections of every routed expert get an adapter: `"all"` (default), a list among
            `gate_up_proj` and `down_proj`, or `[]`/`None` for none.
        expert_r: rank of the expert adapters. Default: `r`. A rank of `r` divided by the number of active experts
            costs as many parameters a token as one dense adapter.
        expert_alpha: alpha of the expert adapters. Default: `lora_alpha`.
        expert_rank_pattern: regex of `"<module path>.<expert index>"` -> rank, for single experts or layers. A pattern
            that matches no expert is an error.
        expert_alpha_pattern: the same for alpha.
        expert_indices: which experts get an adapter: a list for all layers or `{layer: list}`; the others run frozen.
            Default: all. Adapting the most routed quarter loses little.
        split_gate_up: give gate and up an A each. Default: one A for the fused projection. Either way an adapter moves
            between stacked and listed experts.
        share_experts: `"outer"` shares over the experts the A of gate_up and the B of down. Default: nothing.
        experts_backend: `"auto"` (the fastest that is right on the device), `"triton"`, `"grouped_mm"`, or `"loop"`.
        dequantize: for quantized bases, `"recompute"` (default) rebuilds 16-bit weights in backward, `"cache"` keeps
            them. Without effect on 16-bit bases.
        format_version, layout: of the saved tensors; set by this package, checked when an adapter is read.
    """

    target_experts: str | list[str] | None = field(
        default="all",
        metadata={
            "help": "Expert projections to adapt: 'all', a list among gate_up_proj and down_proj, or [] for none."
        },
    )
    expert_r: int | None = field(default=None, metadata={"help": "Rank of the expert adapters; default: r."})
    expert_alpha: float | None = field(
        default=None, metadata={"help": "Alpha of the expert adapters; default: lora_alpha."}
    )
    expert_rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "Regex of '<module path>.<expert index>' -> rank."}
    )
    expert_alpha_pattern: dict[str, float] | None = field(
        default_factory=dict, metadata={"help": "Regex of '<module path>.<expert index>' -> alpha."}
    )
    expert_indices: list[int] | dict[int, list[int]] | None = field(
        default=None,
        metadata={"help": "Experts that get an adapter: a list for all layers, or {layer: list}; default: all."},
    )
    split_gate_up: bool = field(default=False, metadata={"help": "Separate A for gate and up."})
    share_experts: Literal["outer"] | None = field(
        default=None, metadata={"help": "'outer': one A of gate_up and one B of down for all experts."}
    )
    experts_backend: Literal["auto", "grouped_mm", "triton", "loop"] = field(
        default="auto", metadata={"help": "How grouped products run: 'auto', 'triton', 'grouped_mm' or 'loop'."}
    )
    dequantize: Literal["recompute", "cache"] = field(
        default="recompute",
        metadata={"help": "Quantized bases: rebuild 16-bit weights in backward, or keep them."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved tensors."})
    layout: str = field(default=LAYOUT, metadata={"help": "Layout of the saved tensors."})

    def __post_init__(self) -> None:
        self.file_shapes: dict[str, tuple[int, ...]] | None = None  # no field: not saved
        if type(vars(self).get("peft_type")) is str:  # no member of the enum: it comes from JSON
            check_types(type(self), vars(self))
        super().__post_init__()
        self.peft_type = peft_type()
        # `null` in a file, where PEFT asks for keys; and no tokens at all, of which it looks for the values.
        empty: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None}
        for option, nothing in empty.items():
            setattr(self, option, getattr(self, option) or nothing)
        self._check_format()
        check_input(self)
        self._normalise_targets()
        self._check_numbers()
        self._normalise_indices()
        if self.share_experts not in (None, "outer"):
            _fail("share_experts", self.share_experts, "is unknown; expected None or 'outer'")
        if self.share_experts and self.split_gate_up:
            _fail(
                "share_experts", self.share_experts, "shares the one A of gate_up, and `split_gate_up=True` makes two"
            )
        if self.experts_backend not in BACKENDS:
            _fail("experts_backend", self.experts_backend, f"is unknown; expected one of {', '.join(BACKENDS)}")
        if self.dequantize not in ("recompute", "cache"):
            _fail("dequantize", self.dequantize, "is unknown; expected 'recompute' or 'cache'")
        if self.target_experts:
            self._refuse_what_cannot_hold()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """See PEFT. Reads the header of the tensors beside the config too, where they are local.

        What does not fit can then be refused before the model is touched.
        """
        name, below = pretrained_model_name_or_path, subfolder or ""
        read = functools.partial(super().from_pretrained, name, subfolder, **kwargs)
        folder = adapter_home(name, below, kwargs)
        if folder is None:
            return read()  # which says what is not there
        config = checked(folder, read)
        file = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.lexists(file) and not os.path.isfile(file):
            raise ValueError(f"{file} is no file, or a link to none")  # from a pipe one would read without end
        if isinstance(config, cls) and os.path.isfile(file):
            entries, _ = read_header(file)
            check_adapter_tensors(file, entries)
            if config.trainable_token_indices and not any("trainable_tokens_delta" in key for key in entries):
                raise ValueError(f"{file}: the values of `trainable_token_indices` of its config are missing")
            config.file_shapes = {key: one.shape for key, one in entries.items()}
        else:
            check_pickle(name, below, kwargs)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """See PEFT. Adds to the model card beside it how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory, self)

    def to_dict(self) -> dict[str, Any]:
        """See PEFT. Patterns are written as pairs where the alphabet, by which PEFT sorts its JSON, would change their
        order: the first that matches counts.
        """
        found = super().to_dict()
        for option in ("expert_rank_pattern", "expert_alpha_pattern"):
            if list(found[option]) != sorted(found[option]):
                found[option] = [list(pair) for pair in found[option].items()]
        return found

    # --- checks --------------------------------------------------------------------------------------------------

    def _check_format(self) -> None:
        if not isinstance(self.format_version, int) or self.format_version < 1:
            _fail("format_version", self.format_version, f"is not a version; expected {FORMAT_VERSION}")
        if self.format_version > FORMAT_VERSION:
            _fail(
                "format_version",
                self.format_version,
                f"is newer than this version of peft-moe reads (up to {FORMAT_VERSION}): upgrade peft-moe",
            )
        if self.layout != LAYOUT:
            _fail("layout", self.layout, f"is unknown; expected {LAYOUT!r}")

    def _normalise_targets(self) -> None:
        found = self.target_experts
        if found is None or found == "all" or isinstance(found, str):
            found = list(TARGETS) if found == "all" else ([] if found is None else [found])
        unknown = sorted(set(found) - set(TARGETS))
        if unknown:
            _fail(
                "target_experts",
                self.target_experts,
                f"names unknown projections {unknown}; expected 'all' or a list among {', '.join(TARGETS)}",
            )
        if self.target_experts != "all":
            self.target_experts = [target for target in TARGETS if target in found]

    def _check_numbers(self) -> None:
        for option in ("expert_rank_pattern", "expert_alpha_pattern"):
            found = getattr(self, option) or {}
            pairs = found.items() if isinstance(found, dict) else found
            if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
                _fail(option, found, "is not a dict of pattern to value")
            setattr(self, option, dict(pairs))
            check_patterns(getattr(self, option), f"MoELoraConfig: `{option}`")
        ranks: dict[str, Any] = {"r": self.r, "expert_r": self.expert_r}
        rank_pattern, alpha_pattern = self.expert_rank_pattern or {}, self.expert_alpha_pattern or {}
        ranks |= {f"expert_rank_pattern[{key!r}]": value for key, value in rank_pattern.items()}
        for option, rank in ranks.items():
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0):
                _fail(option, rank, "is not a positive integer")
        alphas: dict[str, Any] = {"expert_alpha": self.expert_alpha}
        alphas |= {f"expert_alpha_pattern[{key!r}]": value for key, value in alpha_pattern.items()}
        for option, alpha in alphas.items():
            if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
                _fail(option, alpha, "is not a number")
        split: Any = self.split_gate_up
        if not isinstance(split, bool):
            _fail("split_gate_up", split, "is neither True nor False")

    def _normalise_indices(self) -> None:
        if self.expert_indices is None:
            return
        if isinstance(self.expert_indices, dict):  # JSON has only string keys
            if not all(str(key).isdecimal() for key in self.expert_indices):
                _fail("expert_indices", self.expert_indices, "has keys that are no layer numbers")
            by_layer = {int(key): self._indices(value) for key, value in self.expert_indices.items()}
            self.expert_indices = dict(sorted(by_layer.items()))
        else:
            self.expert_indices = self._indices(self.expert_indices)

    def _indices(self, values: Any) -> list[int]:
        if isinstance(values, str) or not isinstance(values, Iterable) or any(type(one) is not int for one in values):
            _fail("expert_indices", values, "is neither a list of integers nor a dict of layer to such a list")
        indices = sorted(values)
        if len(set(indices)) < len(indices):
            _fail("expert_indices", list(values), "names an expert twice")
        if indices and indices[0] < 0:
            _fail("expert_indices", list(values), "has a negative index")
        return indices

    def _refuse_what_cannot_hold(self) -> None:
        for option, reason in _REFUSED.items():
            value = getattr(self, option, None)
            if value is not None and value is not False and value != {} and value != []:
                raise ValueError(
                    f"MoELoraConfig: `{option}` cannot hold on experts: {reason}. Leave it out, or set "
                    "`target_experts=[]` to adapt linears alone."
                )
        init = self.init_lora_weights
        if isinstance(init, str):
            name = init.lower()
            if name not in _INITIALISATIONS and not re.fullmatch(r"pissa_niter_\d+", name):
                raise ValueError(
                    f"MoELoraConfig: `init_lora_weights={init!r}` is not implemented for experts; expected True, "
                    f"False, or one of {', '.join(_INITIALISATIONS)}, pissa_niter_<n>."
                )
            if self.share_experts and (name.startswith("pissa") or name == "olora"):
                raise ValueError(
                    f"MoELoraConfig: `init_lora_weights={init!r}` decomposes each expert's weight by itself, and "
                    f"`share_experts={self.share_experts!r}` gives them a common factor. Choose one."
                )

    # --- what a layer asks ---------------------------------------------------------------------------------------

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """The targeted projections, among `TARGETS`."""
        return TARGETS if self.target_experts == "all" else tuple(self.target_experts or ())

"""`BnbExpertsConfig`: what of bitsandbytes holds for routed experts too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..compat import QuantizationMethod

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")

#: Names under which transformers finds the quantizers, and which a saved `config.json` holds. They are not
#: bitsandbytes' own, so that no loader without this package reads packed experts as something else.
METHODS = {4: "bitsandbytes_experts_4bit", 8: "bitsandbytes_experts_8bit"}
_AUTO = "auto"


class BnbExpertsConfig(BitsAndBytesConfig):
    """A `BitsAndBytesConfig` that quantizes routed experts as well, stacked or listed, while a model loads.

    `AutoModelForCausalLM.from_pretrained(path, quantization_config=BnbExpertsConfig(load_in_4bit=True))`, or
    `quantize_experts(model, config)` for a model in memory. Everything that `BitsAndBytesConfig` takes holds; linears
    are quantized as it does, and `llm_int8_skip_modules` holds for experts too.

    Args:
        load_in_8bit, load_in_4bit: exactly one has to be true.
        experts_blocksize: elements of stacked experts that share a scale, one of `BLOCK_SIZES`; 4 bits only. Linears,
            also those of listed experts, keep 64.
        experts_only: leave every linear outside the experts in 16 bits.
        experts_compute_dtype: in which stacked experts multiply; `None`: `bnb_4bit_compute_dtype` where that was
            given, else the dtype of the model.
        skip_modules: the same as `llm_int8_skip_modules`.

    Raises `ValueError` for values that bitsandbytes does not offer.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        *args: Any,
        experts_blocksize: int = 64,
        experts_only: bool = False,
        experts_compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        stated = kwargs.get("bnb_4bit_compute_dtype")
        if skip_modules is not None:
            if kwargs.get("llm_int8_skip_modules") not in (None, skip_modules):
                raise ValueError(
                    "BnbExpertsConfig: `skip_modules` and `llm_int8_skip_modules` differ; give one of them"
                )
            kwargs["llm_int8_skip_modules"] = skip_modules
        kwargs.pop("quant_method", None)
        kwargs.pop("bits", None)
        self.experts_blocksize, self.experts_only = experts_blocksize, experts_only
        if experts_compute_dtype is None:
            experts_compute_dtype = _AUTO if stated is None or load_in_8bit else stated
        self.experts_compute_dtype = _dtype_name(experts_compute_dtype)
        super().__init__(load_in_8bit, load_in_4bit, *args, **kwargs)
        self.quant_method = METHODS[8 if self.load_in_8bit else 4]
        self._check_experts()

    def _check_experts(self) -> None:
        if not (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("BnbExpertsConfig: neither `load_in_4bit` nor `load_in_8bit` is set; set one of them")
        if self.experts_blocksize not in BLOCK_SIZES:
            raise ValueError(
                f"BnbExpertsConfig: `experts_blocksize` is {self.experts_blocksize}, expected one of {BLOCK_SIZES}"
            )
        if self.load_in_4bit and self.bnb_4bit_quant_type not in QUANT_TYPES:
            raise ValueError(
                f"BnbExpertsConfig: `bnb_4bit_quant_type` is {self.bnb_4bit_quant_type!r}, expected one of "
                f"{QUANT_TYPES}"
            )
        if self.load_in_8bit and self.llm_int8_has_fp16_weight:
            raise ValueError(
                "BnbExpertsConfig: `llm_int8_has_fp16_weight` keeps weights in 16 bits, which stacked experts cannot "
                "do. Leave it out, or load without quantization."
            )

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which stacked experts multiply; `None`: in the dtype of the model."""
        return None if self.experts_compute_dtype == _AUTO else getattr(torch, self.experts_compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: without the two flags by which transformers would take it for its own config."""
        output = super().to_dict()
        for name in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"):
            output.pop(name, None)
        bits = 8 if self.load_in_8bit else 4
        return {**output, "bits": bits, "quant_method": METHODS[bits]}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and what says which config this is."""
        default = BnbExpertsConfig(load_in_4bit=True).to_dict()
        always = ("bits", "quant_method")
        return {key: value for key, value in self.to_dict().items() if key in always or value != default.get(key)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a saved dict, see `to_dict`."""
        values = dict(config_dict)
        bits = values.pop("bits", 8 if values.get("load_in_8bit") else 4)
        values |= {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
        return super().from_dict(values, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def settings(self) -> PackSettings:
        """What decides how a tensor is packed."""
        return PackSettings(
            quant_type="int8" if self.load_in_8bit else self.bnb_4bit_quant_type,
            blocksize=self.experts_blocksize,
            nested=self.bnb_4bit_use_double_quant,
            storage=self.bnb_4bit_quant_storage,
            compute_dtype=self.compute_dtype,
        )


@dataclass(frozen=True)
class PackSettings:
    """How a tensor is packed: `quant_type` nf4, fp4 or int8, the rest for the 4-bit ones.

    `nested`: scales in 8 bits too. `storage`: dtype of the packed tensor. `compute_dtype`: see `PackedRecord`.
    """

    quant_type: str
    blocksize: int = 64
    nested: bool = False
    storage: torch.dtype = torch.uint8
    compute_dtype: torch.dtype | None = None


def stock_method() -> Any:
    """The method that transformers, PEFT and accelerate know a model quantized by bitsandbytes by."""
    return QuantizationMethod.BITS_AND_BYTES


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name != _AUTO and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"BnbExpertsConfig: `experts_compute_dtype` is {dtype!r}, expected a torch dtype or its name")
    return name

"""What belongs to a packed parameter and has to stay with its module: the statistics, the shape, the dtypes.

A parameter loses its Python attributes when it moves to another kind of device, when it is sharded, and when a tool
makes a new one of it. So a module keeps a record of each parameter that is packed, in `module.packed_weights`, and the
record writes itself into the module's state dict, under names that bitsandbytes would give them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bnb_codes import EightBit, FourBit, functional, library

RECORDS = "packed_weights"  # also read by `layouts.spec.logical_shape`
_INT8_STATE = "quant_state.peft_moe__int8"
#: Suffixes of all statistics that 4-bit weights can have; those of int8 linears, which stand beside `weight`.
FOUR_BIT_NAMES = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)  # fmt: skip
INT8_LINEAR_NAMES = ("SCB", "weight_format")


@dataclass
class Int8State:
    """The statistics of an int8 stack, which is held as `(rows, in)`.

    Attributes: SCB: fp32 `(rows,)`. shape, dtype: of what was quantized.
    """

    SCB: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def to(self, device: torch.device) -> None:
        """Move the statistics."""
        self.SCB = self.SCB.to(device)


@dataclass
class PackedRecord:
    """One packed parameter.

    Attributes: state: a `QuantState`, or `Int8State`. compute_dtype: in which the base multiplies; `None`: in the
    dtype of what was quantized.
    """

    state: Any
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the weights that were packed."""
        return torch.Size(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that were packed."""
        return self.state.dtype

    def codes(self, data: Tensor) -> FourBit | EightBit:
        """The codes of a packed tensor, with the statistics on its device. Raises `ValueError` if it was cast."""
        bytes_ = self.shape.numel() if isinstance(self.state, Int8State) else -(-self.shape.numel() // 2)
        if data.numel() * data.element_size() != bytes_:
            raise ValueError(
                f"a packed weight of shape {tuple(self.shape)} takes {bytes_} bytes, found {tuple(data.shape)} in "
                f"{data.dtype}: whatever moved it has cast its bytes, as accelerate does with bytes that are stored in "
                "a floating dtype. To offload packed experts, quantize them with `bnb_4bit_quant_storage=torch.uint8`."
            )
        statistics = self.state.SCB if isinstance(self.state, Int8State) else self.state.absmax
        if statistics.device != data.device and data.device.type != "meta":
            self.state.to(data.device)
        if isinstance(self.state, Int8State):
            return EightBit(data, self.state.SCB)
        return FourBit(data, self.state)

    def dense(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of a packed tensor, in the shape in which they were packed."""
        out = torch.empty(self.shape, dtype=dtype, device=data.device)
        self.codes(data).read(0, out.numel(), out)
        return out

    def statistics(self) -> dict[str, Tensor]:
        """What has to be saved with the packed tensor, by suffix of its key."""
        if not isinstance(self.state, Int8State):
            return self.state.as_dict(packed=True)
        facts = {"shape": tuple(self.state.shape), "dtype": str(self.state.dtype).removeprefix("torch.")}
        return {"SCB": self.state.SCB, _INT8_STATE: library().utils.pack_dict_to_tensor(facts)}


def statistics_names(quant_type: str, nested: bool) -> list[str]:
    """The suffixes under which the statistics are saved. Args: quant_type: `"nf4"`, `"fp4"` or `"int8"`."""
    if quant_type == "int8":
        return ["SCB", _INT8_STATE]
    names = ["absmax", "quant_map", f"quant_state.bitsandbytes__{quant_type}"]
    return [*names, "nested_absmax", "nested_quant_map"] if nested else names


def record_from(statistics: dict[str, Tensor], device: Any, compute_dtype: torch.dtype | None) -> PackedRecord:
    """The record of saved statistics. Raises `ValueError` if some are missing."""
    statistics = dict(statistics)
    if _INT8_STATE in statistics:
        facts = library().utils.unpack_tensor_to_dict(statistics[_INT8_STATE].cpu())
        if "SCB" not in statistics:
            raise ValueError(f"int8 statistics without SCB, found {sorted(statistics)}")
        shape, dtype = torch.Size(facts["shape"]), getattr(torch, facts["dtype"])
        return PackedRecord(Int8State(statistics["SCB"].to(device), shape, dtype), compute_dtype)
    states = [name for name in statistics if name.startswith("quant_state.bitsandbytes__")]
    if len(states) != 1 or "absmax" not in statistics or "quant_map" not in statistics:
        raise ValueError(
            f"expected 4-bit statistics (absmax, quant_map, quant_state.bitsandbytes__nf4 or __fp4) or int8 ones (SCB, "
            f"{_INT8_STATE}), found {sorted(statistics)}"
        )
    statistics[states[0]] = statistics[states[0]].cpu()
    return PackedRecord(functional().QuantState.from_dict(statistics, device=torch.device(device)), compute_dtype)


def record_of_linear(
    packed: Tensor, statistics: dict[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> PackedRecord:
    """The record of one linear's `(out, in)` weight, as bitsandbytes saves it.

    Args: dtype: of what was quantized; int8 statistics do not say it.

    Raises `ValueError` if statistics are missing, or do not fit the codes.
    """
    if packed.dtype != torch.int8 or "SCB" not in statistics:
        record = record_from(statistics, packed.device, compute_dtype)
        if -(-record.shape.numel() // 2) != packed.numel() * packed.element_size():
            raise ValueError(f"codes of shape {tuple(packed.shape)} do not hold a weight of {tuple(record.shape)}")
        return record
    scales, order = statistics["SCB"], int(statistics.get("weight_format", torch.tensor(0)))
    if order != 0 or scales.shape != packed.shape[:1]:
        raise ValueError(
            f"int8 codes of shape {tuple(packed.shape)} with scales {tuple(scales.shape)} in format {order}; expected "
            "a scale for each row, in format 0 (row by row)"
        )
    return PackedRecord(Int8State(scales.to(packed.device), packed.shape, dtype), compute_dtype)


def find_record(owner: Any, name: str) -> PackedRecord | None:
    """The record of a module's parameter; `None` if it is not packed."""
    record = getattr(owner, RECORDS, {}).get(name)
    if record is None:
        state = getattr(getattr(owner, name, None), "quant_state", None)
        return None if state is None else PackedRecord(state)
    # Tools that know bitsandbytes look at the parameter: keep what they see the same.
    parameter = getattr(owner, name)
    attribute, value = (
        ("SCB", record.state.SCB) if isinstance(record.state, Int8State) else ("quant_state", record.state)
    )
    if not _same(getattr(parameter, attribute, None), value):
        setattr(parameter, attribute, value if isinstance(value, Tensor) else _carried(value))
    return record


def _carried(state: Any) -> Any:
    from .bnb_state import carried

    return carried(state)


def _same(found: Any, state: Any) -> bool:
    """Whether a parameter has the tensors of the record, and (of 4 bits) not the record's own state."""
    if isinstance(state, Tensor) or found is None:
        return found is state
    return found is not state and found.absmax is state.absmax


def install(owner: nn.Module, name: str, parameter: nn.Parameter, record: PackedRecord) -> None:
    """Put a packed parameter and its record into a module, whose state dict then carries both."""
    if RECORDS not in vars(owner):
        owner.register_state_dict_post_hook(_save_records)
        owner.register_load_state_dict_pre_hook(_load_records)
    vars(owner).setdefault(RECORDS, {})[name] = record
    setattr(owner, name, parameter)
    find_record(owner, name)


def uninstall(owner: nn.Module, name: str, dense: Tensor) -> None:
    """Replace a packed parameter by a plain one."""
    getattr(owner, RECORDS, {}).pop(name, None)  # the hooks stay and find nothing to do
    setattr(owner, name, nn.Parameter(dense, requires_grad=False))


def _save_records(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, record in getattr(module, RECORDS, {}).items():
        if prefix + name in state_dict:
            packed = state_dict[prefix + name]
            if packed.is_floating_point() and type(packed.detach()) is Tensor:
                # Loaders cast what looks like numbers; bytes they leave alone.
                state_dict[prefix + name] = packed.detach().view(torch.uint8)
            for suffix, value in record.statistics().items():
                state_dict[f"{prefix}{name}.{suffix}"] = value.detach()


def _load_records(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """Before a state dict is copied in: take the statistics out of it, or say that they are missing."""
    for name, record in getattr(module, RECORDS, {}).items():
        start = f"{prefix}{name}."
        found = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        packed = state_dict.get(prefix + name)
        if packed is None:
            continue
        data = getattr(module, name)
        if packed.dtype == torch.uint8 and data.is_floating_point():
            packed = state_dict[prefix + name] = packed.view(data.dtype)
        if packed.shape != data.shape or packed.dtype != data.dtype:
            error_msgs.append(
                f"{prefix}{name} is packed here as {tuple(data.shape)} in {data.dtype}, found {tuple(packed.shape)} in "
                f"{packed.dtype}: load it into a model that is quantized in the same way"
            )
            state_dict.pop(prefix + name)
            continue
        try:
            record.state = record_from(found, data.device, record.compute_dtype).state
        except ValueError as error:
            error_msgs.append(f"{prefix}{name}: {error}; packed weights mean nothing without them")


def saved_state(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A copy of packed bytes and statistics, bit for bit."""
    return data.detach().as_subclass(torch.Tensor).clone(), copy.deepcopy(state)  # type: ignore[arg-type]

"""The readers that are fuzzed: one function each. It raises `Wrong` if what it accepts is not what the bytes say.

An input may be refused with a `ValueError` or an `OSError` that says of which file or option. What is accepted has to
be right: it is compared with what safetensors' own loader and plain JSON make of the same bytes.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from peft_moe import MoELoraConfig, export_adapter, import_adapter, merge_checkpoint
from peft_moe.checkpoint.header import read_header
from peft_moe.checkpoint.merge.binding import AdapterFiles
from peft_moe.checkpoint.merge.skeleton import skeletons
from peft_moe.checkpoint.tensor_file import TensorFile
from peft_moe.cli.contents import describe_adapter
from tests.fuzz.oracle import merged, tensors_of
from tests.fuzz.seeds import CONFIG, TENSORS, stock_format

_SIMILAR = 1e-4
_LARGE = 1e15  # beyond this sums of squares leave fp32, and two ways of adding differ at will


class Wrong(Exception):
    """What was accepted is not what the bytes say."""


class Setting:
    """What all inputs of a process share. Args: folder: of the seeds, and of `adapter` and `changed`, the input."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.model = folder, model
        self.adapter, self.base = folder / "adapter", folder / "changed"
        self.stock_format = stock_format(model)
        self.skeleton = next(skeletons(folder / "base", False))

    def shards(self) -> list[Path]:
        """The base's files as they are now."""
        return sorted(self.base.glob("*.safetensors"))


def header(setting: Setting) -> None:
    """`read_header`, of the adapter and of the base."""
    for path in (setting.adapter / TENSORS, *setting.shards()):
        entries, metadata = read_header(path)
        wanted = tensors_of(path)
        if {key: one.shape for key, one in entries.items()} != {key: tuple(one.shape) for key, one in wanted.items()}:
            raise Wrong("shapes")
        if any(one.dtype is not None and one.dtype != wanted[key].dtype for key, one in entries.items()):
            raise Wrong("dtypes")
        if not all(isinstance(one, str) for pair in metadata.items() for one in pair):
            raise Wrong("metadata")


def tensors(setting: Setting) -> None:
    """`TensorFile.read`, whole and by rows, and `chunks`."""
    for path in (setting.adapter / TENSORS, *setting.shards()):
        file, wanted = TensorFile(path), tensors_of(path)
        if file.entries.keys() != wanted.keys():
            raise Wrong("keys")
        for key, value in wanted.items():
            _same(file.read(key), value, key)
            if value.dim() and value.shape[0] > 1:
                _same(torch.cat([file.read(key, 0, 1), file.read(key, 1)]), value, key)
            if b"".join(file.chunks(key)) != value.contiguous().view(-1).view(torch.uint8).numpy().tobytes():
                raise Wrong(f"chunks of {key}")


def config(setting: Setting) -> None:
    """`MoELoraConfig.from_pretrained`."""
    found = MoELoraConfig.from_pretrained(str(setting.adapter))
    said = json.loads((setting.adapter / CONFIG).read_text())
    for option in (
        "r",
        "lora_alpha",
        "expert_r",
        "expert_alpha",
        "use_dora",
        "use_rslora",
        "split_gate_up",
        "share_experts",
    ):
        if option in said and hasattr(found, option) and getattr(found, option) != said[option]:
            raise Wrong(f"{option} is {getattr(found, option)!r}, the file says {said[option]!r}")


def bind(setting: Setting) -> None:
    """`AdapterFiles.bind`: the tensors of the adapter against the parameters of the model."""
    files = AdapterFiles(setting.adapter)
    changes = files.bind(setting.skeleton)
    if bool(changes) != bool(files.tensors.entries):
        raise Wrong("tensors that change nothing")


def inspect(setting: Setting) -> None:
    """`peft-moe inspect` of an adapter."""
    found = describe_adapter(setting.adapter)
    if found["tensors"] != len(tensors_of(setting.adapter / TENSORS)):
        raise Wrong("number of tensors")
    json.dumps(found)


def load(setting: Setting) -> None:
    """`PeftModel.from_pretrained`: every tensor of the file is in the model."""
    if _kind(setting) not in ("MOELORA", None):
        raise ValueError(f"{CONFIG}: not this package's")  # PEFT reads it alone
    model = PeftModel.from_pretrained(copy.deepcopy(setting.model), setting.adapter)
    held, wanted = model.state_dict() | get_peft_model_state_dict(model), tensors_of(setting.adapter / TENSORS)
    for key, value in wanted.items():
        if key not in held:
            raise Wrong(f"{key} is not in the model")
        _same(held[key].float(), value.float(), key)


def merge(setting: Setting) -> None:
    """`merge_checkpoint`, written and read again."""
    out = setting.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    merge_checkpoint(setting.base, setting.adapter, out, progress=False, device="cpu")
    before = {key: one for path in setting.shards() for key, one in tensors_of(path).items()}
    after = {key: one for path in out.glob("*.safetensors") for key, one in tensors_of(path).items()}
    wanted = merged(before, setting.adapter)
    if after.keys() != wanted.keys():
        raise Wrong(f"keys {sorted(after.keys() ^ wanted.keys())[:3]}")
    for key, value in wanted.items():
        if before[key].is_floating_point() and _comparable(value, before[key]):
            error = (after[key].double() - value.to(after[key].dtype).double()).abs()
            if bool((error > _SIMILAR * value.abs().max().clamp(min=1)).any()):
                raise Wrong(f"{key} differs by {float(error.max())}")


def convert(setting: Setting) -> None:
    """`import_adapter` and `export_adapter`: to the other layout and back, bit for bit but for kinds of NaN."""
    there, back = setting.folder / "there", setting.folder / "back"
    for path in (there, back):
        shutil.rmtree(path, ignore_errors=True)
    options: dict[str, Any] = {"base": setting.folder / "base", "progress": False}
    if _kind(setting) == "MOELORA":
        export_adapter(setting.adapter, there, format=setting.stock_format, **options)
        returning: Any = import_adapter
    else:
        import_adapter(setting.adapter, there, **options)
        returning = export_adapter
    try:
        returning(there, back, format=setting.stock_format, **options)
    except ValueError as error:
        raise Wrong(f"does not come back: {error}") from error
    wanted, found = (tensors_of(path / TENSORS) for path in (setting.adapter, back))
    if found.keys() != wanted.keys():
        raise Wrong(f"keys {sorted(found.keys() ^ wanted.keys())[:3]}")
    for key, value in wanted.items():
        _same(_quiet(found[key]), _quiet(value), key)


def served(setting: Setting) -> None:
    """`import_adapter` of what servers load: merged, it is what the file says."""
    there = setting.folder / "there"
    shutil.rmtree(there, ignore_errors=True)
    if _kind(setting) == "MOELORA":
        raise ValueError(f"{CONFIG}: this package's own")  # tensors of one adapter, config of another
    base = setting.folder / "base"
    import_adapter(setting.adapter, there, base=base, progress=False)
    before = {key: one for path in base.glob("*.safetensors") for key, one in tensors_of(path).items()}
    found, wanted = merged(before, there), merged(before, setting.adapter)
    if found.keys() != wanted.keys():
        raise Wrong(f"keys {sorted(found.keys() ^ wanted.keys())[:3]}")
    for key, value in wanted.items():
        if _comparable(value, before[key]):
            error = (found[key] - value).abs()
            if bool((error > _SIMILAR * value.abs().max().clamp(min=1)).any()):
                raise Wrong(f"{key} differs by {float(error.max())}")


READERS: dict[str, Callable[[Setting], None]] = {
    "header": header,
    "tensors": tensors,
    "config": config,
    "bind": bind,
    "inspect": inspect,
    "load": load,
    "merge": merge,
    "convert": convert,
    "served": served,
}


def outcome(reader: str, setting: Setting) -> str:
    """What a reader makes of the input: `right`, `refused`, or another word and what happened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader](setting)
    except (ValueError, OSError) as error:
        clear = _says_where(str(error), setting) or (reader == "load" and _kind(setting) is None)
        return "refused" if clear else f"unclear: {type(error).__name__}: {str(error)[:300]}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        if reader == "load" and _kind(setting) is None:
            return "refused"  # by PEFT, before it could know whose adapter this is
        return f"leaked: {type(error).__name__}: {str(error)[:300]}"
    return "right"


def _says_where(message: str, setting: Setting) -> bool:
    names = (
        str(setting.folder),
        "adapter_",
        "adapter 'default'",
        "adapter 'adapter'",
        "LoraConfig: `",
        "model.layers.",
        "lm_head",
        "embed_tokens",
    )
    return any(name in message for name in names)


def _kind(setting: Setting) -> Any:
    """The type that the config states; `None` where PEFT cannot read it."""
    try:
        return json.loads((setting.adapter / CONFIG).read_text())["peft_type"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _same(found: Tensor, wanted: Tensor, key: str) -> None:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        raise Wrong(f"{key}: {found.dtype} {tuple(found.shape)}")
    one, other = (x.contiguous().view(-1).view(torch.uint8) for x in (found, wanted))
    if not torch.equal(one, other):
        raise Wrong(f"{key}: other values")


def _quiet(value: Tensor) -> Tensor:
    """With one NaN for all: multiplying with a scaling, and dividing by it, makes quiet ones of signalling ones."""
    return value.where(~value.isnan(), torch.nan) if value.is_floating_point() else value


def _comparable(value: Tensor, before: Tensor) -> bool:
    sizes = torch.stack([value.abs().max(), before.double().abs().max()])
    return bool(torch.isfinite(sizes).all() and sizes.max() < _LARGE)

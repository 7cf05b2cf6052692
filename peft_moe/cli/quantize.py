"""`peft-moe quantize`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import AsJson, TrustRemoteCode, command, facts, size


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe quantize Qwen/Qwen3-30B-A3B qwen3-nf4",
        "peft-moe quantize base base-int8 --type int8 --experts-only",
    )
    def quantize(
        model: Annotated[str, typer.Argument(help="Checkpoint in 16 bits: a folder, or a name on the hub.")],
        out: Annotated[str, typer.Argument(help="New folder.")],
        kind: Annotated[str, typer.Option("--type", help="nf4, fp4 or int8.")] = "nf4",
        double: Annotated[bool, typer.Option("--double", help="Quantize the scales too (4 bits).")] = False,
        blocksize: Annotated[int, typer.Option(help="Elements of stacked experts that share a scale (4 bits).")] = 64,
        experts_only: Annotated[bool, typer.Option("--experts-only", help="Leave other linears in 16 bits.")] = False,
        skip: Annotated[list[str] | None, typer.Option(help="What stays in 16 bits; may be given again.")] = None,
        dtype: Annotated[str, typer.Option(help="Of what is not quantized: bfloat16, float16, float32.")] = "bfloat16",
        device: Annotated[str | None, typer.Option(help="Where it is quantized; a GPU if there is one.")] = None,
        trust_remote_code: TrustRemoteCode = False,
        as_json: AsJson = False,
    ) -> Any:
        """Quantize a model, its experts included, with bitsandbytes, and save it."""
        result = quantize_checkpoint(
            model, Path(out), kind, double, blocksize, experts_only, list(skip or ()), dtype, device, trust_remote_code
        )
        if not as_json:
            facts({"written": f"{out}: {size(result['bytes'])}, {kind}", "load with": "`import peft_moe` before"})
        return result


def quantize_checkpoint(
    model: str, out: Path, kind: str, double: bool, blocksize: int, experts_only: bool, skip: list[str], dtype: str,
    device: str | None, trust_remote_code: bool,
) -> dict[str, Any]:  # fmt: skip
    """Load with `BnbExpertsConfig`, save under a temporary name, rename. Raises `ValueError`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..checkpoint.device import usable_device
    from ..checkpoint.durable import copy_file, sync_directory
    from ..checkpoint.merge import float_dtype
    from ..checkpoint.merge.sidecar import other_files
    from ..compat import cached_file, model_class
    from ..quantize import BnbExpertsConfig

    if kind not in ("nf4", "fp4", "int8"):
        raise ValueError(f"--type {kind!r} is none of nf4, fp4 and int8")
    if out.exists():
        raise ValueError(f"{out} exists: name a new folder")
    bits: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double,
        "experts_blocksize": blocksize,
    }  # fmt: skip
    config = BnbExpertsConfig(**bits, experts_only=experts_only, skip_modules=skip or None)
    kept, where = float_dtype(dtype), usable_device(device)
    stated = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    packed = getattr(stated, "quantization_config", None)
    if packed is not None:  # transformers would keep that and pass over what is asked for here
        raise ValueError(
            f"{model} is quantized already ({dict(packed).get('quant_method')!r}): name the checkpoint in 16 bits that "
            "it was made of"
        )
    own_code = not type(stated).__module__.startswith("transformers.")
    names = () if own_code else stated.architectures or ()
    named = next((found for found in map(model_class, names) if found is not None), None)
    options = {"quantization_config": config, "dtype": kept, "device_map": where}
    if named is not None:  # of a model that sees the causal LM is a part, which would be all that is saved
        loaded = named.from_pretrained(model, **options)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    loaded.save_pretrained(temporary)
    config_file = cached_file(model, "config.json", local_files_only=True)
    assert config_file is not None  # the model was just loaded
    folder = Path(config_file).parent
    copied = [name for name in other_files(folder) if not (temporary / name).exists()]
    for name in copied:
        copy_file(folder / name, temporary / name)
    written = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))
    os.replace(temporary, out)
    sync_directory(out.parent)
    return {"path": str(out), "type": kind, "bytes": written, "copied": [str(name) for name in copied]}

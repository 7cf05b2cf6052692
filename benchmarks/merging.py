"""How much memory and time a merge takes on disk, against loading the model and merging it in memory.

    python benchmarks/merging.py
    python benchmarks/merging.py --layers 4 --hidden 512 --ways bf16 memory

A synthetic Qwen3-MoE, in bf16 and in FP8, a shard for each layer, with an adapter of rank 16 on attention and all
experts. Each way in a process of its own, on a CPU. Columns, in MiB: `base` and `result` on disk; `peak`, the most
memory that the process held (`ru_maxrss`) above what it held after a merge of a tiny model; its `share` of `result`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import MIB, SMALL, largest, memory, write

WAYS = {
    "bf16": "bf16, `merge_checkpoint`",
    "fp8": "FP8 to bf16, `merge_checkpoint`",
    "fp8-requantized": "FP8, `merge_checkpoint(requantize=True)`",
    "memory": "bf16, `from_pretrained` and `merge_and_unload`, without saving",
}


def write_adapter(base: Path, folder: Path, rank: int) -> None:
    """A random adapter for a checkpoint, of whose model no weight is held."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from peft_moe import MoELoraConfig
    from peft_moe.checkpoint.merge.skeleton import skeletons

    config = MoELoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(next(skeletons(base, False)), config)
    torch.manual_seed(1)
    shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
    folder.mkdir()
    tensors = {key: torch.randn(shape).mul_(0.02).bfloat16() for key, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def prepare(folder: Path, sizes: dict[str, int], rank: int) -> None:
    """Write all checkpoints and adapters."""
    for name, chosen in (("", sizes), ("small-", SMALL)):
        for kind in ("bf16", "fp8"):
            write(folder / f"{name}{kind}", chosen, kind == "fp8")
        write_adapter(folder / f"{name}bf16", folder / f"{name}adapter", rank)


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run(way: str, base: Path, adapter: Path, out: Path) -> None:
    """One merge, in this process."""
    from peft_moe import merge_checkpoint

    if way == "memory":
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return
    merge_checkpoint(base, adapter, out, requantize=way == "fp8-requantized", device="cpu", progress=False)


def child(way: str, folder: Path) -> dict[str, Any]:
    """What one way takes. A tiny merge goes before it, so that what libraries allocate on first use is not counted."""
    kind = "fp8" if way.startswith("fp8") else "bf16"
    run(way, folder / f"small-{kind}", folder / "small-adapter", folder / f"small-out-{way}")
    start, before = memory("VmRSS") or largest(), largest()
    began = time.perf_counter()
    out = folder / f"out-{way}"
    run(way, folder / kind, folder / "adapter", out)
    seconds, peak = time.perf_counter() - began, largest()
    result = size(out if out.exists() else folder / kind)
    return {
        "way": way, "base": size(folder / kind) / MIB, "result": result / MIB, "seconds": seconds,
        "peak": (peak - (start if peak > before else before)) / MIB,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Write the checkpoints, run each way in a process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 16), ("hidden", 1024), ("inner", 512), ("experts", 64), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder, removed at the end)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        prepare(options.folder, **json.loads(options.write))
        return []
    if options.child:
        found = child(options.child, options.folder)
        print(json.dumps(found))
        return [found]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        # In a process of its own: one starts with the `ru_maxrss` of the one that started it.
        task = json.dumps({"sizes": {name: getattr(options, name) for name in SMALL}, "rank": options.rank})
        here = [sys.executable, __file__, "--folder", temporary]
        subprocess.run([*here, "--write", task], check=True)
        for way in options.ways:
            printed = subprocess.run([*here, "--child", way], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(printed.stdout.splitlines()[-1]))
    print("| merged | base | result | peak | share | seconds |\n|---|---|---|---|---|---|")
    for row in rows:
        share = 100 * row["peak"] / row["result"]
        print(
            f"| {WAYS[row['way']]} | {row['base']:.0f} | {row['result']:.0f} | {row['peak']:.0f} | {share:.0f} % "
            f"| {row['seconds']:.1f} |"
        )
    return rows


if __name__ == "__main__":
    main()

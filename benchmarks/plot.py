"""Draw time and memory of an experts block against the number of tokens: of the first shape and rank in a file.

python benchmarks/block.py --out block.json && python benchmarks/plot.py block.json docs/block.png
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"qwen3-30b": "Qwen3-30B-A3B"}
LABELS = {
    "frozen": "transformers, frozen, no LoRA", "peft": "PEFT target_parameters", "peft-moe": "peft-moe",
    "peft-moe:grouped_mm": "peft-moe without its kernels", "plain": "plain grouped_mm", "unsloth": "Unsloth",
    "axolotl": "Axolotl",
}  # fmt: skip
STYLES = {
    "frozen": ("0.45", "--"), "peft": ("#c44e52", "-"), "peft-moe": ("#1f6fb4", "-"),
    "peft-moe:grouped_mm": ("#8db8de", "-"), "plain": ("0.7", "-"), "unsloth": ("#55a868", "-"),
    "axolotl": ("#dd8452", "-"),
}  # fmt: skip


def floor_ms(tokens: int, experts: int = 128, top_k: int = 8, width: int = 2048, inner: int = 768) -> float:
    """The least an H200 can take: its products at 790 TFLOP/s, or the weights read twice at 4.3 TB/s."""
    weights = 3 * width * inner
    flops, moved = 2 * 2 * tokens * top_k * weights, 2 * 2 * experts * weights
    return 1e3 * max(flops / 790e12, moved / 4.3e12)


def title_of(settings: dict[str, Any]) -> str:
    """What was measured; files from before there were settings hold single steps, forward and backward."""
    words = ["Forward" if settings.get("forward_only") else "Forward and backward"]
    return ", ".join([*words, *(word for word in ("queued", "zipf") if settings.get(word))])


def has_floor(shape: str, machine: str, settings: dict[str, Any]) -> bool:
    """Whether `floor_ms` is of this GPU, block and step, and the routing reaches all experts."""
    skipped = settings.get("forward_only") or settings.get("zipf")
    return shape == "qwen3-30b" and "H200" in machine and not skipped


def main(source: Path, target: Path) -> None:
    """Read the rows that `block.py --out` wrote, write a PNG."""
    data = json.loads(source.read_text())
    settings = data.get("settings", {})
    if not data["rows"]:
        sys.exit(f"{source}: nothing was timed, there is nothing to draw")
    shape, rank = data["rows"][0]["shape"], data["rows"][0]["rank"]
    rows = [row for row in data["rows"] if (row["shape"], row["rank"]) == (shape, rank)]
    others = sorted({f"{row['shape']}, r={row['rank']}" for row in data["rows"]} - {f"{shape}, r={rank}"})
    if others:
        print(f"{target} shows {shape}, r={rank}; not drawn: {'; '.join(others)}")
    series = defaultdict(list)
    for row in rows:
        series[row["contender"]].append((row["tokens"], row["ms"], row["peak_mib"]))
    # There is no peak on a CPU: null, in older files NaN.
    measured = not any(row["peak_mib"] is None or math.isnan(row["peak_mib"]) for row in rows)
    figure, axes = plt.subplots(1, 1 + measured, figsize=(10, 4.4), constrained_layout=True, squeeze=False)
    time, memory = axes[0, 0], axes[0, -1]
    for name, points in series.items():
        tokens, milliseconds, peak = zip(*sorted(points), strict=True)
        color, style = STYLES.get(name, ("0.2", ":"))
        time.plot(tokens, milliseconds, style, color=color, marker="o", markersize=4, label=LABELS.get(name, name))
        if measured:
            memory.plot(tokens, peak, style, color=color, marker="o", markersize=4)
    ticks = sorted({row["tokens"] for row in rows})
    if has_floor(shape, data["machine"], settings):
        time.plot(ticks, [floor_ms(tick) for tick in ticks], ":", color="black", label="floor")
    titles = [(time, title_of(settings), "ms"), (memory, "Peak above the weights", "MiB")]
    for axis, title, unit in titles[: 1 + measured]:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("tokens")
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"One experts block of {NAMES.get(shape, shape)}, r={rank}, {data['machine']}")
    figure.savefig(target, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What `enable_grouped_experts` did, block by block, and why a block was left alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockReport:
    """What was found of one block.

    Attributes:
        name: path of its experts. block: class of the block (of the stacked experts).
        grouped: whether it runs grouped now. reason: why it does not, or what it waits for; empty if it does.
        enabled: whether it will run grouped as soon as the reason is gone. new: whether this call enabled it.
    """

    name: str
    block: str
    grouped: bool
    reason: str = ""
    enabled: bool = True
    new: bool = False


@dataclass(frozen=True)
class GroupedReport:
    """What `enable_grouped_experts` did, block by block."""

    blocks: tuple[BlockReport, ...]

    @property
    def grouped(self) -> list[str]:
        """Paths of the experts that run grouped."""
        return [one.name for one in self.blocks if one.grouped]

    @property
    def left_alone(self) -> dict[str, str]:
        """Path -> reason of the experts that do not."""
        return {one.name: one.reason for one in self.blocks if not one.grouped}

    def __str__(self) -> str:
        lines = [f"{len(self.grouped)} of {len(self.blocks)} blocks run their frozen experts grouped"]
        lines += [
            f"  {one.name} ({one.block}): {'waits: ' if one.enabled else ''}{one.reason}"
            for one in self.blocks
            if not one.grouped
        ]
        return "\n".join(lines)

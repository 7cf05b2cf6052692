"""Input number n of a seed: always the same files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tests.fuzz import mutate
from tests.fuzz.seeds import ADAPTERS, CONFIG, INDEX, NOTED, SERVED, STOCK, TENSORS

#: kind -> how often, and which readers see such inputs besides those of all
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "header bytes": (14, ("header", "tensors", "inspect")),
    "header structure": (30, ("header", "tensors", "bind", "inspect")),
    "tensor bytes": (6, ("header", "tensors", "bind", "inspect")),
    "length of the file": (6, ("header", "tensors")),
    "config bytes": (10, ("config", "bind", "inspect")),
    "config structure": (30, ("config", "bind", "inspect")),
    "files of two adapters": (3, ("header", "config", "bind", "inspect", "load", "merge")),
    "header and config": (5, ("config", "bind", "inspect")),
    "note of an export": (6, ("header", "inspect", "convert")),
    "shards": (8, ("header", "tensors", "merge")),
    "index": (5, ("merge",)),
    "config of the base": (3, ("merge",)),
}
EVERY = 6  # the slow readers see each input of this many anyhow


class Inputs:
    """Args: folder: with the seeds; `adapter` and `changed` (the base) are remade in it for each input."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.names = [*ADAPTERS, *STOCK, *SERVED]
        self.files = {
            path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        self.dirty = True

    def prepare(self, number: int) -> tuple[str, list[str]]:
        """Write an input. Returns its kind and the readers that are to see it."""
        rng = random.Random(f"{self.seed}:{number}")
        kind = rng.choices([*KINDS], [weight for weight, _ in KINDS.values()])[0]
        readers = list(KINDS[kind][1])
        name, other = rng.choice(NOTED if kind == "note of an export" else self.names), rng.choice(self.names)
        config, tensors = self.seed_of(name, CONFIG), self.seed_of(name, TENSORS)
        start = 8 + int.from_bytes(tensors[:8], "little")
        base: dict[str, bytes] = {}
        if kind == "header bytes":
            tensors = mutate.some_bytes(rng, tensors, 0, start)
        elif kind == "header structure":
            tensors = mutate.header(rng, tensors)
        elif kind == "tensor bytes":
            body = bytearray(tensors)
            for _ in range(rng.choice((1, 2, 8, 64))):
                body[rng.randrange(start, len(body))] = rng.randrange(256)
            tensors = bytes(body)
        elif kind == "length of the file":
            tensors = mutate.cut_or_grown(rng, tensors)
        elif kind == "config bytes":
            config = mutate.some_bytes(rng, config)
        elif kind == "config structure":
            config = mutate.json_text(rng, json.loads(config))
        elif kind == "files of two adapters":
            config = self.seed_of(other, CONFIG)
        elif kind == "header and config":
            tensors, config = mutate.header(rng, tensors), mutate.json_text(rng, json.loads(config))
        elif kind == "note of an export":
            tensors = mutate.note(rng, tensors)
        else:
            base = self._base(rng, kind)
        if number % EVERY == 0 or kind == "tensor bytes":
            readers += [one for one in ("load", "merge", "convert") if one not in readers]
        if name in SERVED:
            readers = [one for one in readers if one != "convert"] + ([] if base else ["served"])
        self.write({CONFIG: config, TENSORS: tensors}, base)
        return kind, readers

    def seed_of(self, name: str, file: str) -> bytes:
        """A file of a seed."""
        return self.files[Path(name) / file]

    def _base(self, rng: random.Random, kind: str) -> dict[str, bytes]:
        shards = sorted(
            str(path.name) for path in self.files if path.parts[0] == "base" and path.suffix == ".safetensors"
        )
        if kind == "shards":
            name = rng.choice(shards)
            data = self.seed_of("base", name)
            if rng.random() < 0.2:
                return {name: mutate.cut_or_grown(rng, data)}
            if rng.random() < 0.3:
                return {name: mutate.some_bytes(rng, data, 0, 8 + int.from_bytes(data[:8], "little"))}
            return {name: mutate.header(rng, data)}
        name = INDEX if kind == "index" else "config.json"
        data = self.seed_of("base", name)
        if rng.random() < 0.3:
            return {name: mutate.some_bytes(rng, data)}
        content = json.loads(data)
        if kind == "index" and rng.random() < 0.5:
            key = rng.choice([*content["weight_map"]])
            content["weight_map"][key] = rng.choice(
                ("../stock/adapter_model.safetensors", str(self.folder / "stock" / TENSORS), "/dev/zero", "config.json",
                 "..", "", "\x00", "adapter_model.bin", rng.choice(shards), rng.choice(shards).upper())
            )  # fmt: skip
            return {name: json.dumps(content).encode()}
        return {name: mutate.json_text(rng, content)}

    def write(self, adapter: dict[str, bytes], base: dict[str, bytes]) -> None:
        """Put these files of the adapter in place, and a base with these of its files changed."""
        (self.folder / "adapter").mkdir(exist_ok=True)
        for name, data in adapter.items():
            (self.folder / "adapter" / name).write_bytes(data)
        if self.dirty:
            shutil.rmtree(self.folder / "changed", ignore_errors=True)
            shutil.copytree(self.folder / "base", self.folder / "changed")
        for name, data in base.items():
            (self.folder / "changed" / name).write_bytes(data)
        self.dirty = bool(base)

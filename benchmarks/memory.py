"""Count the memory and the operations of a training step of each preset, without a GPU.

The step runs on meta tensors, which have shapes and no values: denoising loss, backward, Adam and
the weight average, in float32. The peak is that of all storages alive at once, without the
allocator's rounding and the workspaces of kernels: leave a tenth of the memory free. The second
column is with activation checkpointing. Operations are those of convolutions and matrix products.

    python benchmarks/memory.py
    python benchmarks/memory.py edm-cifar10-ddpmpp --batch 64
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from diffusionkit import ScoreMatching

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "images"))
import presets

# Presets of the table, and the batch of one GPU; the other presets have the same networks.
BATCHES = {
    "score-sde-cifar10-ncsnpp-ve": 128,
    "score-sde-cifar10-ncsnpp-deep-ve": 128,
    "score-sde-cifar10-ddpmpp-vp": 128,
    "score-sde-cifar10-ddpmpp-deep-vp": 128,
    "score-sde-celebahq256-ncsnpp-ve": 8,
    "score-sde-celebahq1024-ncsnpp-ve": 1,
    "improved-ddpm-cifar10-cosine-hybrid": 128,
    "improved-ddpm-imagenet64-cosine-hybrid": 32,
    "improved-ddpm-imagenet64-conditional": 32,
    "edm-cifar10-ddpmpp": 128,
    "edm-cifar10-ncsnpp": 128,
    "small-images": 128,
    "glyphs": 64,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A count of the bytes of all storages that are alive, and of operations.

    torch's FlopCounterMode holds graphs that have been freed, which would count as memory.

    Attributes:
        now: the bytes at the moment.
        peak: the most so far.
        flop: the operations so far.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flop = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, value: Any) -> None:
        """Count the storages of all tensors in a value."""
        for tensor in tree_leaves(value):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        self.add(result)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        return result


class Step(NamedTuple):
    """The cost of a training step."""

    parameters: int
    gib: float
    tflop: float


def training_step(name: str, batch: int, *, checkpointing: bool) -> Step:
    """Return the cost of a training step of a preset."""
    change = f"run.activation_checkpointing={str(checkpointing).lower()}"
    settings = presets.load(name, [change])
    data = settings["data"]
    with torch.device("meta"):
        parts = presets.build(settings)
        x = torch.zeros(batch, data["channels"], data["size"], data["size"])
        given: dict[str, Any] = {"t": torch.full((batch,), 0.5)}
        if parts.augmentation is not None:
            given["condition"] = torch.zeros(batch, 9)
        if data["classes"]:
            given["class_labels"] = torch.zeros(batch, dtype=torch.long)
    parameters = list(parts.model.parameters())
    counter = Counter()
    with counter:
        counter.add([*parts.model.state_dict().values(), x])
        average = presets.average(settings, parts.model)
        optimizer = presets.optimizer(settings, parameters)
        for _ in range(2):  # the first step makes the state of the optimizer
            gc.collect()  # of tensors in cycles, which would count twice
            ScoreMatching()(parts.model, x, **given).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            average.update(parts.model)
    count = sum(p.numel() for p in parts.network.parameters())
    return Step(count, counter.peak / 2**30, counter.flop / 2e12)


def fits(step: Step, batch: int, card: float) -> int:
    """Return the largest power of two as batch that fits on a GPU with so many GiB, or 0."""
    gib = step.parameters / 2**30
    # At the peak there are weights, average and two moments; later also gradients.
    each = (step.gib - 16 * gib) / batch
    free = 0.9 * card - 20 * gib
    return 2 ** int(math.log2(free / each)) if free >= each else 0


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", help="names; those of different networks by default")
    parser.add_argument("--batch", type=int, help="the batch of one GPU")
    options = parser.parse_args(arguments)
    print("| preset | parameters | batch | GiB | checkpointed | TFLOP | on 80 GiB | on 24 GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.presets or BATCHES:
        batch = options.batch or BATCHES.get(name, 128)
        plain, saving = (training_step(name, batch, checkpointing=c) for c in (False, True))
        large, small = (f"{fits(plain, batch, card)} ({fits(saving, batch, card)})"
                        for card in (80, 24))  # fmt: skip
        print(
            f"| {name} | {plain.parameters / 1e6:.1f}M | {batch} | {plain.gib:.1f} | "
            f"{saving.gib:.1f} | {plain.tflop:.1f} ({saving.tflop:.1f}) | {large} | {small} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

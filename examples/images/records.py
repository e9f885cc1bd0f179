"""The log of a training run: a progress line, log.jsonl and TensorBoard; changes of settings."""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

MAY_CHANGE = ("preset", "data.source", "training.steps", "run.")  # within a run


class Log:
    """The log of a run: means over the steps since the last line, printed and appended to a file.

    Lines of steps after the one that the run resumes from are removed, since those steps are
    repeated.

    Args:
        out: the folder of the run.
        step: the number of steps taken before.
        steps: the number of steps of the whole run.
        batch: the number of images of a step.
    """

    def __init__(self, out: Path, step: int, steps: int, batch: int) -> None:
        self.path, self.steps, self.batch = out / "log.jsonl", steps, batch
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            whole = self.path.with_suffix(".tmp")  # a full disk must not take the old lines
            whole.write_text("".join(line for line in lines if 0 <= _step(line) <= step))
            whole.replace(self.path)
        self._board = _tensorboard(out, step)
        self._sums: dict[str, float] = {}
        self._count, self._since = 0, time.perf_counter()

    def add(self, step: int, values: Mapping[str, float], *, write: bool) -> None:
        """Add the values of a step to the means; write a line and begin new ones."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if not write:
            return
        seconds = time.perf_counter() - self._since
        line: dict[str, Any] = {"step": step}
        line |= {name: total / self._count for name, total in self._sums.items()}
        line["images_per_second"] = self._count * self.batch / seconds
        line["memory_gib"] = memory() / 2**30
        finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # NaN is no JSON
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        if self._board is not None:
            for name in line.keys() - {"step"}:
                self._board.add_scalar(name, line[name], step)
        left = timedelta(seconds=round((self.steps - step) * seconds / self._count))
        print(
            f"step {step}/{self.steps}  loss {line['loss']:.4g}  gradient {line['gradient']:.3g}  "
            f"{line['images_per_second']:.3g} images/s  {line['memory_gib']:.2f} GiB  {left} left",
            flush=True,
        )
        self._sums, self._count, self._since = {}, 0, time.perf_counter()


def _step(line: str) -> int:
    """Return the step of a line, -1 of one that a crash or a full disk left unfinished."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


def _tensorboard(out: Path, step: int) -> Any:
    """Return a writer for TensorBoard, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def memory() -> int:
    """Return the most bytes used so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kibibytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes


def differences(saved: Any, new: Any, name: str = "") -> list[str]:
    """Return how settings differ that may not change within a run, one line each."""
    if name and name.startswith(MAY_CHANGE):
        return []
    if isinstance(saved, dict) and isinstance(new, dict):
        prefix = f"{name}." if name else ""
        keys = [*saved, *(key for key in new if key not in saved)]
        lines = [differences(saved.get(key), new.get(key), prefix + key) for key in keys]
        return [line for part in lines for line in part]
    return [] if saved == new else [f"{name}: {saved!r} in the checkpoint, {new!r} here"]

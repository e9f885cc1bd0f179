"""A run of examples/images/train.py so small that a step takes milliseconds."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PROGRAM = Path(__file__).parents[2] / "examples" / "images" / "train.py"
PRESET = """
[data]
size = 8
channels = 1
[process]
name = "EDMSDE"
[network]
name = "DDPMpp"
width = 8
multipliers = [1, 2]
blocks = 1
attention_levels = []
dropout = 0.0
[model]
name = "EDMModel"
[objective]
name = "ScoreMatching"
weighting = {name = "EDMWeighting"}
times = {name = "LogNormalTimes"}
[optimizer]
name = "Adam"
lr = 1e-3
[training]
batch = 12
steps = 6
warmup = 3
clip = 1.0
[average]
name = "EMA"
decay = 0.9
[sampler]
name = "PCSampler"
predictor = {name = "Euler"}
grid = {name = "KarrasGrid"}
steps = 2
[run]
snapshot_every = 100
save_every = 2
log_every = 1
"""


def arguments(folder: Path, out: str, *changes: str) -> list[str]:
    """Return the arguments of a run of squares in a folder, after writing preset and data."""
    preset, data = folder / "small.toml", folder / "squares.npz"
    if not data.exists():
        preset.write_text(PRESET)
        save_squares(data)
    sets = [word for change in changes for word in ("--set", change)]
    return ["--preset", str(preset), "--data", str(data), "--out", str(folder / out), *sets]


def save_squares(path: Path, count: int = 120) -> None:
    """Write bright squares at random places, in three classes."""
    rng, images = np.random.default_rng(0), np.zeros((count, 8, 8, 1), np.uint8)
    for image in images:
        row, column = rng.integers(0, 5, 2)
        image[row : row + 4, column : column + 4] = rng.integers(120, 255)
    np.savez(path, arr_0=images, arr_1=np.arange(count) % 3)


def weights(out: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint of a run: weights, averages and moments, by name."""
    path = out / "checkpoints" / f"step-{step:08d}.pt"
    content = torch.load(path, weights_only=False)
    found = {f"model.{name}": value for name, value in content["model"].items()}
    found |= {f"ema.{name}": value for name, value in content["ema"]["model"].items()}
    for number, entry in content["optimizer"]["state"].items():
        found |= {f"optimizer.{number}.{name}": torch.as_tensor(v) for name, v in entry.items()}
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two results of `weights` are the same to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of weights and averages."""
    names = [name for name in a if not name.startswith("optimizer.")]
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in names)

"""What the examples share: how they read their options and leave their files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from diffusionkit import EMA, clipped_step


def fit(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    rate: float,
    decay: float,
    optimizer: type[torch.optim.Adam] = torch.optim.Adam,
    name: str = "training",
) -> None:
    """Train a model by the losses (B,) of batches, and leave it with the average of its weights.

    The learning rate goes up to `rate` in the first tenth of the steps, then down to nothing; the
    average has the decay `decay`.
    """
    method = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        method, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    ema = EMA(model, decay=decay)
    for _ in tqdm(range(steps), desc=name, unit="step", leave=False):
        loss().mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(method)
        schedule.step()
        ema.update(model)
    model.load_state_dict(ema.model.state_dict())


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    figure.savefig(unfinished, dpi=150)
    unfinished.replace(path)


def write(text: str, path: Path) -> None:
    """Write a text whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of rows of x (n, d) and y (m, d).

    It is never negative, and above 0 even for two sets from the same law.
    """
    x, y = x.double(), y.double()
    within = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    return float(2 * torch.cdist(x, y).mean() - within)


def count(text: str) -> int:
    """Read a positive whole number from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """Read a device that torch can use from the command line."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device torch can use, got {text!r}"
        ) from error


def picture_path(text: str) -> Path:
    """Read the name of a picture from the command line."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a .png, .pdf or .svg file, got {text!r}")
    return Path(text)

"""Helpers shared by the examples: training, tables, pictures and command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from diffusionkit import EMA, clipped_step


def fit(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    lr: float,
    ema_decay: float,
    optimizer: type[torch.optim.Adam] = torch.optim.Adam,
    name: str = "training",
) -> None:
    """Train a model on per-sample losses (B,) and load the average of its weights.

    The learning rate rises to `lr` over the first tenth of the steps, then decays to zero.
    """
    method = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        method, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    ema = EMA(model, decay=ema_decay)
    for _ in tqdm(range(steps), desc=name, unit="step", leave=False):
        loss().mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(method)
        schedule.step()
        ema.update(model)
    model.load_state_dict(ema.model.state_dict())


def save(figure: Figure, path: Path) -> None:
    """Save a figure atomically: an interrupted write leaves no partial file."""
    partial = _partial(path)
    figure.savefig(partial, dpi=150)
    partial.replace(path)


def report(lines: Iterable[str], path: Path) -> None:
    """Print lines as they arrive, then save them atomically."""
    text = ""
    for line in lines:
        print(line, flush=True)
        text += line + "\n"
    partial = _partial(path)
    partial.write_text(text)
    partial.replace(path)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".partial-{path.name}")


def tile(images: Tensor, columns: int, background: float) -> Tensor:
    """Arrange images (n, c, h, w) in a grid (rows (h + 2), columns (w + 2), c), framed."""
    framed = nn.functional.pad(images.cpu(), (1, 1, 1, 1), value=background)
    blank = framed.new_full((-len(framed) % columns, *framed.shape[1:]), background)
    grid = torch.cat([framed, blank])
    return rearrange(grid, "(row column) c h w -> (row h) (column w) c", column=columns)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of rows of x (n, d) and y (m, d).

    It is never negative, and positive even for two sets from the same distribution.
    """
    x, y = x.double(), y.double()
    within = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    return float(2 * torch.cdist(x, y).mean() - within)


def mean_and_error(values: Sequence[float] | NDArray[np.float64], form: str) -> str:
    """Format the mean over seeds and, from two seeds on, its standard error."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that describes a module by its first line and shows defaults in the help."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def positive_int(text: str) -> int:
    """Parse a positive integer from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """Parse an available torch device from the command line."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected an available torch device, got {text!r}"
        ) from error


def picture_path(text: str) -> Path:
    """Parse the path of a picture from the command line."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a .png, .pdf or .svg file, got {text!r}")
    return Path(text)

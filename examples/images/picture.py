"""Draw real images, generated ones, and the training image nearest to each generated one.

    python examples/images/picture.py samples.zip --data glyphs --out picture.png

If generated images equal their nearest training images, the model has memorized its training set.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from sources import HELP, held_out, one_line_errors, open_source
from torch import Tensor

from diffusionkit.data import ImageData, open_images
from diffusionkit.metrics import nearest

ROWS, COLUMNS = 12, 8


def stacked(data: ImageData, index: list[int] | range) -> Tensor:
    """Return some images of a data set in one tensor (N, C, H, W)."""
    return torch.stack([data[i][0] for i in index])


def grid(images: Tensor) -> Any:
    """Return the first images in rows of eight, as an array for matplotlib."""
    n, channels, height, width = images[: ROWS * COLUMNS].shape
    count = math.ceil(n / COLUMNS)
    full = torch.zeros((count * COLUMNS, channels, height + 2, width + 2), dtype=torch.uint8)
    full[:n, :, 1:-1, 1:-1] = images[: ROWS * COLUMNS]
    rows = full.reshape(count, COLUMNS, *full.shape[1:]).permute(0, 3, 1, 4, 2)
    return rows.reshape(count * (height + 2), COLUMNS * (width + 2), channels).squeeze(-1).numpy()


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", help="generated images: a folder, .zip or .npz of sample.py")
    parser.add_argument("--data", required=True, help=f"training images: {HELP}")
    parser.add_argument("--held-out", help="images that were not trained on; by default the "
                        "test part of a built-in set, else the training images")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args(arguments)
    with one_line_errors("picture.py"):
        draw(options)


def draw(options: argparse.Namespace) -> None:
    """Draw the picture and save it."""
    generated = open_images(options.samples)
    channels, size, _ = generated.shape
    about: dict[str, Any] = {"size": size, "channels": channels}
    train = real = open_source(options.data, "train", **about)
    source = held_out(options.data, options.held_out)
    if source is not None:
        real = open_source(source, "test", **about)
    count = min(ROWS * COLUMNS, len(generated))
    shown = stacked(generated, range(count))
    found = nearest(stacked(train, range(len(train))), shown).index[:, 0]
    chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    panels = {
        "real, not trained on" if real is not train else "real": stacked(real, chosen.tolist()),
        "generated": shown,
        "nearest training images": stacked(train, found.tolist()),
    }
    import matplotlib.pyplot as plt

    height = 0.4 + 4 * math.ceil(count / COLUMNS) / COLUMNS  # a panel is 4 wide
    figure, axes = plt.subplots(1, len(panels), figsize=(12, height), layout="constrained")
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(grid(images), cmap="gray", interpolation="nearest", vmin=0, vmax=255)
        axis.set_title(title)
        axis.set_axis_off()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    plt.close(figure)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()

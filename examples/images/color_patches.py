"""Write 32x32 color patches of scikit-learn's two photographs, for training and for tests.

    python examples/images/color_patches.py --out patches

The photographs, a temple and a flower, are halved in size and cut into stripes; every fifth stripe
is for tests, so that test patches share no pixels with training patches. Those of one part overlap.
The files train.npz and test.npz have the photograph of each patch as its class.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusionkit.data import save_images

SIZE = 32
STRIDES = {"train": 2, "test": 8}
FLAT = 6.0  # the standard deviation of the colors, of 255, below which a patch counts as flat


def windows(image: Tensor, stride: int) -> Tensor:
    """Return the patches (n, 3, SIZE, SIZE) of an image (3, H, W) that are not flat."""
    found = image.unfold(1, SIZE, stride).unfold(2, SIZE, stride)
    patches = found.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)
    return patches[patches.std((2, 3)).mean(1) > FLAT]


def parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the patches in uint8 and their classes, of the parts "train" and "test"."""
    from sklearn.datasets import load_sample_images

    found: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "test": []}
    for label, photograph in enumerate(load_sample_images().images):
        halved = avg_pool2d(torch.tensor(photograph).permute(2, 0, 1).float(), 2)
        for i, stripe in enumerate(torch.split(halved, 2 * SIZE, dim=2)):
            part = "test" if i % 5 == 4 else "train"
            if stripe.shape[2] >= SIZE:
                patches = windows(stripe, STRIDES[part])
                found[part].append((patches, torch.full((len(patches),), label)))
    return {
        part: (torch.cat([x for x, _ in of]).round().byte(), torch.cat([y for _, y in of]))
        for part, of in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("patches"), help="a folder")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in parts().items():
        save_images(images, options.out / f"{part}.npz", class_labels=labels)
        print(f"-> {options.out / part}.npz: {len(images):,} patches")


if __name__ == "__main__":
    main()

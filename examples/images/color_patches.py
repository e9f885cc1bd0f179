"""Color patches of scikit-learn's two photographs, a temple and a flower, and their test part."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusionkit.data import ImageTensors

STRIPE = 64
STRIDES = {"train": 2, "test": 8}
FLAT = 6.0  # the standard deviation of the colors, of 255, below which a patch counts as flat


def windows(image: Tensor, size: int, stride: int) -> Tensor:
    """Return the patches (n, 3, size, size) of an image (3, H, W) that are not flat."""
    found = image.unfold(1, size, stride).unfold(2, size, stride)
    patches = found.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)
    return patches[patches.std((2, 3)).mean(1) > FLAT]


def color_patches(part: Literal["train", "test"] = "train", size: int = 32) -> ImageTensors:
    """Return patches of a part; their class is the photograph.

    The photographs are halved in size and cut into stripes, every fifth of which is for tests, so
    that test patches share no pixels with training patches. Those of one part overlap.

    Args:
        part: "train" or "test".
        size: the height and width of the patches, at most 64.

    Raises:
        ValueError: if size is not from 1 to 64.
        ImportError: if scikit-learn is not installed.
    """
    from sklearn.datasets import load_sample_images

    if not 1 <= size <= STRIPE:
        raise ValueError(f"size: expected 1 to {STRIPE} pixels for color patches, got {size}")
    found, classes = [], []
    for label, photograph in enumerate(load_sample_images().images):
        halved = avg_pool2d(torch.tensor(photograph).permute(2, 0, 1).float(), 2)
        for i, stripe in enumerate(torch.split(halved, STRIPE, dim=2)):
            if (i % 5 == 4) == (part == "test") and stripe.shape[2] >= size:
                found.append(windows(stripe, size, STRIDES[part]))
                classes.append(torch.full((len(found[-1]),), label))
    return ImageTensors(
        torch.cat(found).round().byte(), torch.cat(classes), classes=("temple", "flower")
    )

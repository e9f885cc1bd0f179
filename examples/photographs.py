"""Color patches of the two photographs of scikit-learn, and an unconditional model of them.

The examples of conditional generation import this file. The model is trained once, in about eight
minutes on one CPU core, and cached in `outputs/photographs.pt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from helpers import fit
from series_and_patches import windows
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusionkit import EDMSDE, EDMModel, EDMWeighting, LogNormalTimes, ScoreMatching
from diffusionkit.checkpoints import load_network, save_network
from diffusionkit.networks import NCSNpp

SIZE = 16  # pixels along each side
SHAPE = (3, SIZE, SIZE)
FACTOR = 4  # of super-resolution
CLASSES = ("temple", "flower")  # what the photographs show
FLAT = 0.05  # the standard deviation of the colors below which a patch counts as flat
SIGMA_DATA = 0.5
BATCH, LEARNING_RATE, EMA_DECAY = 64, 2e-3, 0.998


class Patches(NamedTuple):
    """Patches (n, 3, 16, 16) in [-1, 1] with the index of their photograph (n,).

    Training and test patches share no pixels.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Patches:
    """Return the patches that are not flat; every fifth stripe is held out for testing."""
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for label, photograph in enumerate(load_sample_images().images):
        scaled = torch.tensor(photograph).movedim(-1, 0) / 127.5 - 1
        for i, stripe in enumerate(torch.split(scaled, 4 * SIZE, dim=2)):
            testing = i % 5 == 4
            patches = windows(stripe, SIZE, SIZE if testing else SIZE // 4)
            patches = patches[patches.std((2, 3)).mean(1) > FLAT]  # drops plain sky
            found[testing].append((patches, torch.full((len(patches),), label)))
    parts = (zip(*found[testing], strict=True) for testing in (False, True))
    return Patches(*(torch.cat(part) for pair in parts for part in pair))


def shrink(images: Tensor) -> Tensor:
    """Downsample images (n, 3, 16, 16) to (n, 3, 4, 4) by averaging."""
    return avg_pool2d(images, FACTOR)


def enlarge(small: Tensor, mode: str) -> Tensor:
    """Interpolate small images (n, 3, 4, 4) to (n, 3, 16, 16)."""
    return interpolate(small, scale_factor=FACTOR, mode=mode).clamp(-1, 1)


def model_of(network: NCSNpp) -> EDMModel:
    """Wrap a network in its score model."""
    return EDMModel(network, EDMSDE(), sigma_data=SIGMA_DATA)


def train(data: Tensor, steps: int, seed: int) -> NCSNpp:
    """Train a network on patches (n, 3, 16, 16) and return it with averaged weights."""
    torch.manual_seed(seed)
    network = NCSNpp(
        channels=3,
        width=16,
        multipliers=(1, 2, 2),
        blocks=1,
        attention_levels=(2,),
        dropout=0.0,
        embedding="fourier_linear",
        fourier_scale=1.0,  # the published 16 is for long training
        scale_by_sigma=False,
    )
    model = model_of(network)
    objective = ScoreMatching(EDMWeighting(SIGMA_DATA), times=LogNormalTimes(mean=-0.8))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (BATCH,))
        return objective(model, data[rows])

    fit(model, loss, steps, lr=LEARNING_RATE, ema_decay=EMA_DECAY)
    return network


def trained(data: Tensor, path: Path, steps: int, seed: int = 0) -> EDMModel:
    """Load the model from a file, training and saving it first if the file does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_network(path, train(data, steps, seed))
    network = load_network(path)
    if not isinstance(network, NCSNpp):
        raise TypeError(f"{path}: expected an NCSNpp, got {type(network).__name__}")
    return model_of(network).eval()

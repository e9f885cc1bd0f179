"""Train a model of digits that knows no classes, and ask a classifier of noisy digits for each.

The score of the class of a digit is that of all digits plus the gradient of a classifier that was
trained on digits with noise. The larger the scale of that gradient, the surer the class and the
less alike the samples are to all that digits can be. How many are classed as asked is the word of
another classifier, a logistic regression, which has seen none of the noise. It takes about two
minutes on one CPU core, prints a table and leaves one picture, `outputs/guided_digits.png`; a look
at it takes half a minute:

    python examples/guided_digits.py
    python examples/guided_digits.py --train-steps 100 --samples 100
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from conditional_digits import CLASSES, compare, options
from digits import Digits, Pixels, load, pixels
from helpers import fit
from torch import Tensor
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    EDMSDE,
    ClassifierGuidance,
    EDMModel,
    EDMWeighting,
    KarrasGrid,
    LogNormalTimes,
    NoiseClassifier,
    PCSampler,
    ScoreMatching,
    ScoreModel,
    train_noise_classifier,
)
from diffusionkit.networks import MLP

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
BATCH, LEARNING_RATE, EMA_DECAY = 128, 1e-3, 0.998


def train(data: Digits, steps: int, seed: int) -> ScoreModel:
    """Train a model of all digits."""
    torch.manual_seed(seed)
    images = data.train.flatten(1)
    spread = float(images.std())
    model = EDMModel(MLP(images.shape[1], width=192, depth=4), EDMSDE(), sigma_data=spread)
    objective = ScoreMatching(EDMWeighting(spread), times=LogNormalTimes())

    def loss() -> Tensor:
        rows = torch.randint(len(images), (BATCH,))
        return objective(model, images[rows])

    fit(model, loss, steps, rate=LEARNING_RATE, decay=EMA_DECAY, name="model")
    return model


def train_classifier(data: Digits, model: ScoreModel, steps: int, seed: int) -> NoiseClassifier:
    """Train a classifier of digits with the noise of the model's process."""
    torch.manual_seed(seed)
    images = data.train.flatten(1)
    network = MLP(images.shape[1], out_features=CLASSES, width=128, depth=2)
    classifier = NoiseClassifier(network, model.sde, float(images.std()))
    return train_noise_classifier(
        classifier, model.sde, images, data.class_labels, steps=steps, times=LogNormalTimes(),
        progress=lambda items: tqdm(items, desc="classifier", unit="step"),
    )  # fmt: skip


def draw(
    model: ScoreModel,
    classifier: NoiseClassifier,
    scale: float,
    class_labels: Tensor,
    steps: int,
    seed: int,
) -> Pixels:
    """Draw one digit (n, 64) for each label, in pixels."""
    guided = ClassifierGuidance(model, classifier, scale)
    sampler = PCSampler(guided, DDIM(eta=0.5), grid=KarrasGrid(), steps=steps)
    generator = torch.Generator().manual_seed(seed)  # the same for every scale
    return pixels(sampler((len(class_labels), 64), y=class_labels, generator=generator))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample every class at every scale, and leave a picture."""
    args = options(argv, __doc__, name="guided_digits", train_steps=3000, scales=SCALES)
    data, start = load(), time.perf_counter()
    model = train(data, args.train_steps, args.seed)
    classifier = train_classifier(data, model, args.train_steps, args.seed)
    print(f"training {time.perf_counter() - start:.0f} s\n")
    compare(
        lambda scale, digits: draw(model, classifier, scale, digits, args.steps, args.seed),
        data, args.scales, args.samples, args.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()

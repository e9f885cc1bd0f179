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

import argparse
import time
from collections.abc import Sequence

import torch
from conditional_digits import CLASSES, SHOWN, draw_figure, table_head, table_row
from digits import Digits, Pixels, Quality, load, pixels
from helpers import count, picture_path, save
from torch import Tensor
from tqdm import tqdm

from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    ClassifierGuidance,
    EDMModel,
    EDMWeighting,
    KarrasGrid,
    LogNormalTimes,
    NoiseClassifier,
    PCSampler,
    ScoreMatching,
    ScoreModel,
    clipped_step,
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
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    ema = EMA(model, decay=EMA_DECAY)
    for _ in tqdm(range(steps), desc="model", unit="step"):
        rows = torch.randint(len(images), (BATCH,))
        objective(model, images[rows]).mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        schedule.step()
        ema.update(model)
    model.load_state_dict(ema.model.state_dict())
    return model


def train_classifier(data: Digits, model: ScoreModel, steps: int, seed: int) -> NoiseClassifier:
    """Train a classifier of digits with the noise of the model's process."""
    torch.manual_seed(seed)
    images = data.train.flatten(1)
    network = MLP(images.shape[1], out_features=CLASSES, width=128, depth=2)
    classifier = NoiseClassifier(network, model.sde, float(images.std()))
    return train_noise_classifier(
        classifier, model.sde, images, data.labels, steps=steps, times=LogNormalTimes(),
        progress=lambda items: tqdm(items, desc="classifier", unit="step"),
    )  # fmt: skip


def draw(
    model: ScoreModel,
    classifier: NoiseClassifier,
    scale: float,
    labels: Tensor,
    steps: int,
    seed: int,
) -> Pixels:
    """Draw one digit (n, 64) for each label, in pixels."""
    guided = ClassifierGuidance(model, classifier, scale)
    sampler = PCSampler(guided, DDIM(eta=0.5), grid=KarrasGrid(), steps=steps)
    generator = torch.Generator().manual_seed(seed)  # the same for every scale
    return pixels(sampler((len(labels), 64), y=labels, generator=generator))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample every class at every scale, and leave a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train-steps", type=count, default=3000, help="of both trainings (%(default)s)")
    add("--samples", type=count, default=500, help="of each scale (%(default)s)")
    add("--steps", type=count, default=50, help="of the sampler (%(default)s)")
    add("--scales", type=float, nargs="+", default=SCALES, help="of guidance (%(default)s)")
    add("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    picture = "outputs/guided_digits.png"
    add("--output", type=picture_path, default=picture, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.samples < SHOWN * CLASSES:
        parser.error(f"--samples: expected at least {SHOWN * CLASSES}, got {args.samples}")
    data = load()
    quality = Quality(data)
    start = time.perf_counter()
    model = train(data, args.train_steps, args.seed)
    classifier = train_classifier(data, model, args.train_steps, args.seed)
    print(f"training {time.perf_counter() - start:.0f} s\n\n{table_head()}")
    labels = torch.arange(args.samples) % CLASSES
    drawn = {}
    for scale in args.scales:
        drawn[scale] = draw(model, classifier, scale, labels, args.steps, args.seed)
        print(table_row(f"{scale:g}", quality, drawn[scale], labels), flush=True)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    rows = rows[: args.samples]
    print(table_row("training", quality, pixels(data.train[rows]), data.labels[rows]))
    save(draw_figure(drawn, labels), args.output)
    print(f"\npicture {args.output}")


if __name__ == "__main__":
    main()

"""Class-conditional generation by an unconditional model and a classifier of noisy images."""

from typing import Any, Literal

import recipes  # noqa: F401 - first: it puts the training program on the path
import torch
from glyph_features import SCRIPTS, glyph_features
from helpers import energy_distance
from measures import place_of, rounded, scaled
from presets import Run, open_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from diffusionkit import (
    ClassifierGuidance,
    Langevin,
    NoiseClassifier,
    PCSampler,
    ReverseDiffusion,
    train_noise_classifier,
)
from diffusionkit.metrics import to_uint8
from diffusionkit.random import seeded

TARGETS, SAMPLES, STEPS, TRAINING = 4, 128, 50, 500
CLASSES = f"{TARGETS} classes, {SAMPLES} samples of each, {2 * STEPS} evaluations"


class SmallClassifier(nn.Module):
    """A convolutional classifier, with the noise label as another channel."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 2
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [nn.Conv2d(before, out, 3, stride, 1), nn.GroupNorm(4, out), nn.SiLU()]
            before = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    @override
    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 1, H, W) with noise labels (B,)."""
        label = noise_label.to(x.dtype)[:, None, None, None].expand_as(x)
        logits: Tensor = self.head(self.layers(torch.cat([x, label], 1)).mean((2, 3)))
        return logits


def labeled(run: Run, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return all images in uint8 of a part of the data, and their scripts."""
    data: Any = open_data(run.settings, part)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def _some(images: Tensor, count: int) -> Tensor:
    """Return images in a random order, always the same; some twice if there are too few."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order.repeat(-(-count // len(images)))[:count]]


def judge(images: Tensor, labels: Tensor, seed: int) -> SmallClassifier:
    """Return a classifier trained on clean images in [-1, 1], not the one that guides."""
    torch.manual_seed(seed)
    classifier = SmallClassifier(SCRIPTS)
    optimizer = torch.optim.Adam(classifier.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, TRAINING)
    for _ in range(TRAINING):
        rows = torch.randint(len(images), (128,))
        logits = classifier(images[rows], torch.zeros(128))
        optimizer.zero_grad()
        cross_entropy(logits, labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return classifier.eval()


def class_shares(run: Run) -> dict[str, float]:
    """Return how often a classifier of clean images takes images for the class asked for.

    The four scripts with the most training images are drawn. The distances are energy distances of
    features to the test images of the class, mean over classes; "training" are training images of
    it, which are what the exact posterior of the training set draws, and "test" its test images.
    """
    images, labels = labeled(run, "train")
    place, seed = place_of(run), run.settings["training"]["seed"]
    torch.manual_seed(seed)
    x0 = scaled(run, images)
    classifier = NoiseClassifier(SmallClassifier(SCRIPTS), run.model.sde, float(x0.std()))
    train_noise_classifier(
        classifier.to(place), run.model.sde, x0.to(place), labels.to(place), steps=TRAINING,
        generator=torch.Generator(place).manual_seed(seed),
    )  # fmt: skip
    targets = labels.bincount(minlength=SCRIPTS).argsort(descending=True)[:TARGETS]
    asked = targets.repeat_interleave(SAMPLES)
    shape = (len(asked), *x0.shape[1:])
    low, high = map(float, run.settings["data"]["range"])

    def drawn(model: Any, **cond: Any) -> Tensor:
        sampler = PCSampler(
            model, ReverseDiffusion(), Langevin(snr=0.16, norm="batch"), steps=STEPS
        )
        generators = [seeded(seed, i) for i in range(len(asked))]
        x = sampler(shape, generator=generators, device=place, **cond)
        return to_uint8(x.cpu(), (low, high))

    test, test_labels = labeled(run, "test")
    kinds = {
        "guided": drawn(ClassifierGuidance(run.model, classifier), class_labels=asked.to(place)),
        "unconditional": drawn(run.model),
        "training": torch.cat([_some(images[labels == k], SAMPLES) for k in targets]),
        "test": torch.cat([_some(test[test_labels == k], SAMPLES) for k in targets]),
    }
    network, found = glyph_features(), {}
    clean = judge(images / 127.5 - 1, labels, 1000 + seed)
    with torch.no_grad():
        real = [network(test[test_labels == k][:500])[0] for k in targets]
        for kind, chosen in kinds.items():
            features, _ = network(chosen)
            logits = clean(chosen / 127.5 - 1, torch.zeros(len(chosen)))
            found[kind] = rounded(float((logits.argmax(1) == asked).double().mean()))
            distances = [energy_distance(a, b) for a, b in zip(features.split(SAMPLES), real,
                                                              strict=True)]  # fmt: skip
            found[f"{kind} distance"] = rounded(sum(map(float, distances)) / TARGETS)
    return found

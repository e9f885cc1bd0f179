"""The losses of a batch of images, each image with its own times and noise."""

from collections.abc import Iterable
from typing import Any

import torch
from presets import Parts
from torch import Tensor

from diffusionkit import drop_conditions
from diffusionkit.data import Batch
from diffusionkit.random import seeded

DRAWS = 2  # tells generators of losses from others of the same seed and position


class Losses:
    """The objective of a preset, with its dequantization, augmentation, classes and references.

    Everything random about an image comes from one generator, seeded by the seed of the run and
    the position of the image in the order of the data.

    Args:
        parts: the parts of the preset.
        device_type: the type of the device, for autocast.

    Attributes:
        learned: the dequantizer if it has parameters, which are trained too; else None.
    """

    def __init__(self, parts: Parts, device_type: str) -> None:
        training, run = parts.settings["training"], parts.settings["run"]
        self.parts, self.data = parts, parts.settings["data"]
        self.seed, self.dropped = training["seed"], training["label_dropout"]
        self.precision = torch.bfloat16 if run["precision"] == "bfloat16" else torch.float32
        self.device_type = device_type
        learned = parts.dequantizer is not None and any(
            True for _ in parts.dequantizer.parameters()
        )
        self.learned = parts.dequantizer if learned else None
        if parts.augmentation is not None:
            model: Any = parts.model
            model.data_range = None  # augmented images may overshoot it

    def generators(self, positions: Iterable[int]) -> list[torch.Generator]:
        """Return the generators of the images at positions."""
        return [seeded(self.seed, position, DRAWS) for position in positions]

    def points(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None]:
        """Return data from images in uint8, and log q of those that a dequantizer draws."""
        if self.parts.dequantizer is None:
            low, high = self.data["range"]
            return low + images.float() * ((high - low) / 255), None
        drawn = self.parts.dequantizer(images, generator=generators)
        return drawn.x, drawn.log_prob

    def __call__(self, batch: Batch, part: slice, first: int) -> Tensor:
        """Return the losses of a part of a batch, the reference of which begins at a position."""
        generators = self.generators(batch.positions[part].tolist())
        x, log_q = self.points(batch.images[part], generators)
        given: dict[str, Any] = {"generator": generators}
        if self.parts.augmentation is not None:
            x, given["condition"] = self.parts.augmentation(x, generator=generators)
        if (classes := self.data["classes"]) and batch.class_labels is not None:
            labels = batch.class_labels[part]
            given["class_labels"] = drop_conditions(
                labels, classes, self.dropped, generator=generators
            )
        if batch.reference is not None:
            ahead = self.generators(range(first, first + len(batch.reference)))
            given["reference"], _ = self.points(batch.reference, ahead)
            if classes:
                given["reference_class_labels"] = batch.reference_class_labels
        objective: Any = self.parts.objective
        with torch.autocast(
            self.device_type, self.precision, enabled=self.precision != torch.float32
        ):
            if self.learned is None:
                losses: Tensor = objective(self.parts.model, x, **given)
            else:  # the bound itself, in nats per dimension
                losses = (objective.nats(self.parts.model, x, **given) + log_q) / x[0].numel()
        return losses

"""The levels of discrete data, and where they lie in the model's range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_count, check_number, readable


@dataclass(frozen=True)
class Levels:
    r"""Integers 0 ... levels - 1 as equal intervals of the model's range.

    Level k is the interval of width w = (high - low) / levels from low + w k, its centre
    low + w (k + 1/2).

    Args:
        levels: the number of levels, 256 for images of 8 bits.
        low: the lower end of the range.
        high: the upper end of the range.

    Raises:
        ValueError: unless levels >= 2 and low < high, both finite.
        TypeError: if levels is not an integer, or low or high not a number.

    >>> Levels(4).encode(torch.tensor([[0, 3]]))
    tensor([[-0.7500,  0.7500]])
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.levels, "levels", least=2)
        check_number(self.low, "low")
        check_number(self.high, "high")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"expected finite low < high, got {self.low} and {self.high}")

    @property
    def width(self) -> float:
        """The width of a level in the model's range."""
        return (self.high - self.low) / self.levels

    def check(self, images: Tensor) -> None:
        """Raise unless images (B, *D) are integers within 0 ... levels - 1.

        Raises:
            TypeError: if images is not a tensor of an integer dtype.
            ValueError: if the batch is empty, or (read on the CPU only) a value is no level.
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images: expected a tensor of integers (B, *D), got {type(images).__name__}"
            )
        if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
            raise TypeError(
                f"images: expected integers 0 ... {self.levels - 1}, got {images.dtype}; "
                "undo the map to the model's range first, then .long() or .to(torch.uint8)"
            )
        if images.ndim == 0 or images.numel() == 0:
            raise ValueError(
                f"images: expected a non-empty batch (B, *D), got shape {tuple(images.shape)}"
            )
        if readable(images):
            low, high = (int(end) for end in images.long().aminmax())  # uint16 has no aminmax
            if low < 0 or high >= self.levels:
                raise ValueError(
                    f"images: expected levels 0 ... {self.levels - 1}, got {low} to {high}"
                )

    def encode(self, images: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the centres of the levels of images (B, *D), of a dtype or the default one."""
        self.check(images)
        return self.low + self.width * (images.to(dtype or torch.get_default_dtype()) + 0.5)

    def decode(self, x: Tensor) -> Tensor:
        """Return the levels, int64, nearest to points x (B, *D); beyond the range, the outermost.

        NaN has no level; check samples for it first.
        """
        return ((x - self.low) / self.width).floor().clamp(0, self.levels - 1).long()

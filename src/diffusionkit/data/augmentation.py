"""The augmentation of EDM: transformed images, and labels that the network is conditioned on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import autocast_enabled, check_number, check_state
from .._repr import Described
from ..random import Generators, check_generator, rand, randn

# The low-pass filter of the wavelet sym6. Its shifts by two are orthonormal, so that upsampling
# and downsampling with it returns an image unchanged.
_SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_CENTER = 5  # the tap at the place of the pixel

_SCALE = 0.2 * math.log(2)  # per standard deviation, of scale and anisotropy
_SHIFT = 1 / 8  # of height and width


class EDMAugmentation(Described):
    r"""The augmentation of EDM, with labels that describe the transformations to the network.

    A small data set is augmented by geometric transformations, each applied with a probability, and
    the network is conditioned on their parameters, so that the distribution it learns for labels 0
    is that of the original data. Sample with labels 0, or without labels.

    ==========  ===========================================================  ====================
    number      transformation                                               labels
    ==========  ===========================================================  ====================
    1           x-flip, always with probability 1/2                          0 or 1
    2           y-flip, with probability 1/2                                 0 or 1
    3           scale by :math:`2^{0.2 a}`, a ~ N(0, 1)                      a
    4, 5        rotation by an angle uniform on :math:`[-\pi, \pi]`          cos - 1, sin
    6, 7        stretch by :math:`2^{0.2 a}` along an axis at an angle r,    a cos r, a sin r
                shrink across it; r = 0 half the time, else uniform
    8, 9        shift by 1/8 of width and height times a, b ~ N(0, 1)        a, b
    ==========  ===========================================================  ====================

    The images are continued by reflection, and resampled at twice their resolution between two
    low-pass filters, those of the wavelet sym6. Only images that are more than flipped are
    resampled.

    `network.edm_*` take the labels as `condition`, `ScoreMatching` passes it on:
    `objective(model, x, condition=labels)`.

    Args:
        probability: the probability of each transformation except the x-flip.

    Raises:
        ValueError: if probability is not in [0, 1].
        TypeError: if it is not a number.

    Source:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
        https://arxiv.org/abs/2206.00364, appendix F.2.

    >>> import torch
    >>> from diffusionkit.data import EDMAugmentation
    >>> x, labels = EDMAugmentation(0.12)(torch.rand(16, 3, 32, 32))
    >>> x.shape, labels.shape
    (torch.Size([16, 3, 32, 32]), torch.Size([16, 9]))
    """

    def __init__(self, probability: float = 0.12) -> None:
        check_number(probability, "probability")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
        self.probability = probability

    def __call__(self, x: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Augment images.

        Args:
            x: the images (B, C, H, W), of any range.
            generator: one generator, one for each sample, or None.

        Returns:
            the augmented images, like x, and their labels (B, 9) in float32.

        Raises:
            ValueError: if x is not (B, C, H, W).
            TypeError: if x is not a floating-point tensor.
        """
        check_state(x)
        if x.ndim != 4 or min(x.shape[2:]) < 2:
            raise ValueError(f"x: expected shape (B, C, H, W), H, W > 1, got {tuple(x.shape)}")
        check_generator(generator, len(x))
        drawn = _draw(len(x), self.probability, generator)
        labels = drawn.labels().to(x.device, non_blocking=True)
        if not autocast_enabled(x):
            return _transformed(x, drawn), labels
        with torch.autocast(x.device.type, enabled=False):
            return _transformed(x, drawn), labels


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of each image, (B,), 0 for transformations that are not applied."""

    x_flip: Tensor
    y_flip: Tensor
    scale: Tensor
    rotation: Tensor
    stretch: Tensor
    axis: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def labels(self) -> Tensor:
        """Return the labels (B, 9)."""
        rows = (
            self.x_flip,
            self.y_flip,
            self.scale,
            self.rotation.cos() - 1,
            self.rotation.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
            self.shift_x,
            self.shift_y,
        )
        return torch.stack(rows, dim=1).float()

    def moved(self) -> Tensor:
        """Return whether each image is more than flipped (B,)."""
        rows = (self.scale, self.rotation, self.stretch, self.shift_x, self.shift_y)
        return torch.stack(rows).any(dim=0)

    def inverse(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return a matrix (n, 2, 2) and a shift (n, 2), in the order x, y.

        The pixel at q from the center of the image shows what was at matrix (q - shift).
        """
        stretch, zero = torch.exp(_SCALE * self.stretch), torch.zeros_like(self.scale)
        along = torch.stack([1 / stretch, zero, zero, stretch], dim=-1).reshape(-1, 2, 2)
        matrix = _turn(self.rotation - self.axis) @ along @ _turn(self.axis)
        matrix = matrix * torch.exp(-_SCALE * self.scale)[:, None, None]
        shift = torch.stack([width * self.shift_x, height * self.shift_y], dim=-1)
        return matrix, _SHIFT * shift


def _turn(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).reshape(-1, 2, 2)


def _draw(batch: int, probability: float, generator: Generators) -> _Parameters:
    # On the device of the generator, usually the CPU: a GPU need not wait to learn what to do.
    uniform = rand((batch, 10), generator=generator, dtype=torch.float64)
    normal = randn((batch, 4), generator=generator, dtype=torch.float64)
    applied = (uniform[:, :5] < probability).double()
    flips = (uniform[:, 5:7] < 0.5).double()
    angles = (2 * uniform[:, 7:9] - 1) * math.pi
    return _Parameters(
        x_flip=flips[:, 0],
        y_flip=flips[:, 1] * applied[:, 0],
        scale=normal[:, 0] * applied[:, 1],
        rotation=angles[:, 0] * applied[:, 2],
        stretch=normal[:, 1] * applied[:, 3],
        axis=angles[:, 1] * (uniform[:, 9] < 0.5),
        shift_x=normal[:, 2] * applied[:, 4],
        shift_y=normal[:, 3] * applied[:, 4],
    )


def _transformed(x: Tensor, drawn: _Parameters) -> Tensor:
    for flips, dim in ((drawn.x_flip, 3), (drawn.y_flip, 2)):
        chosen = flips.bool().to(x.device, non_blocking=True)[:, None, None, None]
        x = torch.where(chosen, x.flip(dim), x)
    (moved,) = drawn.moved().nonzero(as_tuple=True)
    if not len(moved):
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrix, shift = (
        each[moved].to(dtype).to(x.device, non_blocking=True)
        for each in drawn.inverse(*x.shape[2:])
    )
    moved = moved.to(x.device, non_blocking=True)
    return x.index_copy(0, moved, _resampled(x[moved].to(dtype), matrix, shift).to(x.dtype))


def _resampled(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Return images (n, C, H, W) whose pixel at q from the center shows matrix (q - shift)."""
    height, width = x.shape[2:]
    up, down, across, along = (
        table.to(x.dtype).to(x.device, non_blocking=True)
        for size in (height, width)
        for table in _tables(size)
    )
    fine = up @ x @ across.T
    rows, columns = (
        (torch.arange(d.shape[1], dtype=x.dtype, device=x.device) - _CENTER) / 2 - (len(d) - 1) / 2
        for d in (down, along)
    )
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    places = torch.einsum("nij,nhwj->nhwi", matrix, places - shift[:, None, None])
    # The center of the image is sample (size - 2) / 2 of the fine one, half a sample off its own.
    places = 4 * places - 1
    grid = torch.stack([places[..., 0] / len(across), places[..., 1] / len(up)], dim=-1)
    seen = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return down @ seen @ along.T


@functools.lru_cache(maxsize=8)
def _tables(size: int) -> tuple[Tensor, Tensor]:
    """Return the matrices that upsample and downsample a signal.

    Returns:
        a matrix (2 m, size) that continues a signal to m = 3 size - 2 samples by reflection and
        upsamples it, so that sample 2 p is at the place of sample p of the continued signal; a
        matrix (size, 2 size + 10) of the low-pass filter at every second sample.
    """
    with torch.inference_mode(False), torch.device("cpu"):  # whoever calls first
        places = torch.arange(1 - size, 2 * size - 1)
        reflected = (size - 1) - ((size - 1) - places.abs()).abs()
        continued = F.one_hot(reflected, size).double()
        wide = 2 * len(continued)
        return (
            _filter(len(continued)).T[_CENTER : _CENTER + wide] @ continued,
            _filter(size),
        )


def _filter(size: int) -> Tensor:
    """Return the matrix (size, 2 size + 10) of the filter, shifted by two from row to row."""
    matrix = torch.zeros(size, 2 * size + len(_SYM6) - 2, dtype=torch.float64)
    rows, taps = torch.arange(size)[:, None], torch.arange(len(_SYM6))
    matrix[rows, 2 * rows + taps] = torch.tensor(_SYM6, dtype=torch.float64)
    return matrix

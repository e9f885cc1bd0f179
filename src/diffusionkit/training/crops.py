"""Random crops of large fields, for training a model of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_flag
from .._precision import at_least_float32
from .._repr import Described
from ..models._windows import coordinates
from ..random import Generators, check_generator, rand


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Crops(Described):
    r"""Crops of fields, as `random_crops` returns them.

    Args:
        x0: the crops (n, C, \*size).
        positions: the coordinates (n, d, \*size) of their points in the fields, within [-1, 1].
        fields: the index (n,) of the field that each is cut from.
        starts: the first point (n, d) of each.
        field_size: the size of the fields.
    """

    x0: Tensor
    positions: Tensor
    fields: Tensor
    starts: Tensor
    field_size: tuple[int, ...]

    def cut(self, others: Tensor) -> Tensor:
        r"""Return crops (n, C', \*size) of other fields (B, C', \*field) at the same places.

        Such as masks or conditions; a tensor (1, C', \*field) is one for all fields.

        Raises:
            ValueError: if the fields have another size, or another number.
            TypeError: if others is not a tensor.
        """
        if not isinstance(others, Tensor):
            raise TypeError(f"others: expected a tensor, got {type(others).__name__}")
        batch = int(self.fields[-1]) + 1
        if others.shape[2:] != self.field_size or len(others) not in (1, batch):
            raise ValueError(
                f"others: expected {batch} fields (B, C, *field) of size {self.field_size}, or one "
                f"for all, got shape {tuple(others.shape)}"
            )
        fields = [0] * len(self.fields) if len(others) == 1 else self.fields.tolist()
        return _cut(others, fields, self.starts.tolist(), tuple(self.x0.shape[2:]))


def random_crops(
    x0: Tensor,
    size: int | Sequence[int],
    *,
    count: int = 1,
    periodic: bool = False,
    generator: Generators = None,
) -> Crops:
    r"""Cut random crops out of fields, each at its own place, uniformly among all places.

    Train a model of patches on the crops; `PatchedModel` applies it to whole fields. To condition a
    network on the position, pass it the `positions` (see `PositionChannels`). A mask is cut like
    the data: ``crops.cut(mask)``. Train on crops of several sizes to get a model of patches of any
    of these sizes (Patch Diffusion).

    Points near the edges of a field are in fewer crops than others, unless it is periodic.

    Args:
        x0: the fields (B, C, \*field), of any dtype.
        size: the size of a crop, a number or one for each axis.
        count: the number of crops of each field.
        periodic: whether crops may reach across the edges.
        generator: the source of randomness: one generator, one for each field, or None.

    Returns:
        The B count crops, with their coordinates; those of the first field come first.

    Raises:
        ValueError: if x0 is not (B, C, \*field), or smaller than the size.
        TypeError: if x0 is not a tensor, or an argument has another type.

    Source: Wang et al., Patch Diffusion: Faster and More Data-Efficient Training of Diffusion
    Models, 2023, arXiv 2304.12526.

    >>> import torch
    >>> from diffusionkit import EpsModel, ScoreMatching, VPSDE, random_crops
    >>> fields = torch.randn(2, 1, 500, 300)
    >>> crops = random_crops(fields, 64, count=8)
    >>> model = EpsModel(lambda x, noise_label: 0 * x, VPSDE())
    >>> ScoreMatching()(model, crops.x0).shape
    torch.Size([16])
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0: expected a tensor (B, C, *field), got {type(x0).__name__}")
    if x0.ndim < 3 or not x0.numel():
        raise ValueError(f"x0: expected fields of shape (B, C, *field), got {tuple(x0.shape)}")
    field = tuple(x0.shape[2:])
    sizes: tuple[int, ...] = tuple(size) if isinstance(size, Sequence) else (size,) * len(field)
    for one in sizes:
        check_count(one, "size")
    check_count(count, "count")
    check_flag(periodic, "periodic")
    check_generator(generator, len(x0))
    if len(sizes) != len(field) or any(n > m for n, m in zip(sizes, field, strict=True)):
        raise ValueError(f"size: expected at most that of the fields, {field}, got {sizes}")
    u = rand((len(x0), count, len(field)), generator=generator, dtype=torch.float64)
    places = [m if periodic else m - n + 1 for n, m in zip(sizes, field, strict=True)]
    starts = (u.flatten(0, 1) * torch.tensor(places, dtype=u.dtype)).long()
    fields = torch.arange(len(x0)).repeat_interleave(count)
    like = at_least_float32(x0[:1]) if x0.is_floating_point() else x0[:1].float()
    at = [coordinates(start, sizes, field, like) for start in starts.tolist()]
    crops = _cut(x0, fields.tolist(), starts.tolist(), sizes)
    return Crops(crops, torch.stack(at), fields, starts, field)


def _cut(
    x: Tensor, fields: Sequence[int], starts: Sequence[Sequence[int]], size: tuple[int, ...]
) -> Tensor:
    r"""Return crops (n, C, \*size) of fields (B, C, \*field)."""
    crops = []
    for field, start in zip(fields, starts, strict=True):
        crop = x[field]
        for axis, (first, length) in enumerate(zip(start, size, strict=True), 1):
            if first + length <= crop.shape[axis]:
                crop = crop.narrow(axis, first, length)
            else:
                points = torch.arange(first, first + length, device=x.device) % crop.shape[axis]
                crop = crop.index_select(axis, points)
        crops.append(crop)
    return torch.stack(crops)

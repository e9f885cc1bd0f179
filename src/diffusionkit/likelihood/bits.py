"""Bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .._checks import check_count, check_shape
from .._precision import at_least_float32


def bits_per_dim(nats: Tensor, dims: int | Sequence[int]) -> Tensor:
    r"""Return negative log-likelihoods in bits per dimension.

    .. math:: \mathrm{bits/dim} = \mathrm{nats} / (d \ln 2)

    There is no offset: the scale of the data is part of a `Dequantizer`'s `log_prob`.

    Args:
        nats: negative log-likelihoods in nats, of any shape.
        dims: the number of dimensions d, or the shape D of one sample.

    Raises:
        ValueError: if dims is not positive.
        TypeError: if nats is not a tensor; pass the `.nats` of a result.

    >>> import math, torch
    >>> bits_per_dim(torch.tensor([64 * math.log(16)]), (1, 8, 8))
    tensor([4.])
    """
    if not isinstance(nats, Tensor):
        raise TypeError(f"nats: expected a tensor, got {type(nats).__name__}")
    nats = at_least_float32(nats) if nats.is_floating_point() else nats
    if isinstance(dims, int):
        check_count(dims, "dims")
        return nats / (dims * math.log(2))
    return nats / (math.prod(check_shape(dims)) * math.log(2))

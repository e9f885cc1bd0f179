"""Bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import check_count, check_known, readable
from .._precision import at_least_float32


def bits_per_dim(nats: Tensor, dims: int | Sequence[int]) -> Tensor:
    r"""Return negative log-likelihoods in bits per dimension.

    .. math:: \mathrm{bits/dim} = \mathrm{nats} / (d \ln 2)

    There is no offset: the scale of the data is part of a `Dequantizer`'s `log_prob`.

    Args:
        nats: negative log-likelihoods in nats, of any shape.
        dims: the number of dimensions d, or the shape D of one sample.

    Raises:
        ValueError: if dims is not positive, or a likelihood is NaN (read on the CPU only).
        TypeError: if nats is not a tensor; pass the `.nats` of a result.

    >>> import math
    >>> import torch
    >>> from diffusionkit import bits_per_dim
    >>> bits_per_dim(torch.tensor([64 * math.log(16)]), (1, 8, 8))
    tensor([4.])
    """
    check_known(nats, "nats")
    if readable(nats) and bool(nats.isnan().any()):
        raise ValueError(f"nats: expected numbers, got NaN in {int(nats.isnan().sum())} of them")
    nats = at_least_float32(nats) if nats.is_floating_point() else nats
    if isinstance(dims, (tuple, list)) and dims:
        for size in dims:
            check_count(size, "dims")
    count: Any = math.prod(dims) if isinstance(dims, (tuple, list)) and dims else dims
    check_count(count, "dims", most=2**48)
    bits: Tensor = nats / (count * math.log(2))
    return bits

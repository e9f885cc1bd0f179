"""Dropout with a fast mask on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .._tracing import traced

_LEVELS = 2**16


class Dropout(nn.Dropout):
    r"""Zeroing of each feature with probability p in training, with the others scaled up.

    .. math:: y = x m / (1 - p), \qquad m \in \{0, 1\}, \quad P(m = 0) = p

    On the CPU torch draws one number per feature sequentially, which took three percent of a
    training step of NCSN++. Here one 64-bit number covers four features, 16 bits each, and p is
    rounded to the nearest multiple of :math:`2^{-16}`. On other devices, in compiled code and under
    transforms of `torch.func` this is torch's own dropout. Random numbers come from torch's global
    generator.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to a tensor of any shape."""
        if not self.training or self.p == 0:
            return x
        transformed = traced()
        if x.device.type != "cpu" or transformed:  # torch 2.6 cannot view numbers under vmap
            return F.dropout(x, self.p)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        quarters = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), device=x.device)
        keep = quarters.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
        scale = _LEVELS / (_LEVELS - dropped)
        return x * keep.to(x.dtype).mul_(scale).view(x.shape)

"""Means over a set too large to be looked at in one piece."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def softmax_mean(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Return the softmax-weighted mean of values that come part by part, (B, D).

    .. math::
        \frac{\sum_k e^{l_{bk}} v_k}{\sum_k e^{l_{bk}}}

    Args:
        parts: logits (B, m), and values (m, D) or, where each row has its own, (B, m, D). A logit
            of minus infinity leaves the value out; no row may leave out all.
    """
    top: Tensor | float = torch.finfo(torch.float32).min  # finite: no inf - inf
    total: Tensor | float = 0.0
    mean: Tensor | float = 0.0
    for logits, values in parts:
        peak = logits.detach().amax(1, keepdim=True).clamp_min(top)
        weights, kept = torch.exp(logits - peak), torch.exp(top - peak)
        total = kept * total + weights.sum(1, keepdim=True)
        mean = kept * mean + (weights.unsqueeze(1) @ values).squeeze(1)
        top = peak
    return torch.as_tensor(mean / total)

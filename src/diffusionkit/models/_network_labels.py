"""Whether a network can use the noise labels of a model, checked when the two are joined."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .._schedules import home, schedule_dtype
from ..distributed._wrappers import unwrapped
from .labels import checked_label

_GROWTH = 10.0


@torch.no_grad()
def check_network_labels(model: Any) -> None:
    """Raise if the network of a model cannot embed its noise labels, or should not divide by them.

    Only networks of the library declare which labels they take. Some divide their output by the
    label, a noise level sigma. That suits a prediction of the score, which has the magnitude 1 /
    sigma: the output before the division then has the same magnitude at all noise levels. For other
    predictions the division would vary the magnitude.

    Raises:
        ValueError: if a label is out of range, or the division spreads the sizes of outputs.
    """
    network = unwrapped(model.network) if isinstance(model.network, nn.Module) else None
    check, sde = getattr(network, "check_noise_labels", None), model.sde
    here = home(sde)
    if check is None or here.type == "meta":
        return
    ends = [sde.t_min, 0.5 * (sde.t_min + sde.T), sde.T]
    t = torch.tensor(ends, dtype=torch.float64, device="cpu").to(here, schedule_dtype(here))
    labels = checked_label(model.label(sde, t), t).cpu()
    check(labels)
    if not getattr(network, "divides_by_label", False):
        return
    # A subclass may set what its parameterization reads after this constructor.
    with contextlib.suppress(AttributeError):
        alpha, sigma = sde.marginal(t)
        a, b = model.parameterization(alpha, sigma)
        size = torch.hypot(*(_on_cpu(c).expand(len(ends)) for c in (a, b)))
        is_score = _spread(size * sigma.cpu()) < 1.1
        if not (is_score or _spread(size * labels) <= _GROWTH * _spread(size)):
            raise ValueError(
                f"network: expected one that does not divide its output by the noise label, for "
                f"the output of {type(model).__name__}, got scale_by_sigma=True and labels from "
                f"{float(labels.min()):g} to {float(labels.max()):g}; make it with "
                "scale_by_sigma=False, or predict the score: RawScoreModel(network, sde)"
            )


def _on_cpu(c: Tensor | float) -> Tensor:
    """Return a coefficient in float64; a default device, such as "meta", does not matter."""
    return c.cpu().double() if isinstance(c, Tensor) else torch.tensor(c, device="cpu").double()


def _spread(size: Tensor) -> float:
    return float(size.max() / size.min())

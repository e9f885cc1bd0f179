"""Interpolation of latent codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_finite, check_known, check_number, check_same, check_state, readable
from .._coefficients import linear
from .._schedules import exact


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    r"""Return the spherical interpolation between two latent codes a and b (B, \*D).

    .. math::
        \frac{\sin((1 - w) \Omega)}{\sin \Omega}\, a + \frac{\sin(w \Omega)}{\sin \Omega}\, b, \quad
        \cos \Omega = \frac{a \cdot b}{\|a\|\,\|b\|},

    with one angle for each sample. Codes are Gaussian, so they concentrate near a sphere. The
    interpolated codes do too, whereas a straight line passes through the interior, where the model
    was hardly trained.

    Args:
        a: the codes at weight 0 (B, \*D).
        b: the codes at weight 1 (B, \*D).
        weight: w, a number or one for each sample (B,); values outside [0, 1] extrapolate.

    Raises:
        ValueError: if shapes, dtypes or devices differ, a code is zero, two codes are opposite or
            weight is not finite (read on the CPU only), or weight has another shape.
        TypeError: if a code is not a floating-point tensor.

    Source: Shoemake, Animating Rotation with Quaternion Curves, 1985; Song et al., 2021, arXiv
    2010.02502 (appendix D.5).

    >>> import torch
    >>> from diffusionkit import slerp
    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    check_state(a, "a")
    check_state(b, "b")
    check_same(b, a, "b", "a")
    check_finite(a, "a")
    check_finite(b, "b")
    if isinstance(weight, Tensor):
        check_known(weight, "weight")
    else:
        check_number(weight, "weight")
    w = torch.as_tensor(weight, dtype=exact(a).dtype, device=a.device)
    if w.shape not in ((), a.shape[:1]):
        raise ValueError(
            f"weight: expected a number or one for each sample, shape ({len(a)},), "
            f"got {tuple(w.shape)}"
        )
    check_finite(w, "weight")
    u, v = (exact(z).reshape(len(z), -1) for z in (a, b))
    u, v = (z / torch.linalg.vector_norm(z, dim=1, keepdim=True) for z in (u, v))
    # More accurate than the arc cosine where the codes nearly coincide.
    angle = 2 * torch.atan2(*(torch.linalg.vector_norm(z, dim=1) for z in (u - v, u + v)))
    if readable(angle) and not bool((angle < torch.pi - 1e-6).all()):  # so that a NaN fails
        raise ValueError(
            "a, b: expected nonzero codes that are not opposite to each other, "
            f"got angles up to {float(angle.max()):g}"
        )
    whole = torch.sinc(angle / torch.pi)
    first, second = (c * torch.sinc(c * angle / torch.pi) / whole for c in (1 - w, w))
    return linear(first, a, second, b)

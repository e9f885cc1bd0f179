"""Arithmetic of coefficients and states.

A coefficient is either a tensor of shape (B,), one number for each sample, or a plain float
where the whole batch is at one time. `expand` prepares either for multiplying a state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ._ones import are_ones, ones_like
from ._tracing import transformed

Coefficient: TypeAlias = Tensor | float

# (x - y)^2, one operation forward and one backward: torch.nn.functional.mse_loss without its
# preparations, which take three times as long as the operation.
squares: Callable[[Tensor, Tensor], Tensor] = partial(
    torch._C._nn.mse_loss,
    reduction=0,  # type: ignore[arg-type]
)


def expand(coefficient: Coefficient, like: Tensor) -> Coefficient:
    """Shape a coefficient (B,) so that it multiplies a state (B, *D).

    Args:
        coefficient: a tensor (B,), or a float, which is returned unchanged.
        like: the state (B, *D).

    Returns:
        Tensor (B, 1, ..., 1) in the state's dtype, at least float32; or the float.
    """
    if not isinstance(coefficient, Tensor):
        return coefficient
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    if coefficient.dtype is not dtype:
        coefficient = coefficient.to(dtype=dtype)
    return coefficient.view(-1, *(1,) * (like.ndim - 1))


def add_scaled(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """Return x + factor * y for tensors of the same shape."""
    if torch.compiler.is_compiling():
        # Inductor drops alpha where y is a matrix product, seen in torch 2.13; it fuses the rest.
        return x + y * factor
    return torch.add(x, y, alpha=factor)


def linear(first: Coefficient, x: Tensor, second: Coefficient, y: Tensor) -> Tensor:
    """Return first * x + second * y for coefficients (B,) or numbers, in the dtype of x."""
    if not (
        isinstance(first, Tensor)
        or isinstance(second, Tensor)
        or x.dtype != y.dtype
        or torch.compiler.is_compiling()
        or transformed()
    ):
        if first == 1.0:
            return torch.add(x, y, alpha=second)
        if first >= 0.25 and abs(first + second - 1.0) < 1e-15:
            # One pass instead of two. It computes first as 1 - second in the dtype of x.
            return torch.lerp(x, y, second)
        return torch.mul(x, first).add_(y, alpha=second)
    second = expand(second, y)
    if are_ones(first) and isinstance(second, Tensor) and x.dtype == y.dtype == second.dtype:
        return torch.addcmul(x, y, second)
    out = x * expand(first, x)
    # In place: for images, fresh memory costs more than the arithmetic. Under vmap the sum may
    # have a dimension that the product lacks.
    fresh = transformed()
    if isinstance(second, Tensor):
        out = torch.addcmul(out, y, second) if fresh else out.addcmul_(y, second)
    else:
        fresh = fresh or torch.compiler.is_compiling()
        out = add_scaled(out, y, second) if fresh else out.add_(y, alpha=second)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def noised(alpha: Tensor, x0: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha x0 + sigma eps for coefficients (B,), and the two in the dtype of the state."""
    dtype, shape = x0.dtype, (-1, *(1,) * (x0.ndim - 1))
    std = sigma.to(dtype=dtype)
    if are_ones(alpha):
        return torch.addcmul(x0, eps, std.view(shape)), torch.ones_like(alpha, dtype=dtype), std
    scale = alpha.to(dtype=dtype)
    x = x0 * scale.view(shape)
    noise = std.view(shape)
    # In place, as in `linear`.
    x = torch.addcmul(x, eps, noise) if transformed() else x.addcmul_(eps, noise)
    return x, scale, std


def add_noise(mean: Tensor, std: Coefficient, noise: Tensor, value: float = 1.0) -> Tensor:
    """Return mean + value * std * noise, in the dtype of mean.

    The result reuses the noise's memory where no gradient is recorded: pass noise that is not
    used elsewhere. The standard deviation is (B,), (B, 1, ..., 1) or a float.
    """
    out = None if torch.is_grad_enabled() or transformed() else noise
    if not isinstance(std, Tensor):
        if out is None or torch.compiler.is_compiling():
            return add_scaled(mean, noise, value * std)
        return torch.add(mean, noise, alpha=value * std, out=out)
    factor = std if std.ndim == mean.ndim else cast(Tensor, expand(std, mean))
    if factor.dtype == mean.dtype:
        return torch.addcmul(mean, factor, noise, value=value, out=out)
    return (mean + value * factor * noise).to(mean.dtype)


def per_sample(coefficient: Coefficient, x: Tensor) -> Tensor:
    """Return the coefficient as a tensor (B,) in the dtype of x, at least float32."""
    dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    if isinstance(coefficient, Tensor):
        if are_ones(coefficient) and coefficient.dtype != dtype:
            return ones_like(coefficient, dtype)
        return coefficient.to(dtype=dtype)
    return torch.full((x.shape[0],), coefficient, dtype=dtype, device=x.device)


def equals(coefficient: Coefficient, value: float) -> bool:
    """Return whether a coefficient is a given number, for the whole batch."""
    return not isinstance(coefficient, Tensor) and coefficient == value


def scaled(factor: Coefficient, x: Tensor) -> Tensor:
    """Return factor * x for a coefficient (B,) or a number, in the dtype of x."""
    if equals(factor, 1.0):
        return x
    out = x * expand(factor, x)
    return out if out.dtype == x.dtype else out.to(x.dtype)

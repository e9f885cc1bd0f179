"""Linear systems of matrices that may be indefinite, given by products; one for each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A residual that fell to this share of the last one is a good next direction (Jiranek 2010).
_REDUCED = 0.9


def minimal_residual(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    iterations: int,
    tolerance: float,
    symmetric: bool = False,
    floor: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Solve matrix(v) = b, a system of its own for each sample, by minimal residuals (GMRES).

    After k iterations the residual is the smallest one of all v in the Krylov space,

    .. math::
        \min |b - S v|, \quad v \in \mathrm{span}(b, S b, \dots, S^{k-1} b),

    so it never grows, whatever S: conjugate gradients need a symmetric positive definite one, as
    the Jacobian of a network is not, and their residual may grow for that too. A sample's solution
    is final once its residual is below tolerance times the norm of b; it does not depend on the
    other samples.

    Args:
        matrix: maps vectors (B, \*E) to their products.
        b: the right-hand sides (B, \*E).
        iterations: the maximum number of iterations.
        tolerance: the relative residual to stop at.
        symmetric: whether S is symmetric: then two directions are kept instead of all.
        floor: the part of S that is no covariance, a number or of the shape of b; None for any S.

    Returns:
        The solutions (B, \*E), and the residuals by iteration, relative to b, (n + 1, B).

    Source: Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7(3), 1986; in the form of Jiranek
    and Rozloznik, Adaptive version of simpler GMRES, Numerical Algorithms 53(1), 2010.
    """
    shape, tiny = b.shape, 10 * torch.finfo(b.dtype).eps
    r = b.flatten(1) if b.ndim > 1 else b.unsqueeze(1)
    v, (size, p) = torch.zeros_like(r), _normalized(r)
    first, goal, largest = size, tolerance * size, torch.zeros_like(size)
    shares, kept = [torch.ones_like(size[:, 0])], list[tuple[Tensor, Tensor]]()
    for _ in range(iterations):
        going = size > goal
        if not bool(going.any()):
            break
        q = matrix(p.view(shape)).reshape(r.shape)
        largest = torch.maximum(largest, _norm(q).detach())
        for _ in range(2):  # rounding leaves a part of what was taken away once
            for direction, image in kept:
                along = _dot(image, q)
                p, q = p - along * direction, q - along * image
        rest = _norm(q)
        going = going & (rest > tiny * largest * _norm(p))  # otherwise it is rounding
        scale = torch.where(going, 1 / torch.where(going, rest, 1.0), 0.0)
        p, q = p * scale, q * scale
        kept = [*(kept[-1:] if symmetric else kept), (p, q)]
        step = _dot(q, r)
        if floor is not None:
            image = b - (r - step * q).view(shape)
            going = going & _plausible((v + step * p).view(shape), image, floor)
            step = torch.where(going, step, 0.0)
        v, r = v + step * p, r - step * q
        new, unit = _normalized(r)
        p = torch.where(new <= _REDUCED * size, unit, q)
        size = torch.where(going, new, 0.0)
        shares.append((new / torch.where(first > 0, first, 1.0))[:, 0])
    return v.view(shape), torch.stack(shares)


def _plausible(v: Tensor, image: Tensor, floor: float | Tensor) -> Tensor:
    """Return whether v S v >= v diag(floor) v (B, 1), with half of it allowed for rounding."""
    return ((image - 0.5 * floor * v) * v).reshape(len(v), -1).sum(1, keepdim=True) >= 0


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(1, keepdim=True)


def _norm(u: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return size


def _normalized(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms (B, 1) of vectors (B, n), and the vectors over them."""
    size = _norm(u)
    return size, u / torch.where(size > 0, size, 1.0)

"""The divergence of a model's prediction: exact, or by random probes, from one forward pass."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import check_count
from .._schedules import exact
from ..random import Generators, randn

Function = Callable[[Tensor], Tensor]


class Divergence(abc.ABC):
    """A way to find the divergence of a function of a state, in reverse mode.

    A subclass calls the function once, with gradients, and may ask `products` for vectors times
    its Jacobian.

    Attributes:
        probes: how many independent estimates K it returns of each divergence.
    """

    probes: int = 1

    @abc.abstractmethod
    def start(self, x: Tensor, generator: Generators = None) -> Any:
        """Draw what stays fixed along a path that starts at a state x (B, *D)."""

    @abc.abstractmethod
    def __call__(self, function: Function, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Return the value (B, *D) at x (B, *D) and its divergence (K, B), from one call.

        Args:
            function: maps (B, *D) to (B, *D), each sample by itself.
            x: the state (B, *D).
            state: what `start` returned.
        """


class Hutchinson(Divergence):
    r"""The stochastic estimate of the divergence by vector-Jacobian products.

    .. math::
        \nabla \cdot f = E[v^\top J v], \quad E[v v^\top] = I

    With Rademacher probes its variance is 2 sum_{i != j} A_ij^2 for the symmetric part A of the
    Jacobian J, none for a diagonal one; with Gaussian probes it is 2 sum_ij A_ij^2. The probes
    are drawn once for each sample and path: the estimate is a smooth function along the path,
    which an adaptive solver can follow. A probe costs one backward pass.

    Args:
        probes: how many estimates K to return; from two on, their spread tells their error.
        noise: the law of the probes.

    Raises:
        ValueError: if probes < 1 or the noise is unknown.
        TypeError: if probes is not an integer.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990;
    Grathwohl et al., FFJORD, 2019, arXiv 1810.01367.

    >>> x = torch.zeros(2, 3)
    >>> hutchinson = Hutchinson()
    >>> value, divergence = hutchinson(lambda x: 2 * x, x, hutchinson.start(x))
    >>> divergence  # exact for a diagonal Jacobian
    tensor([[6., 6.]], dtype=torch.float64)
    """

    def __init__(
        self, probes: int = 1, noise: Literal["rademacher", "gaussian"] = "rademacher"
    ) -> None:
        """Keep the number of probes and their law."""
        check_count(probes, "probes")
        if noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise: expected 'rademacher' or 'gaussian', got {noise!r}")
        self.probes = probes
        self.noise = noise

    def __repr__(self) -> str:
        return f"Hutchinson(probes={self.probes}, noise={self.noise!r})"

    def start(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Draw the probes (K, B, *D)."""
        shape = (x.shape[0], self.probes, *x.shape[1:])
        v = randn(shape, generator=generator, device=x.device, dtype=x.dtype).transpose(0, 1)
        return v if self.noise == "gaussian" else torch.where(v < 0, -1.0, 1.0).to(x.dtype)

    def __call__(self, function: Function, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, value = _forward(function, x)
        inner = []
        for k, v in enumerate(state, 1):  # one by one: memory does not grow with the probes
            row = products(value, x, v.unsqueeze(0), keep=k < len(state))[0]
            inner.append((exact(v) * exact(row)).reshape(len(x), -1).sum(1))
        return value.detach(), torch.stack(inner)


class ExactDivergence(Divergence):
    """The trace of the Jacobian, row by row, for data of moderate dimension d.

    It costs d backward passes for each forward pass, `chunk` of them at a time.

    Args:
        chunk: how many rows to compute together; memory grows with it.

    Raises:
        ValueError: if chunk < 1.
        TypeError: if chunk is not an integer.

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> ExactDivergence()(lambda x: x**2, x, None)[1]
    tensor([[6.]], dtype=torch.float64)
    """

    def __init__(self, chunk: int = 32) -> None:
        """Keep the size of a chunk."""
        check_count(chunk, "chunk")
        self.chunk = chunk

    def __repr__(self) -> str:
        return f"ExactDivergence(chunk={self.chunk})"

    def start(self, x: Tensor, generator: Generators = None) -> None:
        """Draw nothing."""

    def __call__(self, function: Function, x: Tensor, state: None) -> tuple[Tensor, Tensor]:
        x, value = _forward(function, x)
        total = exact(x.new_zeros(len(x)))
        d = x[0].numel()
        for first in range(0, d, self.chunk):
            last = min(first + self.chunk, d)
            rows = torch.zeros(last - first, d, dtype=value.dtype, device=x.device)
            rows.diagonal(first).fill_(1.0)
            vectors = rows.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            jacobian = products(value, x, vectors, keep=last < d).reshape(len(rows), len(x), d)
            total += exact(jacobian).mul(rows.unsqueeze(1)).sum((0, 2))
        return value.detach(), total.unsqueeze(0)


def _forward(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return x, function(x)


def products(value: Tensor, x: Tensor, vectors: Tensor, *, keep: bool) -> Tensor:
    """Return vectors (K, B, *D) times the Jacobian of a value (B, *D) by x, (K, B, *D).

    Several at once where every operation of the function can be batched, else one by one. The
    parameters get no gradient.

    Args:
        value: what a function made of x, with its graph.
        x: the state, a leaf.
        vectors: the vectors.
        keep: whether the graph will be asked again.
    """
    if not value.requires_grad:  # a function that does not depend on x
        return torch.zeros_like(vectors)
    if len(vectors) > 1:
        try:
            return _grad(value, x, vectors, keep=True, batched=True)
        except RuntimeError:  # an operation without a rule for batches
            pass
    last = len(vectors) - 1
    return torch.stack(
        [_grad(value, x, v, keep=keep or k < last, batched=False) for k, v in enumerate(vectors)]
    )


def _grad(value: Tensor, x: Tensor, vectors: Tensor, *, keep: bool, batched: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(
        value, x, vectors, retain_graph=keep, is_grads_batched=batched, materialize_grads=True
    )
    return gradient.expand_as(vectors)  # zeros where x is not used, once for all vectors

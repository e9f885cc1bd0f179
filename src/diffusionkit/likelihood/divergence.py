"""The divergence of a prediction, exact or by random probes, from one forward pass."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_count
from .._repr import Described
from .._returned import wrap
from .._schedules import exact
from ..random import Generators, randn

Function = Callable[[Tensor], Tensor]


class Divergence(abc.ABC):
    """An exact or stochastic divergence of a function, by reverse-mode differentiation.

    A subclass calls the function once, with gradients, and may use `products` for
    vector-Jacobian products. Value and divergence can be differentiated if gradients are enabled.

    Attributes:
        probes: the number K of independent estimates of each divergence.
    """

    probes: int = 1

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the shapes of values and divergences."""
        super().__init_subclass__(**kwargs)
        wrap(cls, "__call__", _check_divergence)

    @abc.abstractmethod
    def start(self, x: Tensor, generator: Generators = None) -> Any:
        """Draw the random state, fixed along a path that starts at x (B, *D)."""

    @abc.abstractmethod
    def __call__(self, function: Function, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Return the value (B, *D) at x (B, *D) and its divergence (K, B).

        Args:
            function: maps (B, *D) to (B, *D), each sample independently.
            x: the state (B, *D).
            state: the result of `start`.
        """


def _check_divergence(
    part: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = args[1] if len(args) > 1 else kwargs["x"]
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{type(part).__name__}: expected a value and its divergence, "
            f"got {type(result).__name__}"
        )
    shapes = tuple(x.shape), (part.probes, len(x))
    for name, value, shape in zip(("a value", "a divergence"), result, shapes, strict=True):
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{type(part).__name__}: expected {name} of shape {shape}, got {got}")


class Hutchinson(Described, Divergence):
    r"""Hutchinson's stochastic estimate of the divergence, by vector-Jacobian products.

    .. math::
        \nabla \cdot f = E[v^\top J v], \quad E[v v^\top] = I

    With Rademacher probes the variance is 2 sum_{i != j} A_ij^2 for the symmetric part A of the
    Jacobian J, zero for a diagonal A; with Gaussian probes it is 2 sum_ij A_ij^2. Probes are
    drawn once per sample and path, so the estimate is smooth along the path, as an adaptive
    solver requires. A probe costs one backward pass.

    Args:
        probes: the number K of estimates; with two or more, their spread estimates the error.
        noise: the distribution of the probes.

    Raises:
        ValueError: if probes < 1 or the noise is unknown.
        TypeError: if probes is not an integer.

    Source: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990;
    Grathwohl et al., FFJORD, 2019, arXiv 1810.01367.

    >>> import torch
    >>> from diffusionkit import Hutchinson
    >>> x = torch.zeros(2, 3)
    >>> hutchinson = Hutchinson()
    >>> state = hutchinson.start(x)
    >>> value, divergence = hutchinson(lambda x: 2 * x, x, state)
    >>> divergence  # exact for a diagonal Jacobian
    tensor([[6., 6.]], dtype=torch.float64)
    """

    def __init__(
        self, probes: int = 1, noise: Literal["rademacher", "gaussian"] = "rademacher"
    ) -> None:
        check_count(probes, "probes")
        check_choice("noise", noise, ("rademacher", "gaussian"))
        self.probes = probes
        self.noise = noise

    @override
    def start(self, x: Tensor, generator: Generators = None) -> Tensor:  # (K, B, *D)
        shape = (x.shape[0], self.probes, *x.shape[1:])
        v = randn(shape, generator=generator, device=x.device, dtype=x.dtype).transpose(0, 1)
        return v if self.noise == "gaussian" else torch.where(v < 0, -1.0, 1.0).to(x.dtype)

    @override
    def __call__(self, function: Function, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, value, again = _forward(function, x)
        inner = []
        for k, v in enumerate(state, 1):  # sequential: memory does not grow with the probes
            row = products(value, x, v.unsqueeze(0), keep=k < len(state), again=again)[0]
            inner.append((exact(v) * exact(row)).reshape(len(x), -1).sum(1))
        return value if again else value.detach(), torch.stack(inner)


class ExactDivergence(Described, Divergence):
    """The exact trace of the Jacobian, row by row, for data of moderate dimension d.

    It costs d backward passes for each forward pass, `chunk` of them at a time.

    Args:
        chunk: the number of rows computed together; memory grows with it.

    Raises:
        ValueError: if chunk < 1.
        TypeError: if chunk is not an integer.

    >>> import torch
    >>> from diffusionkit import ExactDivergence
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> ExactDivergence()(lambda x: x**2, x, None)[1].tolist()
    [[6.0]]
    """

    def __init__(self, chunk: int = 32) -> None:
        check_count(chunk, "chunk")
        self.chunk = chunk

    @override
    def start(self, x: Tensor, generator: Generators = None) -> None:
        return None

    @override
    def __call__(self, function: Function, x: Tensor, state: None) -> tuple[Tensor, Tensor]:
        x, value, again = _forward(function, x)
        total = exact(x.new_zeros(len(x)))
        d = x[0].numel()
        for first in range(0, d, self.chunk):
            last = min(first + self.chunk, d)
            rows = torch.zeros(last - first, d, dtype=value.dtype, device=x.device)
            rows.diagonal(first).fill_(1.0)
            vectors = rows.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            jacobian = products(value, x, vectors, keep=last < d, again=again)
            jacobian = jacobian.reshape(len(rows), len(x), d)
            total = total + exact(jacobian).mul(rows.unsqueeze(1)).sum((0, 2))
        return value if again else value.detach(), total.unsqueeze(0)


def _forward(function: Function, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the state, the value there, and whether the derivatives are differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if again and x.requires_grad else x.detach().requires_grad_()
        return x, function(x), again


def products(
    value: Tensor, x: Tensor, vectors: Tensor, *, keep: bool, again: bool = False
) -> Tensor:
    """Return the products (K, B, *D) of vectors with the Jacobian of a value with respect to x.

    They are computed in one batch if all operations of the function support it, else one by one.
    Parameters receive no gradients.

    Args:
        value: the value (B, *D) of a function at x, with its graph.
        x: the state (B, *D).
        vectors: the vectors (K, B, *D).
        keep: whether to retain the graph for further calls.
        again: whether the products are differentiated in turn.
    """
    keep = keep or again
    if not value.requires_grad:  # a function that does not depend on x
        return torch.zeros_like(vectors)
    if len(vectors) > 1:
        try:
            return _grad(value, x, vectors, keep=True, batched=True, again=again)
        except RuntimeError:  # an operation without a batching rule
            pass
    last = len(vectors) - 1
    return torch.stack(
        [
            _grad(value, x, v, keep=keep or k < last, batched=False, again=again)
            for k, v in enumerate(vectors)
        ]
    )


def _grad(
    value: Tensor, x: Tensor, vectors: Tensor, *, keep: bool, batched: bool, again: bool
) -> Tensor:
    (gradient,) = torch.autograd.grad(
        value, x, vectors, retain_graph=keep, create_graph=again, is_grads_batched=batched,
        materialize_grads=True,
    )  # fmt: skip
    return gradient.expand_as(vectors)  # one zero tensor for all vectors if x is unused

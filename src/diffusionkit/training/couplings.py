"""Couplings of data and noise, for flows that are straighter than those of independent pairs."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .._checks import check_finite, check_same, check_state


def optimal_coupling(x0: Tensor, eps: Tensor, *, class_labels: Tensor | None = None) -> Tensor:
    r"""Return the noise in the order that brings it nearest to the data: optimal transport.

    .. math::
        \pi = \arg\min_\pi \sum_i \|x_{0,i} - \epsilon_{\pi(i)}\|^2

    over the permutations of a batch. Trained on such pairs,
    ``ScoreMatching(VelocityWeighting())(model, x0, eps=optimal_coupling(x0, eps))``, the
    probability flow is straighter and few steps have a smaller error; the effect grows with the
    batch size and falls with the number of dimensions. The cost is that of a linear assignment,
    O(B^3): about a millisecond for a batch of 256 and .1 s for 2048, on the CPU.

    The flow still ends in the distribution of the data, so `ProbabilityFlow`, `ODELikelihood` and
    deterministic predictors remain correct. Given the data the noise is no longer Gaussian, so the
    model's score is not that of p_t: stochastic predictors, correctors, constraints, gradient
    guidance and `NELBO` are not correct.

    Args:
        x0: the data (B, *D).
        eps: standard normal noise (B, *D).
        class_labels: the classes (B,) that the model is conditioned on. Pairs are then made within
            each class: across classes, the noise of a class would not be Gaussian.

    Returns:
        The noise (B, *D), reordered.

    Raises:
        ValueError: if the two differ in shape, dtype or device, or are not finite, or class_labels
            is not (B,).
        TypeError: if they are not floating-point tensors, or class_labels does not hold integers.

    Source: Tong et al., Improving and Generalizing Flow-Based Generative Models with Minibatch
    Optimal Transport, 2024, arXiv 2302.00482; Pooladian et al., Multisample Flow Matching, 2023,
    arXiv 2304.14772.

    >>> import torch
    >>> from diffusionkit import optimal_coupling
    >>> x0 = torch.tensor([[-1.0], [0.0], [2.0]])
    >>> optimal_coupling(x0, torch.tensor([[0.1], [0.9], [-0.5]])).flatten()
    tensor([-0.5000,  0.1000,  0.9000])
    """
    check_state(x0, "x0")
    check_state(eps, "eps")
    check_same(eps, x0, "eps", "x0")
    check_finite(x0, "x0")
    check_finite(eps, "eps")
    if class_labels is None:
        return eps[_assignment(x0, eps)]
    if not isinstance(class_labels, Tensor) or class_labels.is_floating_point():
        got = getattr(class_labels, "dtype", type(class_labels).__name__)
        raise TypeError(f"class_labels: expected a tensor of integers, got {got}")
    if class_labels.shape != x0.shape[:1]:
        raise ValueError(
            f"class_labels: expected shape ({len(x0)},), got {tuple(class_labels.shape)}"
        )
    order = torch.arange(len(x0), device=x0.device)
    for label in torch.unique(class_labels):
        rows = (class_labels == label).nonzero().flatten().to(x0.device)
        order[rows] = rows[_assignment(x0[rows], eps[rows])]
    return eps[order]


@torch.no_grad()
def _assignment(x0: Tensor, eps: Tensor) -> Tensor:
    """Return the index of the noise for each data point, int64 (B,)."""
    optimize = importlib.import_module("scipy.optimize")  # torchdiffeq brings it; slow to import
    # Of the squared distance, only the product depends on the pair.
    product = (x0.flatten(1) if x0.ndim > 1 else x0[:, None]).double().cpu() @ (
        eps.flatten(1) if eps.ndim > 1 else eps[:, None]
    ).double().cpu().T
    _, columns = optimize.linear_sum_assignment(product.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64, device=x0.device)

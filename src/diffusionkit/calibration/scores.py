"""Proper scores of ensembles: CRPS for numbers, the energy score for vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_flag
from ._cases import checked, weighted

_NAMES = ("ensemble", "observation")


def crps(ensemble: Tensor, observation: Tensor, *, fair: bool = True) -> Tensor:
    r"""Return the continuous ranked probability score of each element, in units of the data.

    .. math::
        \frac1m \sum_i |x_i - y| - \frac{1}{m (m - 1)} \sum_{i < j} |x_i - x_j|

    for m members x_i and the observation y. Its expectation over ensembles drawn from p is

    .. math::
        E|X - y| - \tfrac12 E|X - X'| = \int (F(z) - 1\{y \le z\})^2\, dz

    for every m >= 2: it does not prefer large ensembles, and its mean over observations is smallest
    if p is their distribution. With `fair=False` the second sum is divided by m^2, the score of the
    m points as a distribution, which is too large by E|X - X'| / (2 m). Sorting takes
    O(m log m), without the pairs in memory.

    Args:
        ensemble: the members (n, m, *D).
        observation: the observations (n, *D).
        fair: whether to estimate the score of the distribution that the members are drawn from.

    Returns:
        The scores (n, *D); smaller is better. Fair scores may be negative, their mean is not.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or a fair score has one member.
        TypeError: if either is not a floating-point tensor.

    Source: Ferro, Fair scores for ensemble forecasts, 2014; Gneiting and Raftery, Strictly Proper
    Scoring Rules, Prediction, and Estimation, 2007.

    >>> import torch
    >>> from diffusionkit.calibration import crps
    >>> crps(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0]))
    tensor([1.])
    """
    check_flag(fair, "fair")
    ensemble, observation = checked(ensemble, observation, least=1 + fair, names=_NAMES)
    _, ensemble, observation = weighted(None, ensemble, observation, _NAMES)
    return element_crps(ensemble, observation, fair=fair)


def element_crps(ensemble: Tensor, observation: Tensor, *, fair: bool = True) -> Tensor:
    """Return the scores (n, *D) of validated tensors."""
    m = ensemble.shape[1]
    distance = (ensemble - observation.unsqueeze(1)).abs().mean(1)
    x = ensemble.sort(1).values
    # Around the median, so that a large common value costs no digits.
    x = x - x[:, m // 2 : m // 2 + 1]
    rank = torch.arange(1 - m, m, 2, dtype=x.dtype, device=x.device)
    pairs = torch.einsum("nm...,m->n...", x, rank)
    return distance - pairs / (m * (m - 1) if fair else m * m)


def energy_score(
    ensemble: Tensor,
    observation: Tensor,
    *,
    weights: Tensor | None = None,
    fair: bool = True,
) -> Tensor:
    r"""Return the energy score of each case, the CRPS of vectors with Euclidean distances.

    .. math::
        \frac1m \sum_i \|x_i - y\| - \frac{1}{m (m - 1)} \sum_{i < j} \|x_i - x_j\|, \quad
        \|z\|^2 = \sum_k w_k z_k^2

    It is proper for the joint distribution of the elements, and depends on their correlations,
    though weakly where there are many; scale elements of different units first. In one dimension it
    is `crps`. It takes m (m - 1) / 2 distances, in memory m at a time.

    Args:
        ensemble: the members (n, m, *D).
        observation: the observations (n, *D).
        weights: weights >= 0 of the elements, (n, *D) or with sizes of 1, such as the areas of the
            cells of a grid; values may be NaN where they are 0. All 1 by default.
        fair: whether to estimate the score of the distribution that the members are drawn from.

    Returns:
        The scores (n,); smaller is better.

    Raises:
        ValueError: if shapes do not fit, weights are negative or all 0, values are not finite, or a
            fair score has one member.
        TypeError: if an argument is not a tensor, or not floating-point.

    Source: Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007;
    Ferro, Fair scores for ensemble forecasts, 2014.

    >>> import torch
    >>> from diffusionkit.calibration import energy_score
    >>> ensemble = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    >>> energy_score(ensemble, torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    check_flag(fair, "fair")
    ensemble, observation = checked(ensemble, observation, least=1 + fair, names=_NAMES)
    return case_energy(*weighted(weights, ensemble, observation, _NAMES), fair=fair)


def case_energy(
    weights: Tensor | None, ensemble: Tensor, observation: Tensor, *, fair: bool = True
) -> Tensor:
    """Return the scores (n,) of validated tensors."""
    n, m = ensemble.shape[:2]
    x, y = ensemble.reshape(n, m, -1), observation.reshape(n, 1, -1)
    scale = None if weights is None else weights.reshape(n, 1, -1).sqrt()
    if scale is not None:
        x, y = x * scale, y * scale
    pairs = x.new_zeros(n)
    for i in range(m - 1):
        pairs = pairs + torch.linalg.vector_norm(x[:, i + 1 :] - x[:, i : i + 1], dim=2).sum(1)
    distance: Tensor = torch.linalg.vector_norm(x - y, dim=2).mean(1)
    return distance - pairs / (m * (m - 1) if fair else m * m)

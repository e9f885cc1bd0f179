"""Classifiers of noisy data: a network with preconditioning, its loss and its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import (
    check_callable,
    check_count,
    check_finite,
    check_part,
    check_positive,
    check_state,
    readable,
)
from .._coefficients import Coefficient, expand, per_sample
from .._grid_times import kernel
from .._hints import label_advice
from .._loops import Progress, with_progress
from .._precision import NetworkDtype, at_least_float32, state_dtype
from .._repr import described
from .._sigma_data import SigmaData, as_sigma_data, check_channels, over_channels, spread
from ..interfaces import ForwardSDE, TimeSampler
from ..models.labels import Label, LogSigmaLabel, checked_label
from ..random import Generators
from ..training.optim import clipped_step
from ..training.times import UniformTimes, times_and_weights, weighted_losses
from ._guided import check_process, shape_or_type

Classifier = TypeVar("Classifier", bound=nn.Module)


class NoiseClassifier(nn.Module):
    r"""A classifier of noisy data, conditioned on the noise level of any process.

    .. math::
        \mathrm{logits} = F\!\left(\frac{x}{\sqrt{\alpha^2 \sigma_d^2 + \sigma^2}};\
        \mathrm{label}(t)\right)

    so that the network's input has unit variance at every time.

    Args:
        network: maps (x (B, *D), noise_label (B,)) to logits (B, K).
        sde: the forward process.
        sigma_data: the standard deviation of the data, or one for each channel, as in `EDMModel`.
        label: the noise label, log(sigma / alpha) / 4 by default.

    Raises:
        ValueError: unless sigma_data is finite and positive.
        TypeError: if the network or the label is not callable, or sde is not a ForwardSDE.

    >>> import torch
    >>> from diffusionkit import VPSDE, NoiseClassifier
    >>> network = lambda x, noise_label: x[:, :3]  # logits of three classes
    >>> classifier = NoiseClassifier(network, VPSDE())
    >>> classifier(torch.ones(2, 5), torch.tensor([0.1, 0.9])).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sde: ForwardSDE,
        sigma_data: SigmaData = 0.5,
        *,
        label: Label | None = None,
    ) -> None:
        """Keep the network and the process."""
        super().__init__()
        check_part(sde, ForwardSDE, "sde")
        self.network = network
        self.sde = sde
        self.sigma_data: float | tuple[float, ...] = as_sigma_data(sigma_data)
        self.label = LogSigmaLabel() if label is None else label
        check_callable(network, "network")
        check_callable(self.label, "label")
        self._dtype = NetworkDtype(network)

    @override
    def __repr__(self) -> str:
        return described(self)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the logits (B, K) of a state x (B, *D) at times t (B,)."""
        alpha, sigma = kernel(self.sde, x, t)
        scale: Coefficient
        x = at_least_float32(x)
        if isinstance(self.sigma_data, tuple):
            check_channels(self.sigma_data, x)
            whole = per_sample(alpha, x), per_sample(sigma, x)
            x = x / over_channels(spread(*whole, self.sigma_data), x)
            scale = 1.0
        else:
            scale = ((alpha * self.sigma_data) ** 2 + sigma**2) ** -0.5
        dtype = self._dtype(self.network) or x.dtype
        label = checked_label(self.label(self.sde, t), t).to(state_dtype(dtype))
        logits: Tensor = self.network((x * expand(scale, x)).to(dtype), label)
        return logits


def class_log_probs(
    classifier: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, class_labels: Tensor
) -> Tensor:
    """Return a classifier's log p(y | x, t) (B,) of class labels y (B,), in at least float32.

    Raises:
        ValueError: if the logits are not (B, K), or class_labels is not (B,) or not in [0, K).
        TypeError: if class_labels does not hold integers.
    """
    check_class_labels(class_labels, len(x))
    logits = classifier(x, t)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(
            f"classifier: expected logits of shape ({len(x)}, K), got {shape_or_type(logits)}"
        )
    if readable(class_labels):
        low, high, classes = int(class_labels.min()), int(class_labels.max()), logits.shape[1]
        if not 0 <= low <= high < classes:
            raise ValueError(
                f"class_labels: expected integers in [0, {classes}), as many as the classifier "
                f"has logits, got {low} to {high}"
            )
    logs = torch.log_softmax(at_least_float32(logits), 1)
    return logs.gather(1, class_labels.long().unsqueeze(1)).squeeze(1)


def check_class_labels(class_labels: object, batch: int) -> None:
    """Raise unless class labels are a tensor of integers, one for each sample."""
    if not isinstance(class_labels, Tensor):
        got = f"{type(class_labels).__name__}{label_advice(class_labels, batch)}"
        raise TypeError(f"class_labels: expected a tensor of shape ({batch},), got {got}")
    dtype = class_labels.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        hint = label_advice(class_labels, batch)
        raise TypeError(f"class_labels: expected integers, got {dtype}{hint}")
    if class_labels.shape != (batch,):
        raise ValueError(
            f"class_labels: expected one label for each sample, shape ({batch},), "
            f"got {tuple(class_labels.shape)}{label_advice(class_labels, batch)}"
        )


def classifier_loss(
    classifier: Callable[[Tensor, Tensor], Tensor],
    sde: ForwardSDE,
    x0: Tensor,
    class_labels: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    r"""Return the cross-entropies (B,) of a classifier on noisy data.

    .. math::
        \ell_i = -w_i \log p(y_i \mid \alpha x_{0,i} + \sigma \epsilon_i, t_i)

    The true p(y | x, t), which guidance needs, minimizes it.

    Args:
        classifier: maps (x (B, *D), t (B,)) to logits (B, K).
        sde: the forward process, that of the model to be guided.
        x0: the data (B, *D).
        class_labels: their classes y (B,).
        times: the distribution of training times, uniform by default; w are its weights.
        t: times (B,) to use instead of random ones, with weight 1.
        generator: the source of times and noise.

    Raises:
        ValueError: if shapes do not match, data are not finite, a class label is out of range, the
            classifier is a `NoiseClassifier` of another process, or both times and t are given.
        TypeError: if x0 or t is not a floating-point tensor, class_labels does not hold integers,
            or times is not a TimeSampler.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations,
    2021, arXiv 2011.13456 (appendix I); Dhariwal and Nichol, Diffusion Models Beat GANs on Image
    Synthesis, 2021, arXiv 2105.05233.
    """
    check_callable(classifier, "classifier")
    check_part(sde, ForwardSDE, "sde")
    check_state(x0, "x0")
    check_finite(x0, "x0")
    check_process(classifier, sde, "classifier")
    if t is not None and times is not None:
        raise ValueError("times: expected times or t, got both")
    times = UniformTimes() if times is None else times
    check_part(times, TimeSampler, "times")
    t, weight = times_and_weights(times, sde, x0, t, generator)
    x = sde.perturb(x0, t, generator=generator).x
    return weighted_losses(-class_log_probs(classifier, x, t, class_labels), weight)


def train_noise_classifier(
    classifier: Classifier,
    sde: ForwardSDE,
    data: Tensor,
    class_labels: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    times: TimeSampler | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = False,
) -> Classifier:
    """Train a classifier of noisy data with Adam, and return it in evaluation mode.

    A plain loop for data that fit in memory, with a learning rate that decays linearly to zero.
    For anything else, write your own around `classifier_loss`.

    Args:
        classifier: maps (x (B, *D), t (B,)) to logits (B, K); trained in place, on its device.
        sde: the forward process, that of the model to be guided.
        data: the data (N, *D), on the classifier's device.
        class_labels: their classes (N,).
        steps: the number of steps.
        batch_size: the size B of the batches, drawn with replacement.
        lr: the initial learning rate.
        times: the distribution of training times, uniform by default.
        generator: the source of batches, times and noise.
        progress: True for a bar (tqdm, if installed), or a function that wraps an iterable.

    Raises:
        ValueError: if shapes do not match, data are not finite, a number is out of range, or the
            classifier is a `NoiseClassifier` of another process.
        TypeError: if an argument has the wrong type, or class_labels does not hold integers.

    Source: as for `classifier_loss`.
    """
    check_part(classifier, nn.Module, "classifier")
    check_state(data, "data")
    check_finite(data, "data")
    check_class_labels(class_labels, len(data))
    check_count(steps, "steps")
    check_count(batch_size, "batch_size")
    check_positive(lr, "lr")
    if generator is not None:
        check_part(generator, torch.Generator, "generator")
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    classifier.train()
    source = data.device if generator is None else generator.device
    for _ in with_progress(range(steps), progress):
        rows = torch.randint(len(data), (batch_size,), generator=generator, device=source)
        rows = rows.to(data.device)
        loss = classifier_loss(
            classifier, sde, data[rows], class_labels[rows], times=times, generator=generator
        )
        loss.mean().backward()  # type: ignore[no-untyped-call]
        clipped_step(optimizer)
        schedule.step()
    return classifier.eval()

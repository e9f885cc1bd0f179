"""Classifiers of noisy data: what they are told, their loss, and a loop that trains one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._checks import (
    check_count,
    check_finite,
    check_part,
    check_positive,
    check_state,
    check_times,
    readable,
)
from .._loops import Progress, with_progress
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, TimeSampler
from ..models.labels import Label, LogSigmaLabel
from ..random import Generators
from ..training.optim import clipped_step
from ..training.times import UniformTimes
from ..values import expand

Classifier = TypeVar("Classifier", bound=nn.Module)


class NoiseClassifier(nn.Module):
    r"""A network that classifies noisy data of any process, told the level of the noise.

    .. math::
        \mathrm{logits} = F\!\left(\frac{x}{\sqrt{\alpha^2 \sigma_d^2 + \sigma^2}};\
        \mathrm{label}(t)\right)

    so that what the network sees has unit variance at every time.

    Args:
        network: maps (x (B, *D), noise_label (B,)) to logits (B, K).
        sde: the forward process.
        sigma_data: the standard deviation of the data.
        label: what the network is told about time, log(sigma / alpha) / 4 by default.

    Raises:
        ValueError: unless sigma_data is finite and positive.
        TypeError: if the network or the label is not callable, or sde is not a ForwardSDE.

    >>> from diffusionkit import VPSDE
    >>> classifier = NoiseClassifier(lambda x, noise_label: x[:, :3], VPSDE())
    >>> classifier(torch.ones(2, 5), torch.tensor([0.1, 0.9])).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sde: ForwardSDE,
        sigma_data: float = 0.5,
        *,
        label: Label | None = None,
    ) -> None:
        """Join the network and the process."""
        super().__init__()
        check_part(sde, ForwardSDE, "sde")
        check_positive(sigma_data, "sigma_data")
        self.network = network
        self.sde = sde
        self.sigma_data = sigma_data
        self.label = LogSigmaLabel() if label is None else label
        for name, part in (("network", network), ("label", self.label)):
            if not callable(part):
                raise TypeError(f"{name}: expected a callable, got {type(part).__name__}")

    def extra_repr(self) -> str:
        """Return what the network does not show."""
        return f"sde={self.sde!r}, sigma_data={self.sigma_data}, label={self.label!r}"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the logits (B, K) of a state x (B, *D) at times t (B,)."""
        check_state(x)
        check_times(t, self.sde.T, len(x), x)
        alpha, sigma = self.sde.kernel(t)
        scale = ((alpha * self.sigma_data) ** 2 + sigma**2) ** -0.5
        label = self.label(self.sde, t).to(torch.promote_types(x.dtype, torch.float32))
        logits: Tensor = self.network((x * expand(scale, x)).to(x.dtype), label)
        return logits


def class_log_probs(
    classifier: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, y: Tensor
) -> Tensor:
    """Return log p(y | x, t) (B,), in float32 at least, of labels y (B,) by a classifier.

    Raises:
        ValueError: if the logits are not (B, K), or y is not (B,) or not in [0, K).
        TypeError: if y does not hold integers.
    """
    check_labels(y, len(x))
    logits = classifier(x, t)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"classifier: expected logits of shape ({len(x)}, K), got {got}")
    if readable(y) and not (int(y.min()) >= 0 and int(y.max()) < logits.shape[1]):
        raise ValueError(
            f"y: expected labels in [0, {logits.shape[1]}), as the classifier's, "
            f"got {int(y.min())} to {int(y.max())}"
        )
    logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    return logs.gather(1, y.long().unsqueeze(1)).squeeze(1)


def check_process(classifier: object, sde: ForwardSDE) -> None:
    """Raise if a classifier has a process of its own, and it is another (read on the CPU only)."""
    own = getattr(classifier, "sde", None)
    if own is sde or not isinstance(own, ForwardSDE):
        return
    if own.T != sde.T:
        raise ValueError(f"classifier: expected a process with T = {sde.T:g}, got {own.T:g}")
    t = sde.T * torch.linspace(0.1, 1.0, 4, dtype=torch.float64)
    expected, got = (_marginals(one, t) for one in (sde, own))
    if not readable(t) or torch.allclose(got, expected, rtol=1e-3):
        return
    k = int((got - expected).abs().sum(0).argmax())
    raise ValueError(
        f"classifier: expected the process of the model, {type(sde).__name__} with alpha and sigma "
        f"= {expected[:, k].tolist()} at t = {float(t[k]):g}, "
        f"got {type(own).__name__} with {got[:, k].tolist()}"
    )


@torch.no_grad()
def _marginals(sde: ForwardSDE, t: Tensor) -> Tensor:
    """Return alpha and sigma (2, n) at times (n,), on the CPU."""
    return torch.stack(sde.marginal(t.to(home(sde), schedule_dtype(home(sde))))).to(t)


def check_labels(y: object, batch: int, name: str = "y") -> None:
    """Raise unless y is a tensor of one integer for each sample."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a tensor of labels ({batch},), got {type(y).__name__}")
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer labels, got {y.dtype}")
    if y.shape != (batch,):
        raise ValueError(
            f"{name}: expected one label for each sample, shape ({batch},), got {tuple(y.shape)}"
        )


def classifier_loss(
    classifier: Callable[[Tensor, Tensor], Tensor],
    sde: ForwardSDE,
    x0: Tensor,
    y: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    r"""Return the cross-entropies (B,) of a classifier on noisy data.

    .. math::
        \ell_i = -w_i \log p(y_i \mid \alpha x_{0,i} + \sigma \epsilon_i, t_i)

    Its minimum over all classifiers is the true p(y | x, t), which is what guidance needs.

    Args:
        classifier: maps (x (B, *D), t (B,)) to logits (B, K).
        sde: the forward process, that of the model to be guided.
        x0: the data (B, *D).
        y: their labels (B,).
        times: the law of the times, uniform by default; w are its weights.
        t: times (B,) to use instead of drawn ones, with weight 1.
        generator: the source of times and noise.

    Raises:
        ValueError: if shapes do not match, data are not finite, a label is out of range, the
            classifier is a `NoiseClassifier` of another process, or both times and t are given.
        TypeError: if x0 or t is not a floating-point tensor, y does not hold integers, or times
            is not a TimeSampler.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (appendix I); Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021,
    arXiv 2105.05233.
    """
    check_part(sde, ForwardSDE, "sde")
    check_state(x0, "x0")
    check_finite(x0, "x0")
    check_process(classifier, sde)
    if t is None:
        law = UniformTimes() if times is None else times
        check_part(law, TimeSampler, "times")
        dtype = torch.promote_types(x0.dtype, torch.float32)
        t, weight = law.sample(sde, len(x0), generator=generator, device=x0.device, dtype=dtype)
    else:
        if times is not None:
            raise ValueError("expected times or t, got both")
        check_times(t, sde.T, len(x0), x0)
        weight = torch.ones_like(t)
    x = sde.perturb(x0, t, generator=generator).x
    return -weight * class_log_probs(classifier, x, t, y)


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
    """Train a classifier on noisy data of all times, by Adam, and return it in evaluation mode.

    A plain loop for data that fit in memory, its learning rate falling to zero over the run; for
    more than that, write your own around `classifier_loss`.

    Args:
        classifier: maps (x (B, *D), t (B,)) to logits (B, K); trained in place, on its device.
        sde: the forward process, that of the model to be guided.
        data: the data (N, *D), on the classifier's device.
        class_labels: their classes (N,).
        steps: the number of steps.
        batch_size: the size B of the batches, drawn with replacement.
        lr: the learning rate at the start.
        times: the law of the times, uniform by default.
        generator: the source of batches, times and noise.
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.

    Raises:
        ValueError: if shapes do not match, data are not finite, a number is out of range, or the
            classifier is a `NoiseClassifier` of another process.
        TypeError: if classifier is not a module, data or labels are not tensors of their kind,
            or times or generator is not one.

    Source: as `classifier_loss`.
    """
    check_part(classifier, nn.Module, "classifier")
    check_state(data, "data")
    check_finite(data, "data")
    check_labels(class_labels, len(data), "class_labels")
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

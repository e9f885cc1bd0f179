"""The variational bound on discrete data under a chain, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._batch_conditions import repeated
from .._chain_terms import chain_length, error_factor, error_scale, prior_kl, step_nats
from .._checks import check_count, check_flag, check_part, readable
from .._coefficients import expand
from .._loops import Progress, check_progress, with_progress, without_gradients
from .._masks import kept_levels, zeroed
from .._precision import network_dtype, state_dtype
from .._repr import Described
from .._schedules import exact, schedule_dtype
from ..decoders import GaussianDecoder
from ..distributed._gradients import check_gradients_averaged
from ..interfaces import ScoreModel
from ..random import Generators, check_generator
from ._control_variates import SquaredErrors


@dataclass(frozen=True, slots=True, eq=False)
class ChainBound:
    """An estimate of a bound on -log P(images) under a chain, step by step.

    Args:
        prior: the KL divergence of x_T from the prior (B,), nats, exact.
        terms: the terms of the steps (B, T), nats: first the reconstruction from x_1, then the KL
            divergences of the other steps, the last from x_T.
    """

    prior: Tensor
    terms: Tensor

    @property
    def nats(self) -> Tensor:
        """The bound, the sum of the prior and all terms (B,), nats."""
        return self.prior + self.terms.sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class BitsPerStep:
    """Means of the terms of `ChainBound` over a data set, bits per dimension, float64 on the CPU.

    Args:
        prior: the mean of the prior term, a scalar.
        prior_stderr: its standard error over the images, a scalar.
        terms: the means of the steps' terms (T,), the reconstruction first.
        terms_stderr: their standard errors (T,).
    """

    prior: Tensor
    prior_stderr: Tensor
    terms: Tensor
    terms_stderr: Tensor


def bits_per_step(bounds: ChainBound | Iterable[ChainBound], dims: int) -> BitsPerStep:
    r"""Return the mean and standard error over images of each term of their bounds.

    .. math::
        \bar b_i = \frac{1}{N d \ln 2} \sum_n \ell_{n i}, \quad
        \mathrm{stderr}_i = \sqrt{\frac{1}{N (N - 1)} \sum_n (b_{n i} - \bar b_i)^2}

    Batches are processed in sequence, so memory does not grow with the data set.

    Args:
        bounds: results of `ChainNELBO`, for one batch or several.
        dims: the dimension d of an image.

    Raises:
        ValueError: if dims < 1, there are fewer than two images, or the numbers of steps differ.
        TypeError: if bounds contains anything but a ChainBound.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (figure 2).

    >>> import torch
    >>> from diffusionkit import (
    ...     ChainNELBO, DDPMChain, EpsModel, bits_per_step
    ... )
    >>> model = EpsModel(lambda x, noise_label: 0 * x, DDPMChain.cosine(10))
    >>> images = torch.randint(256, (8, 4))
    >>> bounds = (ChainNELBO(model)(some) for some in images.split(4))
    >>> bits_per_step(bounds, dims=4).terms.shape
    torch.Size([10])
    """
    check_count(dims, "dims")
    if isinstance(bounds, Tensor) or not isinstance(bounds, (ChainBound, Iterable)):
        raise TypeError(f"bounds: expected a ChainBound or several, got {type(bounds).__name__}")
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for bound in [bounds] if isinstance(bounds, ChainBound) else bounds:
        check_part(bound, ChainBound, "bounds")
        rows = torch.cat([bound.prior.unsqueeze(1), bound.terms], 1).cpu().double()
        if count and rows.shape[1:] != mean.shape:
            raise ValueError(
                f"bounds: expected {len(mean) - 1} steps, as before, got {rows.shape[1] - 1}"
            )
        # Chan's update: raw sums of squares would lose the digits of a small variance.
        batch_mean, n = rows.mean(0), len(rows)
        delta = batch_mean - mean
        share = n / (count + n)
        squares = squares + (rows - batch_mean).square().sum(0) + delta.square() * (count * share)
        mean, count = mean + delta * share, count + n
    if count < 2:
        raise ValueError(f"bounds: expected at least two images, got {count}")
    unit = dims * math.log(2)
    bits, stderr = mean / unit, torch.sqrt(squares / (count * (count - 1))) / unit
    return BitsPerStep(bits[0], stderr[0], bits[1:], stderr[1:])


class ChainNELBO(Described):
    r"""The variational bound on -log P(images) of integers under a chain of T steps.

    .. math::
        -\log P(k) \le KL(q(x_T | x_0) \,\|\, N(0, \pi^2 I))
        + \sum_{i=1}^{T-1} E\left[KL(q(x_i | x_{i+1}, x_0) \,\|\, p(x_i | x_{i+1}))\right]
        + E\left[-\log p(x_0 | x_1)\right]

    for data x_0 at the levels k, with one draw of the noise for each step and the variances given
    by the model. From ten steps on, control variates from neighboring steps remove much of the
    variance and add no bias, as in `NELBO`; terms close to zero may then be negative. A mask
    restricts the bound to the elements that it keeps, as that of `NELBO` does. All steps are
    evaluated, without gradients; the model's mode is unchanged. For a data set use
    `evaluate_bits_per_dim`.

    Args:
        model: the score model; its SDE is a chain.
        decoder: the likelihood of the data in the first step, of 256 levels in [-1, 1] by
            default.
        clip: whether to clip the predicted data to the decoder's range, as in published numbers.
        steps_at_once: the number of steps evaluated together. With one generator per image the
            result does not depend on it.
        progress: whether to show progress, or a function that wraps the steps and shows it.

    Raises:
        TypeError: if a part has the wrong type, or the model's process is not a chain.
        ValueError: if steps_at_once < 1.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
    (equation 5); Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672.

    >>> import torch
    >>> from diffusionkit import ChainNELBO, DDPMChain, EpsModel
    >>> model = EpsModel(lambda x, noise_label: 0 * x, DDPMChain.cosine(10))
    >>> ChainNELBO(model)(torch.randint(256, (4, 3, 8, 8))).terms.shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        model: ScoreModel,
        decoder: GaussianDecoder | None = None,
        *,
        clip: bool = True,
        steps_at_once: int = 1,
        progress: Progress = False,
    ) -> None:
        chain_length(model)
        self.model = model
        self.decoder = GaussianDecoder() if decoder is None else decoder
        check_part(self.decoder, GaussianDecoder, "decoder")
        check_count(steps_at_once, "steps_at_once")
        check_flag(clip, "clip")
        check_progress(progress)
        self.clip = clip
        self.steps_at_once = steps_at_once
        self.progress = progress

    @without_gradients()
    def __call__(
        self,
        images: Tensor,
        /,
        *,
        mask: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> ChainBound:
        """Return the terms of the bound for images (B, *D).

        Args:
            images: integers 0 ... levels - 1, (B, *D), of any integer dtype.
            mask: the pixels to bound the probability of, booleans or 0 and 1, (B, *D) or with sizes
                of 1.
            generator: the source of noise: one, one for each image, or None.
            cond: passed to the model; tensors (B, ...) are repeated for each step.

        Raises:
            TypeError: if images are not integers.
            ValueError: if a value is not a level, a prediction is not finite (checked on the CPU
                only), or the mask does not fit or has other numbers than 0 and 1.
        """
        check_gradients_averaged(self.model)
        if mask is not None:
            mask, images = kept_levels(mask, images)
        x = self.decoder.encode(images, dtype=state_dtype(network_dtype(self.model)))
        x = zeroed(x, mask)
        check_generator(generator, len(x))
        count = chain_length(self.model)
        errors, scales = SquaredErrors(count, mask), []
        starts = range(0, count, self.steps_at_once)
        parts = []
        for i in with_progress(starts, self.progress):
            steps = range(i, min(i + self.steps_at_once, count))
            nats, scale = self._terms(x, steps, errors, generator, cond, mask)
            parts.append(nats)
            scales.append(scale)
        noise = errors.control() * torch.cat(scales).unsqueeze(1)
        terms = (torch.cat(parts) - noise).T.contiguous()
        return ChainBound(prior_kl(self.model.sde, x, mask), terms)

    def _terms(
        self,
        x: Tensor,
        steps: range,
        errors: SquaredErrors,
        generator: Generators,
        cond: dict[str, Any],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Append errors, and return the terms (steps, B) and the factors (steps,) of errors."""
        n, many = len(x), len(steps)
        if generator is not None and not isinstance(generator, torch.Generator):
            generator = list(generator) * many
        device = x.device
        step = torch.tensor(steps, device=device).repeat_interleave(n)
        t = (step + 1).to(schedule_dtype(device)) / chain_length(self.model)
        sample = self.model.sde.perturb(repeated(x, n, many), t, generator=generator)
        prediction = self.model.predict(
            sample.x, t.to(x.dtype), **{k: repeated(value, n, many) for k, value in cond.items()}
        )
        own = repeated(mask, n, many)
        nats = step_nats(
            self.model, prediction, sample.x0, step, self.decoder, clip=self.clip, mask=own
        )
        if readable(nats) and not bool(torch.isfinite(nats).all()):
            worst = int(step[~torch.isfinite(nats)][0])
            raise ValueError(
                f"model: expected a finite prediction, got NaN or infinity at step {worst}"
            )
        mean = prediction.x0
        mean = mean.clamp(self.decoder.low, self.decoder.high) if self.clip else mean
        ratio = cast(Tensor, expand(error_scale(sample.alpha, sample.sigma), mean))
        difference = zeroed((mean - sample.x0) * ratio, own)
        for k in range(many):
            errors.add(difference[k * n : (k + 1) * n], sample.eps[k * n : (k + 1) * n])
        scale = error_factor(self.model, step.view(many, n)[:, 0])
        if prediction.log_var is not None:  # of any size, and then the factor is not known
            scale = torch.zeros_like(scale)
        return exact(nats).view(many, n), scale

"""Compare losses and other small work of training and evaluation with the bare arithmetic.

The bare arithmetic of a loss is one plain function in float32, with the same network: random
times, the schedule, the noisy data, the network, the weighted mean of squares and the gradients. It
is what one would write by hand for this one loss: times of importance sampling by the inverse of
their distribution in closed form, steps of a chain by their number in two tables, and weights
multiplied out, so that those of importance sampling are one constant and EDM's a quotient. It has
no float64, which low noise needs, and looks at no value, so that NaN passes unnoticed. Peers: the
released stable target, rewritten (all differences as one tensor), prdc and numpy.

    python benchmarks/objectives.py [--rounds 15] [--only stable] [--save]
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from side_by_side import Case, Run, options, repeated, report
from stf import released
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffusionkit import (
    EDMSDE,
    EMA,
    VESDE,
    VPSDE,
    DDPMChain,
    DiscreteTimes,
    EDMModel,
    EDMWeighting,
    EpsModel,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    ScaledScoreModel,
    ScoreMatching,
    StableTarget,
    StepLabel,
    clipped_step,
)
from diffusionkit.interfaces import ScoreModel
from diffusionkit.metrics import FeatureMoments, precision_recall

BATCH = 128
VP, CHAIN = VPSDE(), DDPMChain.linear(1000)


class Small(nn.Module):
    """Two hidden layers of 64 on data and noise label."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, d)
        )

    @override
    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """Return the output (B, d)."""
        output: Tensor = self.layers(torch.cat([x, noise_label.unsqueeze(1)], 1))
        return output


class Affine(nn.Module):
    """One layer that ignores the noise label: next to nothing but the loss."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, d)

    @override
    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """Return the output (B, d)."""
        output: Tensor = self.layer(x)
        return output


def backward(losses: Tensor) -> None:
    """Compute the gradients of the mean of losses (B,)."""
    losses.mean().backward()  # type: ignore[no-untyped-call]


def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of VP."""
    integral = t * (0.1 + 9.95 * t)
    return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))


def noisy(x0: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return noisy data and their noise."""
    eps = torch.randn_like(x0)
    return alpha[:, None] * x0 + sigma[:, None] * eps, eps


def bare_losses(network: nn.Module, x0: Tensor) -> dict[str, Run]:
    """Return the arithmetic of losses by name."""

    def times() -> Tensor:
        return 1e-5 + (1 - 1e-5) * torch.rand(len(x0))

    def simple() -> None:
        t = times()
        x, eps = noisy(x0, *kernel(t))
        backward((network(x, 999 * t) - eps).square().mean(1))

    def scaled() -> None:
        sigma = 0.01 * torch.exp(math.log(5000) * times())
        eps = torch.randn_like(x0)
        output = network(x0 + sigma[:, None] * eps, torch.log(0.5 * sigma))
        backward((output + eps).square().mean(1))

    def edm() -> None:
        sigma = torch.exp(1.2 * torch.randn(len(x0)) - 1.2)
        x = x0 + sigma[:, None] * torch.randn_like(x0)
        std = torch.sqrt(sigma * sigma + 0.25)
        output = network(x / std[:, None], torch.log(sigma) / 4)
        skip, scale = 0.25 / (std * std), 0.5 * sigma / std
        errors = skip[:, None] * x + scale[:, None] * output - x0
        backward(errors.square().mean(1) / scale.square())

    def likelihood() -> None:
        t = times()
        alpha, sigma = kernel(t)
        x, eps = noisy(x0, alpha, sigma)
        weights = (0.1 + 19.9 * t) / sigma.square()
        backward((network(x, 999 * t) - eps).square().mean(1) * weights)

    ends = torch.tensor([VP.t_min, VP.T], dtype=torch.float64)
    first, last = VP.log_snr(ends).tolist()

    def importance() -> None:
        u = (torch.rand(1) + torch.arange(len(x0)) / len(x0)) % 1.0
        integral = F.softplus((first - last) * u - first)
        t = 2 * integral / (0.1 + torch.sqrt(0.01 + 39.8 * integral))
        x, eps = noisy(x0, *kernel(t))
        backward((network(x, 999 * t) - eps).square().mean(1) * (first - last))

    alphas, sigmas = (c.float() for c in CHAIN.marginal(CHAIN.time(torch.arange(1000))))

    def chain() -> None:
        i = torch.randint(1000, (len(x0),))
        x, eps = noisy(x0, alphas[i], sigmas[i])
        backward((network(x, i.float()) - eps).square().mean(1))

    return {
        "VP, simple": simple,
        "VE, scaled score": scaled,
        "EDM": edm,
        "VP, likelihood weighting": likelihood,
        "VP, importance sampling": importance,
        "DDPM chain": chain,
    }


def losses(network: nn.Module) -> dict[str, tuple[ScoreMatching, ScoreModel]]:
    """Return objectives and models by name."""
    likelihood = LikelihoodWeighting()
    return {
        "VP, simple": (ScoreMatching(), EpsModel(network, VP)),
        "VE, scaled score": (ScoreMatching(), ScaledScoreModel(network, VESDE())),
        "EDM": (
            ScoreMatching(EDMWeighting(), times=LogNormalTimes()),
            EDMModel(network, EDMSDE()),
        ),
        "VP, likelihood weighting": (ScoreMatching(likelihood), EpsModel(network, VP)),
        "VP, importance sampling": (
            ScoreMatching(likelihood, times=ImportanceTimes()),
            EpsModel(network, VP),
        ),
        "DDPM chain": (
            ScoreMatching(times=DiscreteTimes()),
            EpsModel(network, CHAIN, label=StepLabel(1000)),
        ),
    }


def learn(loss: ScoreMatching, model: ScoreModel, x0: Tensor) -> None:
    """Compute the gradients of an objective."""
    backward(loss(model, x0))


def loss_cases() -> Iterator[Case]:
    """Losses and their gradients on vectors and on as many numbers as a small image has."""
    for kind, d, repeats in ((Affine, 2, 20), (Small, 2, 20), (Small, 3072, 2)):
        network, x0 = kind(d), torch.randn(BATCH, d)
        layers = "one layer" if kind is Affine else "three layers"
        for name, bare in bare_losses(network, x0).items():
            loss, model = losses(network)[name]

            yield Case(
                f"loss and gradients, {name}, ({BATCH}, {d}), {layers}",
                repeated(partial(learn, loss, model, x0), repeats),
                repeated(bare, repeats),
                per=repeats,
            )


def optimizer_cases() -> Iterator[Case]:
    """The cost of a step apart from its gradients."""
    network = Small(2)
    gradients = [torch.randn_like(p) for p in network.parameters()]
    weights, ema = [p.detach().clone() for p in network.parameters()], EMA(network)

    def give() -> None:
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            p.grad = gradient.clone()

    fast, bare_optimizer = (torch.optim.Adam(network.parameters(), lr=1e-6) for _ in range(2))

    def ours() -> None:
        give()
        clipped_step(fast)

    def bare() -> None:
        give()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        bare_optimizer.step()
        bare_optimizer.zero_grad(set_to_none=True)

    def average() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(weights, list(network.parameters()), 1e-4)

    yield Case("clipped Adam step, 6 tensors", repeated(ours, 10), repeated(bare, 10), per=10)
    ours_averaged = repeated(partial(ema.update, network), 10)
    yield Case("EMA update, 6 tensors", ours_averaged, repeated(average, 10), per=10)


def stable_target_cases() -> Iterator[Case]:
    """Targets of a batch at all noise levels."""
    sde, target = VESDE(), StableTarget()
    for batch, n, d in ((128, 4096, 2), (64, 256, 2), (64, 256, 3072)):
        generator = torch.Generator().manual_seed(0)
        reference = torch.rand((n, d), generator=generator) * 2 - 1
        times = torch.linspace(sde.t_min, sde.T, batch)
        sample = sde.perturb(reference[:batch], times, generator=generator)
        yield Case(
            f"stable target, ({batch}, {d}), {n} references",
            partial(target, sample, reference),
            peers={"released operations": partial(released, sample, reference)},
        )


def metric_cases() -> Iterator[Case]:
    """Precision and recall, and the moments of features."""
    for n, d in ((1000, 2048), (2000, 64)):
        real, fake = torch.randn(n, d), 1.05 * torch.randn(n, d)
        yield Case(
            f"precision and recall, 2 x ({n}, {d})",
            partial(precision_recall, real, fake),
            peers=prdc(real, fake),
        )
    features = torch.randn(3000, 1024)
    wide = features.double().numpy()

    def moments() -> None:
        found = FeatureMoments()
        found.update(features)
        _ = found.covariance

    yield Case(
        "mean and covariance, (3000, 1024), float64",
        moments,
        peers={"numpy": lambda: (wide.mean(0), np.cov(wide, rowvar=False))},
    )


def prdc(real: Tensor, fake: Tensor) -> dict[str, Run]:
    """Return prdc's run, where it is installed."""
    try:
        found = importlib.import_module("prdc")
    except ImportError:
        return {}
    x, y = real.numpy(), fake.numpy()
    run = partial(found.compute_prdc, real_features=x, fake_features=y, nearest_k=3)
    return {"prdc": run}


def main() -> None:
    """Print the table, and save it for the docs if requested."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression for the names of rows")
    arguments = parser.parse_args()
    makers = (loss_cases, optimizer_cases, stable_target_cases, metric_cases)
    cases = [case for make in makers for case in make() if re.search(arguments.only, case.work)]
    report("objectives", cases, arguments)


if __name__ == "__main__":
    main()

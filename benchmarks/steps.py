"""Measure the cost of a sampler's step without its network, compared with other libraries.

The network returns a precomputed tensor, so that what is left is the step itself: tensor operations
and Python. A run has 50 steps and includes its set-up. Peers: k-diffusion, diffusers and azula,
where installed, and the loops of EDM and of score_sde, written in a few lines here. The bare
arithmetic is the fewest tensor operations that such a step can have. (azula's predictor-corrector
is another algorithm, with one draw a step.)

    python benchmarks/steps.py [--rounds 15] [--save]
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from peers import k_diffusion_sampling
from side_by_side import Case, Run, options, report
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DPMSolver2M,
    EpsModel,
    Euler,
    Heun,
    KarrasGrid,
    Langevin,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    ScaledScoreModel,
    UniPC,
    X0Model,
)

STEPS = 50
SHAPES = (16, 3, 32, 32), (4096, 2), (64, 2), (1, 3, 2, 2)


def bare(x: Tensor, *operations: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Return a run that applies some operations of the state and a fixed tensor in every step."""
    other = torch.randn_like(x)

    @torch.no_grad()
    def run() -> Tensor:
        state = x
        for _ in range(STEPS):
            for operation in operations:
                state = operation(state, other)
        return state

    return run


def scale(x: Tensor, other: Tensor) -> Tensor:
    """Return the state times a number."""
    return x * 0.9


def add(x: Tensor, other: Tensor) -> Tensor:
    """Return the state and a multiple of another tensor."""
    return torch.add(x, other, alpha=1e-3)


def draw(x: Tensor, other: Tensor) -> Tensor:
    """Return the state with noise."""
    return torch.add(x, torch.randn_like(x), alpha=1e-3)


def diffusers_run(x: Tensor, name: str, **settings: Any) -> dict[str, Run]:
    """Return a run of a scheduler of diffusers, or nothing where it is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    scheduler = getattr(importlib.import_module("diffusers"), name)(**settings)
    output = torch.randn_like(x)

    @torch.no_grad()
    def run() -> Tensor:
        state = x
        scheduler.set_timesteps(STEPS, device=x.device)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(state, t)
            state = scheduler.step(output, t, state).prev_sample
        return state

    return {"diffusers": run}


def diffusers_ve(x: Tensor) -> dict[str, Run]:
    """Return a run of the predictor-corrector scheduler of diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    scheduler = importlib.import_module("diffusers").ScoreSdeVeScheduler(snr=0.16)
    output = torch.randn_like(x)

    @torch.no_grad()
    def run() -> Tensor:
        state = x
        scheduler.set_timesteps(STEPS, device=x.device)
        scheduler.set_sigmas(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            _ = scheduler.sigmas[i] * torch.ones(len(x), device=x.device)
            state = scheduler.step_correct(output, state).prev_sample
            state = scheduler.step_pred(output, t, state).prev_sample
        return state

    return {"diffusers": run}


def k_diffusion_run(x: Tensor, name: str) -> dict[str, Run]:
    """Return a run of a sampler of k-diffusion, or nothing where it is not installed."""
    sampling = k_diffusion_sampling()
    if sampling is None:
        return {}
    output, sigmas = torch.randn_like(x), sampling.get_sigmas_karras(STEPS, 0.002, 80.0)
    sampler, sigmas = getattr(sampling, name), sigmas.to(x.device)
    return {"k-diffusion": lambda: sampler(lambda y, sigma: output, x, sigmas, disable=True)}


def azula_run(x: Tensor, name: str) -> dict[str, Run]:
    """Return a run of a sampler of azula, or nothing where it is not installed."""
    if importlib.util.find_spec("azula") is None:
        return {}
    sample, denoise, noise = (
        importlib.import_module(f"azula.{part}") for part in ("sample", "denoise", "noise")
    )
    posterior = denoise.DiracPosterior(mean=torch.randn_like(x))

    class Fixed(denoise.Denoiser):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.schedule = noise.VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            return posterior

    sampler = getattr(sample, name)(Fixed(), steps=STEPS, silent=True)
    return {"azula": lambda: sampler(x)}


def edm_run(x: Tensor, *, heun: bool) -> dict[str, Run]:
    """Return a run of EDM's sampler without churn: a state in float64, and times as tensors."""
    output = torch.randn_like(x)
    ramp = torch.arange(STEPS, dtype=torch.float64, device=x.device) / (STEPS - 1)
    times = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = torch.cat([times, times.new_zeros(1)])

    def slope(state: Tensor, t: Tensor) -> Tensor:
        state.to(torch.float32), t.to(torch.float32).reshape(-1, 1)  # the inputs of the network
        return (state - output.to(torch.float64)) / t

    @torch.no_grad()
    def run() -> Tensor:
        state = x.to(torch.float64)
        for i, (t, s) in enumerate(pairwise(times)):
            raised = torch.as_tensor(t + 0.0 * t)
            hat = state + (raised**2 - t**2).sqrt() * torch.randn_like(state)
            first = slope(hat, raised)
            state = hat + (s - raised) * first
            if heun and i < STEPS - 1:
                state = hat + (s - raised) * (0.5 * first + 0.5 * slope(state, s))
        return state

    return {"EDM": run}


class Released:
    """The steps of score_sde_pytorch: tables on the device, times as tensors, norms of the batch.

    Args:
        x: the initial state.
        ve: whether the process is VE, or else VP.
    """

    def __init__(self, x: Tensor, *, ve: bool = False) -> None:
        self.x, self.ve, self.output = x, ve, torch.randn_like(x)
        self.ones = (-1, *(1,) * (x.ndim - 1))
        self.betas = torch.linspace(0.1 / STEPS, 20.0 / STEPS, STEPS, device=x.device)
        self.sigmas = torch.logspace(-2, 1.7, STEPS, device=x.device)
        self.grid = torch.linspace(1.0, 1e-3, STEPS, device=x.device)

    def times(self) -> Iterator[Tensor]:
        """Return the times (B,) of all steps."""
        for i in range(STEPS):
            yield torch.ones(self.x.shape[0], device=self.x.device) * self.grid[i]

    def score(self, t: Tensor) -> Tensor:
        """Return the score of a network that predicts the noise, and the score for VE."""
        if self.ve:
            _ = 0.01 * (5000.0) ** t
            return self.output
        _ = t * 999
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        return -self.output / torch.sqrt(1.0 - torch.exp(2.0 * log_mean)).view(self.ones)

    def correct(self, state: Tensor, t: Tensor) -> Tensor:
        """Return the state after a Langevin step."""
        size = torch.ones_like(t) if self.ve else (1 - self.betas)[(t * (STEPS - 1)).long()]
        grad, noise = self.score(t), torch.randn_like(state)
        grad_norm = torch.norm(grad.reshape(grad.shape[0], -1), dim=-1).mean()
        noise_norm = torch.norm(noise.reshape(noise.shape[0], -1), dim=-1).mean()
        step = (0.16 * noise_norm / grad_norm) ** 2 * 2 * size
        mean: Tensor = state + step.view(self.ones) * grad
        return mean + torch.sqrt(step * 2).view(self.ones) * noise

    def predict(self, state: Tensor, t: Tensor) -> Tensor:
        """Return the state after a step of reverse diffusion."""
        index = (t * (STEPS - 1)).long()
        if self.ve:
            sigma = self.sigmas[index]
            before = torch.where(index == 0, torch.zeros_like(t), self.sigmas[index - 1])
            drift, g = torch.zeros_like(state), torch.sqrt(sigma**2 - before**2)
        else:
            beta = self.betas[index]
            drift = torch.sqrt(1 - beta).view(self.ones) * state - state
            g = torch.sqrt(beta)
        drift = drift - g.view(self.ones) ** 2 * self.score(t)
        return state - drift + g.view(self.ones) * torch.randn_like(state)

    def ancestral(self, state: Tensor, t: Tensor) -> Tensor:
        """Return the state after an ancestral step."""
        beta = self.betas[(t * (STEPS - 1)).long()].view(self.ones)
        mean = (state + beta * self.score(t)) / torch.sqrt(1.0 - beta)
        return mean + torch.sqrt(beta) * torch.randn_like(state)

    def run(self, *parts: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Run]:
        """Return a run of some parts in every step."""

        @torch.no_grad()
        def run() -> Tensor:
            state = self.x
            for t in self.times():
                for part in parts:
                    state = part(state, t)
            return state

        return {"score_sde": run}


def cases(x: Tensor) -> Iterator[Case]:
    """Return one case for each kind of step."""
    output, shape = torch.randn_like(x), tuple(x.shape)
    vp, edm, ve = VPSDE(), EDMSDE(), VESDE(sigma_max=50.0)
    eps = EpsModel(lambda x, noise_label: output, vp)
    x0 = X0Model(lambda x, noise_label: output, edm)
    scores = ScaledScoreModel(lambda x, noise_label: output, ve)
    karras, log_snr = KarrasGrid(to_zero=True), LogSNRGrid()

    def case(work: str, model: Any, grid: Any, arithmetic: Any, peers: Any, *parts: Any) -> Case:
        sampler = PCSampler(model, *parts, grid=grid, steps=STEPS, denoise=False)
        limit = bare(x, *arithmetic)
        return Case(f"{work}, {shape}", lambda: sampler(x), limit, peers, STEPS)

    vp_steps, ve_steps = Released(x), Released(x, ve=True)
    pc = add, draw, add, draw
    yield case(
        "DDIM", eps, None, (scale, add),
        diffusers_run(x, "DDIMScheduler") | azula_run(x, "DDIMSampler"), DDIM(),
    )  # fmt: skip
    yield case(
        "ancestral", eps, None, (scale, add, draw),
        diffusers_run(x, "DDPMScheduler")
        | azula_run(x, "DDPMSampler")
        | k_diffusion_run(x, "sample_euler_ancestral")
        | vp_steps.run(vp_steps.ancestral),
        Ancestral(),
    )  # fmt: skip
    yield case(
        "predictor-corrector, VP", eps, None, pc,
        vp_steps.run(vp_steps.correct, vp_steps.predict),
        ReverseDiffusion(), Langevin(),
    )  # fmt: skip
    yield case(
        "predictor-corrector, VE", scores, None, pc,
        diffusers_ve(x) | ve_steps.run(ve_steps.correct, ve_steps.predict),
        ReverseDiffusion(), Langevin(),
    )  # fmt: skip
    yield case(
        "2M of noise", eps, log_snr, (scale, add, add),
        diffusers_run(x, "DPMSolverMultistepScheduler"), DPMSolver2M(),
    )  # fmt: skip
    yield case(
        "2M of data", x0, karras, (scale, add, add),
        diffusers_run(x, "DPMSolverMultistepScheduler", prediction_type="sample")
        | k_diffusion_run(x, "sample_dpmpp_2m"),
        DPMSolver2M(),
    )  # fmt: skip
    yield case(
        "UniPC", eps, log_snr, (scale, add, add, add),
        diffusers_run(x, "UniPCMultistepScheduler"), UniPC(),
    )  # fmt: skip
    yield case(
        "DEIS, order 3", eps, log_snr, (scale, add, add, add),
        diffusers_run(x, "DEISMultistepScheduler", solver_order=3), DEIS(),
    )  # fmt: skip
    yield case(
        "Heun", x0, karras, (scale, add, scale, add, add),
        k_diffusion_run(x, "sample_heun") | azula_run(x, "HeunSampler") | edm_run(x, heun=True),
        Heun(),
    )  # fmt: skip
    yield case(
        "Euler", x0, karras, (scale, add),
        diffusers_run(x, "EulerDiscreteScheduler", prediction_type="sample")
        | k_diffusion_run(x, "sample_euler")
        | azula_run(x, "EulerSampler")
        | edm_run(x, heun=False),
        Euler(),
    )  # fmt: skip


def main() -> None:
    """Measure all kinds of steps on all shapes."""
    arguments = options(__doc__.partition("\n")[0]).parse_args()
    torch.manual_seed(0)
    states = [torch.randn(shape, device=arguments.device) for shape in SHAPES]
    report("steps", [case for x in states for case in cases(x)], arguments)


if __name__ == "__main__":
    main()

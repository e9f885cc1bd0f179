"""Guidance, constraints, correctors, time travel and predictors in every combination.

The data are Gaussian with independent coordinates, so the distribution of the samples is known:
each combination must match it, to the accuracy that the numbers of samples and steps allow.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    DEIS,
    LMS,
    VESDE,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver2S,
    DPMSolver2SAncestral,
    DPMSolver3M,
    DPMSolver3MSDE,
    Euler,
    EulerMaruyama,
    FlowMatchingSDE,
    GaussianMixtureModel,
    Heun,
    Inpainting,
    Langevin,
    LinearGaussianGuidance,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    SASolver,
    StochasticHeun,
    SubVPSDE,
    TimeTravel,
    UniPC,
)
from diffusionkit.interfaces import ScoreModel

STD = 0.5
HERE, THERE = torch.tensor([0.5, -0.5, 1.0]), torch.tensor([-1.0, 0.5, 0.0])
KNOWN = torch.tensor([0.8, 0.0, 0.0])
N, STEPS = 1000, 40
# Multiples of STEPS for about equal errors: more for first order, fewer for adaptive steps.
FACTORS = {
    AdaptiveSDE: 1 / 8, Ancestral: 3, DPMSolver2MSDE: 3, DPMSolver3MSDE: 3, Euler: 8,
    ReverseDiffusion: 4, SASolver: 3,
}  # fmt: skip
PROCESSES = {
    "VE": VESDE(sigma_max=20.0), "VP": VPSDE(), "sub-VP": SubVPSDE(), "flow": FlowMatchingSDE(),
}  # fmt: skip


class ClassConditional(ScoreModel):
    """Gaussian data around HERE for class 1, around THERE for class 0."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde
        self.parts = [gaussian(sde, mean) for mean in (THERE, HERE)]

    def predict(self, x, t, *, class_labels):
        (label,) = class_labels.unique().tolist()
        return self.parts[label].predict(x, t)


def gaussian(sde, mean):
    return GaussianMixtureModel(sde, mean[None], [STD])


def unguided(sde):
    return gaussian(sde, HERE), {}, HERE, [STD] * 3


def by_classifier(sde):
    """The exact classifier of two components selects one of them."""
    model = GaussianMixtureModel(sde, torch.stack([THERE, HERE]), [STD, STD])
    parts = [gaussian(sde, mean) for mean in (THERE, HERE)]

    def classifier(x, t):
        return torch.stack([part.log_prob(x, t) for part in parts], 1)

    guided = ClassifierGuidance(model, classifier)
    return guided, {"class_labels": torch.ones(N).long()}, HERE, [STD] * 3


def classifier_free(sde):
    """The scores have equal slopes, so the mean is extrapolated like the scores."""
    guided = ClassifierFreeGuidance(ClassConditional(sde), 2.0, null={"class_labels": 0})
    return guided, {"class_labels": torch.ones(N).long()}, 2 * HERE - THERE, [STD] * 3


def by_measurement(sde):
    """The last coordinate is measured as 0, with noise of the standard deviation of the data."""
    guided = LinearGaussianGuidance(gaussian(sde, HERE), lambda x: x[:, 2:], torch.zeros(1, 1), STD)
    mean = HERE * torch.tensor([1.0, 1.0, 0.5])
    return guided, {}, mean, [STD, STD, STD / 2**0.5]


GUIDANCE = {
    "unguided": unguided,
    "classifier": by_classifier,
    "classifier-free": classifier_free,
    "measurement": by_measurement,
}
PREDICTORS = {
    str(predictor): predictor
    for predictor in (
        EulerMaruyama(), ReverseDiffusion(), Ancestral(), Ancestral("forward"), DDIM(), DDIM(0.5),
        Euler(), Heun(), Heun(churn=10.0), StochasticHeun(), AdaptiveSDE(rtol=0.3, atol=0.1),
        DPMSolver2M(), DPMSolver2S(), DPMSolver3M(), DPMSolver3M(form="published"),
        DPMSolver2MSDE(), UniPC(order=2), UniPC(order=3), DEIS(order=3), DEIS(order=4),
        DEIS(order=3, variable="time"), LMS(order=4), DPMSolver3MSDE(), DPMSolver2SAncestral(),
        SASolver(), SASolver(0.5, 3, 3, s_min=0.1, s_max=5.0),
    )
}  # fmt: skip
CORRECTORS = {
    "no corrector": None,
    "annealed": AnnealedLangevin(),
    "langevin": Langevin(0.1, norm="batch"),
}
CONSTRAINTS = {"free": None, "inpainting": Inpainting(KNOWN, torch.tensor([1, 0, 0]))}
TRAVELS = {"once": None, "time_travel": TimeTravel(jump=5, repeats=2)}


def check(process, predictor, guidance, corrector, constraint, time_travel, steps=STEPS):
    sde = PROCESSES[process]
    model, cond, mean, std = GUIDANCE[guidance](sde)
    steps = steps * FACTORS.get(type(PREDICTORS[predictor]), 1.0)
    sampler = PCSampler(
        model, PREDICTORS[predictor], CORRECTORS[corrector], grid=LogSNRGrid(),
        steps=max(5, int(steps)),  # the jump of time travel
        constraint=CONSTRAINTS[constraint], time_travel=TRAVELS[time_travel],
    )  # fmt: skip
    x = sampler((N, 3), generator=seeded(), **cond)
    free = slice(0 if constraint == "free" else 1, 3)
    if constraint != "free":
        assert (x[:, 0] == KNOWN[0]).all()
    # Four standard errors are .06 of the mean and .09 of the deviation; the rest is discretization.
    off = (x.mean(0) - mean)[free].abs()
    assert off.max() < 0.12, off
    ratio = (x.std(0) / torch.tensor(std))[free]
    assert 0.85 < ratio.min() <= ratio.max() < 1.15, ratio


@pytest.mark.parametrize(
    ("predictor", "guidance"), [*zip(PREDICTORS, itertools.cycle(GUIDANCE), strict=False)]
)
def test_all_parts_together(predictor, guidance):
    """Every predictor with one guidance in turn; the slow test has all of them."""
    check("VP", predictor, guidance, "annealed", "inpainting", "time_travel", steps=24)


@pytest.mark.parametrize(
    ("predictor", "guidance"), [*zip(PREDICTORS, itertools.cycle([*GUIDANCE][::-1]), strict=False)]
)
def test_all_predictors_from_pure_noise(predictor, guidance):
    """Without a corrector that would mend a first step from alpha = 0."""
    check("flow", predictor, guidance, "no corrector", "inpainting", "once", steps=32)


def every_three() -> Iterator[tuple[str, ...]]:
    """Yield every process, predictor and guidance with one of each other part.

    A number modulo 3, 2 and 4 chooses the corrector, the constraint and the time travel: four
    consecutive numbers have all of each.
    """
    factors = CORRECTORS, CONSTRAINTS, TRAVELS
    for (j, process), (i, predictor), (k, guidance) in itertools.product(
        enumerate(PROCESSES), enumerate(PREDICTORS), enumerate(GUIDANCE)
    ):
        n = i + 5 * j + k
        others = (list(f)[m % len(f)] for f, m in zip(factors, (n, n, n // 2), strict=True))
        yield process, predictor, guidance, *others


def test_any_three_parts_meet():
    cases = list(every_three())
    factors = PROCESSES, PREDICTORS, GUIDANCE, CORRECTORS, CONSTRAINTS, TRAVELS
    assert len(cases) == len(PROCESSES) * len(PREDICTORS) * len(GUIDANCE)
    for chosen in itertools.combinations(range(len(factors)), 3):
        found = {tuple(case[at] for at in chosen) for case in cases}
        assert found == set(itertools.product(*(factors[at] for at in chosen))), chosen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "predictor", "guidance", "corrector", "constraint", "time_travel"),
    [*every_three()],
)
def test_combinations_with_any_three_parts(
    process, predictor, guidance, corrector, constraint, time_travel
):
    """416 of the 4,992 combinations; a fault of three parts together is in one of them."""
    check(process, predictor, guidance, corrector, constraint, time_travel)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_grid_of_one_step(predictor):
    """Multistep predictors raise in the constructor and say why."""
    model = gaussian(VPSDE(), HERE)
    if hasattr(PREDICTORS[predictor], "memory"):
        with pytest.raises(ValueError, match=r"grid: expected at least 2 steps for \w+, which rem"):
            PCSampler(model, PREDICTORS[predictor], steps=1)
    else:
        assert PCSampler(model, PREDICTORS[predictor], steps=1)((2, 3)).isfinite().all()

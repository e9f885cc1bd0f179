"""Losses weighted by a learned uncertainty."""

import math

import pytest
import torch
from support import seeded

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DiscreteTimes,
    EDMModel,
    EDMWeighting,
    EpsModel,
    FlowMatchingSDE,
    GaussianMixtureModel,
    ImportanceTimes,
    LearnedUncertainty,
    LikelihoodWeighting,
    LogNormalTimes,
    LossSecondMomentTimes,
    ScoreMatching,
    SubVPSDE,
    VelocityModel,
    held_out_loss,
    load_checkpoint,
    normalize_weights,
    save_checkpoint,
)
from diffusionkit.networks import MLP

SDES = [VPSDE(), VESDE(), SubVPSDE(), EDMSDE(), FlowMatchingSDE()]
X0 = 0.5 * torch.randn(8, 2, generator=seeded())


def test_the_default_is_the_objective_of_edm2() -> None:
    objective = LearnedUncertainty().objective
    assert objective.weighting == EDMWeighting(0.5)
    assert objective.times == LogNormalTimes(-0.4, 1.0)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_losses_are_those_of_the_objective_weighted(sde) -> None:
    """With the times' weights around the whole loss, whose mean over uniform times they keep."""
    model = GaussianMixtureModel(sde, [[0.3, -0.2]], [0.4])
    plain = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes())
    objective = LearnedUncertainty(plain, features=16)
    got = objective(model, X0, generator=seeded(3))
    t, weight = plain.times.sample(sde, 8, generator=seeded(3))
    u = objective.log_variance(sde, t)
    generator = seeded(3)
    plain.times.sample(sde, 8, generator=generator)
    loss = plain(model, X0, t=t, generator=generator)
    expected = weight * (loss / u.exp() + u)
    torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        plain(model, X0, generator=seeded(3)), weight * loss, check_dtype=False
    )


def test_the_uncertainty_is_a_product_with_cosines_of_the_label() -> None:
    objective, sde = LearnedUncertainty(features=4), EDMSDE()
    v = objective.linear.weight.detach()[0]
    for sigma in (0.01, 0.4, 80.0):
        angle = objective.frequencies * math.log(sigma) / 4 + objective.phases
        expected = float(math.sqrt(2) * (torch.cos(angle) @ v) / v.norm())
        got = objective.log_variance(sde, torch.tensor([sigma]))
        assert got.tolist() == pytest.approx([expected], abs=5e-4)  # 1e-4 is added to the norm


def test_initial_frequencies_are_those_of_fourier_features() -> None:
    objective = LearnedUncertainty(features=4000)
    assert float(objective.frequencies.std()) == pytest.approx(2 * math.pi, rel=0.05)
    assert float(objective.phases.mean()) == pytest.approx(math.pi, rel=0.05)
    assert 0 <= float(objective.phases.min()) < float(objective.phases.max()) < 2 * math.pi


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=repr)
def test_it_learns_the_logarithm_of_the_loss(sde) -> None:
    """For a loss known in closed form, between exp(-1.4) and exp(1.4), within 10 percent."""
    torch.manual_seed(0)

    def known(model, x0, /, *, t, generator=None):
        return torch.exp(0.1 * sde.log_snr(t)) * (1 + 0.5 * torch.sin(9 * t / sde.T))

    known.times = ImportanceTimes()
    objective = LearnedUncertainty(known, features=512)
    model = EpsModel(MLP(2, width=4), sde)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    x0, generator = torch.zeros(256, 2), seeded()
    for step in range(200):
        normalize_weights(objective)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        t, _ = known.times.sample(sde, len(x0), generator=generator)
        objective(model, x0, t=t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    t, _ = known.times.sample(sde, 100, generator=seeded(1))
    with torch.no_grad():
        error = objective.log_variance(sde, t) - known(model, x0, t=t).log()
    assert float(error.square().mean().sqrt()) < 0.1


def test_an_infinite_label_is_finite() -> None:
    """At alpha = 0 the logarithm of sigma / alpha is infinite."""
    model = VelocityModel(MLP(2, width=4), FlowMatchingSDE())
    objective = LearnedUncertainty(ScoreMatching(), features=8)
    losses = objective(model, X0, t=torch.full((8,), 1.0), generator=seeded())
    assert losses.isfinite().all()


def test_conditions_and_masks_reach_the_objective() -> None:
    torch.manual_seed(0)
    model = EDMModel(MLP(2, width=8, num_classes=3), EDMSDE())
    objective = LearnedUncertainty(features=8)
    labels, mask = torch.arange(8) % 3, torch.tensor([[1.0, 0.0]])
    t = torch.full((8,), 0.5)
    given = {"class_labels": labels, "mask": mask, "t": t}
    loss = objective.objective(model, X0, generator=seeded(1), **given)
    u = objective.log_variance(model.sde, t)
    got = objective(model, X0, generator=seeded(1), **given)
    torch.testing.assert_close(got, loss * torch.exp(-u) + u)


def test_one_generator_for_each_sample() -> None:
    model = EDMModel(MLP(2, width=8), EDMSDE())
    objective = LearnedUncertainty(features=8)
    both = objective(model, X0[:2], generator=[seeded(1), seeded(2)])
    alone = objective(model, X0[1:2], generator=[seeded(2)])
    torch.testing.assert_close(both[1:], alone)


def test_half_precision_keeps_the_label() -> None:
    torch.manual_seed(0)
    objective, t = LearnedUncertainty(features=8), torch.tensor([0.3, 0.31])
    before = objective.log_variance(EDMSDE(), t)
    after = objective.bfloat16().log_variance(EDMSDE(), t)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1)


def test_held_out_losses_are_of_the_objective_and_of_it() -> None:
    model = EDMModel(MLP(2, width=8), EDMSDE())
    objective = LearnedUncertainty(features=8)
    assert held_out_loss(objective.objective, model, X0).mean > 0
    assert math.isfinite(held_out_loss(objective, model, X0).mean)


def test_it_is_saved_with_a_checkpoint(tmp_path) -> None:
    def run():
        model, objective = EDMModel(MLP(2, width=8), EDMSDE()), LearnedUncertainty(features=8)
        optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()])
        return model, objective, optimizer

    model, objective, optimizer = run()
    objective(model, X0).mean().backward()
    optimizer.step()
    path = tmp_path / "run.pt"
    save_checkpoint(path, model, optimizer=optimizer, objective=objective, step=1)
    other, restored, again = run()
    load_checkpoint(path, other, optimizer=again, objective=restored)
    for name, value in objective.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    moments = again.state[restored.linear.weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[objective.linear.weight]["exp_avg"])


@pytest.mark.parametrize(
    ("objective", "error", "match"),
    [
        (lambda model, x0: x0, TypeError, r"objective\.times: expected a TimeSampler"),
        (3, TypeError, "objective: expected a callable"),
        (
            ScoreMatching(times=LossSecondMomentTimes(10)),
            ValueError,
            "objective: expected times that do not adapt",
        ),
    ],
)
def test_objectives_that_do_not_fit_raise(objective, error, match) -> None:
    with pytest.raises(error, match=match):
        LearnedUncertainty(objective)


def test_times_of_a_chain() -> None:
    assert LearnedUncertainty(ScoreMatching(times=DiscreteTimes())).times == DiscreteTimes()

"""Distributions of training times over the steps of a chain."""

import math

import pytest
import torch
from support import seeded
from support.processes import run_in_two_processes

from diffusionkit import VPSDE, DDPMChain, EpsModel, LikelihoodWeighting, ScoreMatching
from diffusionkit.training import SimpleWeighting, load_checkpoint, save_checkpoint
from diffusionkit.training.discrete_times import DiscreteTimes, LossSecondMomentTimes

CHAIN = DDPMChain([0.1, 0.2, 0.3, 0.4])
# Ten losses of each of four steps, and the probabilities and weights by independent code.
HISTORY = [
    [0.5, 0.6, 0.4, 0.55, 0.45, 0.5, 0.52, 0.48, 0.51, 0.49],
    [0.1] * 10,
    [0.02, 0.01, 0.03, 0.02, 0.015, 0.025, 0.01, 0.02, 0.03, 0.02],
    [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009000000000000001, 0.01],
]
PROBABILITIES = [0.7973545465728348, 0.15884833116380753, 0.0337063546106497, 0.010090767652708162]
WEIGHTS = [0.3135368087816674, 1.573828306337037, 7.416999046257325, 24.775122032752876]
AFTER = [0.8609455878681381, 0.1088945909720193, 0.023168601573018, 0.006991219586824619]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def learned(rows=HISTORY, **options) -> LossSecondMomentTimes:
    """The sampler after updates with the columns of losses."""
    times = LossSecondMomentTimes(**options)
    times.sample(CHAIN, 1)
    for losses in zip(*rows, strict=True):
        times.update(f64(0.25, 0.5, 0.75, 1.0), f64(*losses))
    return times


@pytest.mark.parametrize("sampler", [DiscreteTimes(), LossSecondMomentTimes(), learned()])
def test_draws_are_steps_of_the_chain(sampler) -> None:
    for dtype in (None, torch.float32):
        t, weight = sampler.sample(CHAIN, 4000, generator=seeded(), dtype=dtype)
        assert t.shape == weight.shape == (4000,)
        assert t.dtype == weight.dtype == (dtype or torch.float64)
        assert t.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    again, _ = sampler.sample(CHAIN, 4000, generator=seeded())
    assert torch.equal(again.float(), t)
    assert not sampler.unbiased
    own = [seeded(i) for i in range(3)]
    alone = [float(sampler.sample(CHAIN, 1, generator=[seeded(i)])[0]) for i in range(3)]
    assert sampler.sample(CHAIN, 3, generator=own)[0].tolist() == alone


def test_discrete_times_are_uniform_over_the_steps() -> None:
    t, weight = DiscreteTimes().sample(CHAIN, 40_000, generator=seeded())
    assert torch.equal(weight, torch.ones(40_000, dtype=torch.float64))
    counts = CHAIN.step(t).bincount(minlength=4)
    assert (counts - 10_000).abs().max() < 5 * (40_000 * 0.25 * 0.75) ** 0.5


def test_float32_times_of_a_long_chain_are_its_steps() -> None:
    chain = DDPMChain.linear(4000)
    t, _ = DiscreteTimes().sample(chain, 2000, generator=seeded(), dtype=torch.float32)
    exact, _ = DiscreteTimes().sample(chain, 2000, generator=seeded())
    assert torch.equal(t, exact.float())
    assert torch.equal(chain.time(chain.step(t)).float(), t)


def test_probabilities_match_the_released_code() -> None:
    times = learned()
    torch.testing.assert_close(times.probabilities, f64(*PROBABILITIES), rtol=1e-12, atol=0)
    t, weight = times.sample(CHAIN, 4000, generator=seeded())
    expected = f64(*WEIGHTS)[CHAIN.step(t)]
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
    share = CHAIN.step(t).bincount(minlength=4) / 4000
    error = (f64(*PROBABILITIES) * (1 - f64(*PROBABILITIES)) / 4000).sqrt()
    assert ((share - f64(*PROBABILITIES)).abs() < 5 * error).all()
    times.update(f64(0.25), f64(2.0))  # replaces .5
    torch.testing.assert_close(times.probabilities, f64(*AFTER), rtol=1e-12, atol=0)


def test_sampling_is_uniform_until_every_history_is_full() -> None:
    times = learned([row[:9] for row in HISTORY])
    assert times.probabilities.tolist() == [0.25] * 4
    times.update(f64(0.25, 0.5, 0.75), f64(0.49, 0.1, 0.02))
    assert times.probabilities.tolist() == [0.25] * 4
    assert times.sample(CHAIN, 3)[1].tolist() == [1.0] * 3
    times.update(f64(1.0), f64(0.01))
    torch.testing.assert_close(times.probabilities, f64(*PROBABILITIES), rtol=1e-12, atol=0)


def test_the_oldest_loss_is_replaced() -> None:
    times = learned([[9.0, 1.0, 2.0]] * 4, history=3)
    times.update(f64(0.25, 0.25), f64(3.0, 4.0))  # replace 9 and 1
    size = f64((4 + 9 + 16) / 3, *[(81 + 1 + 4) / 3] * 3).sqrt()
    torch.testing.assert_close(times.probabilities, 0.999 * size / size.sum() + 0.001 / 4)


def test_a_batch_is_recorded_as_its_losses_one_by_one() -> None:
    """Also where one step has more losses in it than the history holds."""
    chain = DDPMChain.linear(30)
    together, apart = (LossSecondMomentTimes(history=3) for _ in range(2))
    for times in (together, apart):
        times.sample(chain, 1)
    for seed in range(12):
        t = chain.time(torch.randint(-3, 32, (40,), generator=seeded(seed)).clamp(0, 29))
        losses = torch.rand(40, generator=seeded(100 + seed), dtype=torch.float64)
        losses[seed::9] = math.nan
        together.update(t, losses)
        for i in range(40):
            apart.update(t[i : i + 1], losses[i : i + 1])
    for name, value in together.state_dict().items():
        assert torch.equal(value, apart.state_dict()[name])
    assert int(together.state_dict()["counts"].max()) > 40
    assert torch.equal(together.probabilities, apart.probabilities)


def test_the_weighted_mean_is_the_mean_over_all_steps() -> None:
    h = f64(2.0, -1.0, 5.0, 7.0)
    for uniform in (1e-3, 0.3):
        times = learned(uniform=uniform)
        t, weight = times.sample(CHAIN, 200_000, generator=seeded())
        values = weight * h[CHAIN.step(t)]
        error = float(values.std()) / 200_000**0.5
        assert abs(float(values.mean()) - 3.25) < 5 * error
        assert float(weight.max()) < 1 / uniform


def test_importance_lowers_the_variance() -> None:
    sizes = f64(*(row[0] for row in HISTORY))
    spread = []
    for sampler in (DiscreteTimes(), learned()):
        t, weight = sampler.sample(CHAIN, 20_000, generator=seeded())
        spread.append(float((weight * sizes[CHAIN.step(t)]).std()))
    assert spread[1] < 0.2 * spread[0]


def test_losses_that_are_zero_or_not_finite() -> None:
    times = learned([[0.0]] * 4, history=1)
    assert times.probabilities.tolist() == [0.25] * 4
    before = learned(history=10)
    before.update(f64(0.25, 0.5), f64(float("nan"), float("inf")))
    torch.testing.assert_close(before.probabilities, f64(*PROBABILITIES), rtol=1e-12, atol=0)


def test_bfloat16_losses_are_recorded_at_the_right_step() -> None:
    times, chain = LossSecondMomentTimes(history=1), DDPMChain.linear(1000)
    times.sample(chain, 1)
    t = chain.time(list(range(1000))).float()
    times.update(t, torch.ones(1000, dtype=torch.bfloat16))
    assert times.state_dict()["counts"].tolist() == [1] * 1000


def test_recorded_losses_are_not_weighted_by_the_times() -> None:
    times = LossSecondMomentTimes(history=1, uniform=0.5)
    times.sample(CHAIN, 1)
    times.update(f64(0.25, 0.5, 0.75, 1.0), f64(4.0, 2.0, 1.0, 1.0))
    objective = ScoreMatching(SimpleWeighting(), times=times)
    model = EpsModel(lambda x, noise_label: 0 * x, CHAIN)
    p = times.probabilities
    x0 = torch.zeros(1, 64, dtype=torch.float64)
    weighted = objective(model, x0, generator=seeded(3))
    t, weight = expected_draw(p)
    recorded = times.state_dict()["losses"][int(CHAIN.step(t)), 0]
    assert float(weighted) == pytest.approx(float(recorded * weight), rel=1e-12)
    assert float(weight) != 1.0


def expected_draw(p):
    """The time and weight drawn with the objective's generator."""
    u = torch.rand(1, generator=seeded(3), dtype=torch.float64)
    i = int((u > p.cumsum(0)).sum())
    return CHAIN.time([i]), 1 / (4 * p[i])


def test_losses_before_the_first_draw_are_ignored() -> None:
    times = LossSecondMomentTimes(history=1)
    model = EpsModel(lambda x, noise_label: x, CHAIN)
    ScoreMatching(times=times)(model, torch.randn(2, 3), t=torch.tensor([0.25, 1.0]))
    assert times.state_dict()["counts"].tolist() == []
    assert times.probabilities.tolist() == []


def test_it_is_saved_and_resumed(tmp_path) -> None:
    times, model = learned(), torch.nn.Linear(2, 2)
    state = times.state_dict()
    save_checkpoint(tmp_path / "a.pt", step=1, model=model, stateful={"times": times})
    resumed = LossSecondMomentTimes()
    load_checkpoint(tmp_path / "a.pt", model=model, stateful={"times": resumed})
    assert torch.equal(resumed.probabilities, times.probabilities)
    for sampler in (times, resumed):
        sampler.update(f64(0.25), f64(2.0))
    torch.testing.assert_close(resumed.probabilities, f64(*AFTER), rtol=1e-12, atol=0)
    # The saved state is a copy.
    assert state["counts"].tolist() == [10] * 4
    early = LossSecondMomentTimes()
    early.load_state_dict(LossSecondMomentTimes().state_dict())
    assert early.sample(CHAIN, 2)[1].tolist() == [1.0, 1.0]


PROCESS = """
from diffusionkit import DDPMChain
from diffusionkit.training.discrete_times import LossSecondMomentTimes

times, chain = LossSecondMomentTimes(history=2), DDPMChain([0.1, 0.2, 0.3])
times.sample(chain, 1)
for k in range(6):
    n = 1 + 2 * rank  # unequal batches
    steps = (torch.arange(n) + k + rank) % 3
    times.update((steps + 1) / 3, 1.0 + steps + 0.1 * k + rank)
result = times.state_dict(), times.probabilities
"""


def test_every_process_records_the_losses_of_all(tmp_path) -> None:
    (state, p), (other, other_p) = run_in_two_processes(PROCESS, tmp_path)
    assert torch.equal(p, other_p)
    assert all(torch.equal(state[name], other[name]) for name in state)
    alone = LossSecondMomentTimes(history=2)
    alone.sample(DDPMChain([0.1, 0.2, 0.3]), 1)
    for k in range(6):
        for rank in (0, 1):
            steps = (torch.arange(1 + 2 * rank) + k + rank) % 3
            alone.update((steps + 1) / 3, 1.0 + steps + 0.1 * k + rank)
    assert torch.equal(p, alone.probabilities)
    assert p.max() > 0.34


@pytest.mark.parametrize("sampler", [DiscreteTimes(), LossSecondMomentTimes()], ids=repr)
def test_a_process_without_steps_raises(sampler) -> None:
    with pytest.raises(TypeError, match=r"sde: expected a chain of steps, .* got VPSDE"):
        sampler.sample(VPSDE(), 3)
    with pytest.raises(ValueError, match="n: expected"):
        sampler.sample(CHAIN, 0)


def test_discrete_times_have_no_nats() -> None:
    objective = ScoreMatching(LikelihoodWeighting(), times=DiscreteTimes())
    with pytest.raises(ValueError, match="times: expected a sampler whose weighted mean"):
        objective.nats(EpsModel(lambda x, noise_label: x, CHAIN), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LossSecondMomentTimes(0), ValueError, "history: expected"),
        (lambda: LossSecondMomentTimes(2.5), TypeError, "history: expected an integer"),
        (lambda: LossSecondMomentTimes(uniform=0.0), ValueError, r"uniform: .* \(0, 1\], got 0.0"),
        (lambda: LossSecondMomentTimes(uniform=1.5), ValueError, "uniform: expected"),
        (lambda: LossSecondMomentTimes(uniform="1"), TypeError, "uniform: expected a number"),
        (
            lambda: learned().sample(DDPMChain([0.1, 0.2]), 1),
            ValueError,
            "sde: expected 4 steps, as in the recorded losses, got 2",
        ),
        (
            lambda: LossSecondMomentTimes(5).load_state_dict(learned().state_dict()),
            ValueError,
            r"losses, counts: expected shapes \(N, 5\) and \(N,\), got \(4, 10\) and \(4,\)",
        ),
    ],
)
def test_invalid_arguments(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make()


def test_repr() -> None:
    assert repr(LossSecondMomentTimes(5)) == "LossSecondMomentTimes(history=5, uniform=0.001)"


@pytest.mark.parametrize(
    "change",
    [
        {"losses": None},
        {"losses": torch.ones(4, 10, dtype=torch.int64)},
        {"losses": torch.ones(4, 10, dtype=torch.complex64)},
        {"losses": torch.full((4, 10), math.nan)},
        {"losses": torch.full((4, 10), math.inf)},
        {"losses": torch.ones(4, 9)},
        {"losses": torch.ones(40)},
        {"counts": torch.ones(4)},
        {"counts": torch.ones(4, dtype=torch.bool)},
        {"counts": torch.tensor([1, 2, 3, -1])},
        {"counts": torch.ones(5, dtype=torch.int64)},
        {"counts": torch.ones((), dtype=torch.int64)},
        {"counts": [1, 1, 1, 1]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_history_is_refused_and_changes_nothing(change) -> None:
    times = learned()
    before = times.state_dict()
    with pytest.raises(ValueError, match="expected"):
        times.load_state_dict(before | change)
    for wrong in ({"losses": before["losses"]}, [], None):
        with pytest.raises(ValueError, match="state: expected losses and counts, got"):
            times.load_state_dict(wrong)
    assert all(torch.equal(value, before[name]) for name, value in times.state_dict().items())

"""Noise labels."""

import math

import pytest
import torch
from support import f64

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DDPMChain,
    DiscreteTimes,
    EpsModel,
    IndexLabel,
    LikelihoodWeighting,
    LogSigmaLabel,
    PCSampler,
    ReverseTimeLabel,
    ScoreMatching,
    SigmaLabel,
    SMLDChain,
    StepLabel,
    TimeLabel,
)
from diffusionkit._batch_times import Drawn, with_schedule
from diffusionkit._grid_times import grid_times


def test_step_label() -> None:
    t = f64(0.1, 0.25, 1.0)
    assert StepLabel(10)(DDPMChain.cosine(10), t).tolist() == pytest.approx([0, 1.5, 9])
    assert StepLabel(10, scale=100.0)(DDPMChain.cosine(10), t).tolist() == pytest.approx(
        [0, 150, 900]
    )
    # For a process with another T, and before the first step.
    assert StepLabel(10)(EDMSDE(sigma_max=80.0), 80 * t).tolist() == pytest.approx([0, 1.5, 9])
    assert StepLabel(10)(VPSDE(), f64(0.0, 0.05)).tolist() == [0.0, 0.0]
    assert StepLabel(10)(VPSDE(), t.float()).dtype == torch.float32


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 10, "scale": 0.0}], ids=str)
def test_invalid_step_labels_raise(options) -> None:
    with pytest.raises(ValueError, match=r"steps|scale"):
        StepLabel(**options)
    with pytest.raises(TypeError, match="steps"):
        StepLabel(10.0)


def test_log_sigma_label_with_a_reference() -> None:
    t = f64(0.5, 1.0)
    sigma = f64(math.sqrt(0.5), 50.0)
    label = LogSigmaLabel(1.0, reference=2.0)(VESDE(), t)
    torch.testing.assert_close(label, (sigma / 2).log(), rtol=1e-12, atol=0)
    label = LogSigmaLabel(3.0, reference=0.1)(VESDE(), t)
    torch.testing.assert_close(label, 3 * (10 * sigma).log(), rtol=1e-12, atol=0)
    # sigma / alpha of VP(0.1, 20) at t = 0.5, with 40 digits.
    label = LogSigmaLabel(1.0, reference=2.0)(VPSDE(), t[:1])
    ratio = 0.9596542020680362 / 0.28118288079675235
    assert float(label) == pytest.approx(math.log(ratio / 2), rel=1e-12)
    for options in ({"reference": 0.0}, {"reference": math.inf}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LogSigmaLabel(**options)


def test_time_sigma_and_index_labels():
    t = f64(0.0, 0.5, 1.0)
    torch.testing.assert_close(TimeLabel(scale=1.0)(VPSDE(), t), t)
    assert ReverseTimeLabel(3.0)(EDMSDE(sigma_max=2.0), 2 * t).tolist() == [3.0, 1.5, 0.0]
    ratio = SigmaLabel()(VPSDE(), t[1:])
    torch.testing.assert_close(ratio[:1], f64(0.9596542020680362 / 0.28118288079675235))
    torch.testing.assert_close(LogSigmaLabel()(VPSDE(), t[1:]), ratio.log() / 4)
    table = [50.0, 5.0, 0.5, 0.05, 0.01]  # NCSN's order: level 0 is the largest noise
    assert IndexLabel(table)(VESDE(), t).tolist() == [4.0, 2.0, 0.0]
    assert IndexLabel(table[::-1])(VESDE(), t).tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("label", "error", "got"),
    [
        (lambda sde, t: t[:, None], ValueError, r"\(3, 1\)"),
        (lambda sde, t: t[:1], ValueError, r"\(1,\)"),
        (lambda sde, t: 1.0, TypeError, "float"),
        (lambda sde, t: None, TypeError, "NoneType"),
    ],
)
def test_labels_of_another_shape_are_refused(label, error, got):
    model = EpsModel(lambda x, noise_label: x, VPSDE(), label=label)
    with pytest.raises(error, match=rf"label: expected .*shape of t, \(3,\), got {got}"):
        model.predict(torch.zeros(3, 2), torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_labels_reach_the_network_in_float32(dtype):
    seen = []
    model = EpsModel(
        lambda x, noise_label: seen.append(noise_label.dtype) or x,
        VPSDE(),
        label=lambda sde, t: (10 * t).to(dtype),
    )
    model.predict(torch.zeros(3, 2), torch.full((3,), 0.5))
    assert seen == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [50, 100, 300, 999, 1000, 4000])
def test_labels_of_steps_are_whole_numbers(steps, dtype):
    """A network that rounds its labels down finds step i at t = (i + 1) / steps."""
    chain = DDPMChain.cosine(steps)
    i = torch.arange(steps)
    t = ((i + 1).double() / steps).to(dtype)
    assert torch.equal(StepLabel(steps)(chain, t).long(), i)
    assert torch.equal(TimeLabel(float(steps))(chain, t).long(), i + 1)
    if 1000 % steps == 0:
        assert torch.equal(StepLabel(steps, 1000 / steps)(chain, t).long(), i * (1000 // steps))
    # Arithmetic on times, as a sampler's or a user's, may miss by another rounding.
    missed = torch.nextafter(t, torch.zeros_like(t))
    assert torch.equal(StepLabel(steps)(chain, missed).long(), i)
    # Times in between keep their fractions.
    between = ((i + 0.75).double() / steps)[1:]
    torch.testing.assert_close(StepLabel(steps)(chain, between), i[1:] - 0.25, check_dtype=False)


@pytest.mark.parametrize("steps", [50, 333, 1000])
def test_sampling_and_training_condition_on_the_step(steps):
    """Every label that a network sees on a chain is the whole number of a step."""
    seen = []

    def network(x, noise_label):
        seen.append(noise_label)
        return 0 * x

    chain = DDPMChain.cosine(steps)
    model = EpsModel(network, chain, label=StepLabel(steps))
    PCSampler(model, Ancestral(), grid=chain.respaced(steps))((2, 1))
    labels = [int(label[0]) for label in seen]
    assert labels == [*range(steps - 1, -1, -1), 0][: len(labels)]
    seen.clear()
    for objective in (ScoreMatching(times=DiscreteTimes()), ScoreMatching()):
        objective(model, torch.zeros(512, 1))
    assert torch.equal(seen[0], seen[0].round())


@pytest.mark.parametrize("steps", [50, 300, 999, 1000, 4000])
def test_labels_of_times_that_were_rounded_before(steps):
    """A time that was in float32, or of another process, is that of a step in float64, too."""
    chain, i = DDPMChain.cosine(steps), torch.arange(steps)
    t = chain.time(i).float().double()
    assert torch.equal(StepLabel(steps)(chain, t).long(), i)
    inner = chain.time_at_log_snr(chain.log_snr(t))
    assert torch.equal(StepLabel(steps)(chain, inner).long(), i)
    assert StepLabel(steps)(chain, t.half()).dtype == torch.float32
    (on_grid,) = grid_times(chain, t[steps // 2 :][:1], torch.zeros(1, 1))
    assert StepLabel(steps)(chain, on_grid).tolist() == [steps // 2]


def test_indices_next_to_an_edge_are_those_of_the_exact_time():
    """At a time of a grid the index is that of its float64, not of the float32 tensor."""
    label, sde = IndexLabel([50.0, 1.0, 0.01]), VESDE()
    edge = sde.time_at_log_snr(-2 * label.jumps.log())
    for shift, expected in ((1e-12, [1.0, 0.0]), (-1e-12, [2.0, 1.0])):
        times = grid_times(sde, (edge + shift).flip(0), torch.zeros(1, 1))
        assert [float(label(sde, t)) for t in times][::-1] == expected


@pytest.mark.parametrize("chain", [DDPMChain.linear(1000), SMLDChain.geometric(1000)])
def test_rates_of_steps_in_float32(chain):
    """The rate of step i is its own at its end, also at times that were in float32 before."""
    t = chain.time(torch.arange(1000))
    for rate in (chain.diffusion, chain.drift_coefficient):
        assert torch.equal(rate(t.float().double()), rate(t))
    weights = LikelihoodWeighting()
    torch.testing.assert_close(
        weights(chain, t.float()), weights(chain, t).float(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("sde", [VESDE(), VPSDE(), EDMSDE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize(("scale", "reference"), [(0.25, 1.0), (1.0, 2.0), (3.0, 0.1)])
def test_log_sigma_labels_of_drawn_times(sde, scale, reference):
    """Of times that carry their schedule, as in a loss, the label is that of plain times."""
    t = sde.T * torch.tensor([0.01, 0.3, 1.0])
    alpha, sigma = sde.marginal(t.double())
    found = LogSigmaLabel(scale, reference=reference)(sde, with_schedule(sde, Drawn(t)))
    torch.testing.assert_close(found, (scale * (sigma / alpha / reference).log()).float())

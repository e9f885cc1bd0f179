"""Against diffusers' flow-matching scheduler: its loop, and configurations in both directions."""

import math

import pytest
import torch
from support import seeded
from torch import nn

from diffusionkit import (
    VPSDE,
    EpsModel,
    Euler,
    FlowMatchingSDE,
    GaussianMixtureModel,
    PCSampler,
    ShiftedGrid,
    UniformGrid,
    VelocityModel,
)
from diffusionkit.interop import (
    chain_from_scheduler,
    from_diffusers,
    sampler_from_scheduler,
    scheduler_config,
    to_diffusers,
)

diffusers = pytest.importorskip("diffusers")
FlowMatch = diffusers.FlowMatchEulerDiscreteScheduler


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x, timestep):
        rate = (timestep / 1000).view(-1, 1)
        return torch.tanh(self.layer(x)) * (1 + rate.square()) + 0.3 * rate * x


NETWORK, START = Network().eval(), torch.randn(4, 3, generator=seeded())


@torch.no_grad()
def loop(network, scheduler, steps, **options):
    scheduler.set_timesteps(steps, **options)
    x = START
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)))
        x = scheduler.step(getattr(output, "sample", output), t, x).prev_sample
    return x


SETTINGS = [
    ({}, None),
    ({"shift": 3.0}, None),  # Stable Diffusion 3
    ({"shift": 0.7, "num_train_timesteps": 500}, None),
    ({"use_dynamic_shifting": True}, 0.9),  # Flux
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.2),
    ({"shift": 2.0, "shift_terminal": 0.1}, None),  # LTX
    ({"invert_sigmas": True}, None),  # Mochi
]


@pytest.mark.parametrize(("settings", "mu"), SETTINGS, ids=str)
def test_the_loop_of_the_scheduler(settings, mu):
    scheduler = FlowMatch(**settings)
    model = from_diffusers(NETWORK, scheduler)
    assert type(model) is VelocityModel
    found = sampler_from_scheduler(model, scheduler, 7, mu=mu)(START)
    expected = loop(NETWORK, scheduler, 7, **({} if mu is None else {"mu": mu}))
    if settings.get("invert_sigmas"):  # its own start is data, in the inverted time
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_the_sigmas_that_pipelines_of_flux_pass():
    scheduler = FlowMatch(use_dynamic_shifting=True)
    model, mu, steps = from_diffusers(NETWORK, scheduler), 0.8, 6
    expected = loop(NETWORK, scheduler, None, sigmas=[1 - k / steps for k in range(steps)], mu=mu)
    grid = ShiftedGrid(math.exp(mu), UniformGrid(t_end=0.0))
    found = PCSampler(model, Euler(), steps=steps, grid=grid, denoise=False)(START)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_the_label_is_the_timestep():
    seen = []

    def network(x, timestep):
        seen.append(timestep)
        return x

    model = from_diffusers(network, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    model.predict(START, torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert seen[0].tolist() == [0.0, 250.0, 500.0, 1000.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_models_as_networks_of_pipelines(shift):
    """A model of the noise on VP, and one of the velocity: our samples through their loop."""
    flow = VelocityModel(lambda x, label: NETWORK(x, label), FlowMatchingSDE())
    vp = EpsModel(lambda x, label: 0.9 * torch.tanh(x), VPSDE())
    scheduler = FlowMatch(shift=shift)
    for model in (flow, vp):
        unet = to_diffusers(model, scheduler, sample_size=1)
        expected = loop(lambda x, t, unet=unet: unet(x, t).sample, scheduler, 5)
        found = sampler_from_scheduler(model, scheduler, 5)(START)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_configurations_in_both_directions():
    model = VelocityModel(NETWORK, FlowMatchingSDE())
    config = scheduler_config(model, 500, shift=2.0)
    scheduler = FlowMatch.from_config(config)
    assert scheduler.config.shift == 2.0
    back = from_diffusers(NETWORK, config)
    assert back.label.scale == 500.0
    assert back.sde == FlowMatchingSDE()


def test_an_exact_model_through_the_loop_of_diffusers():
    sde = FlowMatchingSDE()
    exact = GaussianMixtureModel(sde, [[1.0, -0.5, 0.2]], [0.4])
    scheduler = FlowMatch(shift=2.0)
    x = loop(to_diffusers(exact, scheduler, sample_size=1), scheduler, 200)
    right = torch.tensor([1.0, -0.5, 0.2]) + 0.4 * START  # the flow keeps the deviations
    torch.testing.assert_close(x, right, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"stochastic_sampling": True}, {}, "stochastic_sampling: expected False"),
        ({"use_karras_sigmas": True}, {}, "use_karras_sigmas: expected False"),
        ({"use_dynamic_shifting": True}, {}, r"mu: expected a number .* exp\(mu\)"),
        ({}, {"eta": 0.5}, "eta: expected 0 for a FlowMatch"),
        ({"shift": -1.0}, {}, "shift: expected a finite number > 0"),
        ({"num_train_timesteps": 1}, {}, "num_train_timesteps: expected an integer >= 2"),
    ],
)
def test_unsupported_settings(settings, options, message):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | settings
    model = VelocityModel(NETWORK, FlowMatchingSDE())
    with pytest.raises(ValueError, match=message):
        sampler_from_scheduler(model, config, 5, **options)


def test_other_errors():
    model = EpsModel(NETWORK, VPSDE())
    with pytest.raises(ValueError, match="mu: expected None for a scheduler other than FlowMatch"):
        sampler_from_scheduler(model, diffusers.DDIMScheduler(), 5, mu=1.0)
    with pytest.raises(ValueError, match=r"got FlowMatch.*; its process is FlowMatchingSDE\(\)"):
        chain_from_scheduler(FlowMatch())
    with pytest.raises(ValueError, match="invert_sigmas: expected False"):
        to_diffusers(model, FlowMatch(invert_sigmas=True), sample_size=1)
    with pytest.raises(ValueError, match="model: expected a prediction of x0 or of a velocity"):
        sampler_from_scheduler(EpsModel(NETWORK, FlowMatchingSDE()), FlowMatch(), 5)(START)

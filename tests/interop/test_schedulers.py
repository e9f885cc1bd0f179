"""Chains of schedulers against diffusers' formulas, written out in float64."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    CheckpointError,
    DDPMChain,
    EDMModel,
    EpsModel,
    VModel,
    X0Model,
)
from diffusionkit.interop import chain_from_scheduler, scheduler_config
from diffusionkit.interop.schedulers import timesteps


def network(x, noise_label):
    return x


def alphas_bar(chain):
    return chain.marginal(chain.time(range(chain.steps)))[0].square()


def cosine(u):
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize(
    ("config", "beta"),
    [
        ({"beta_schedule": "linear"}, lambda u: 1e-4 + u * (0.02 - 1e-4)),
        ({"beta_schedule": "scaled_linear"}, lambda u: (0.01 + u * (0.02**0.5 - 0.01)) ** 2),
        (
            {"beta_schedule": "sigmoid", "beta_end": 0.01},
            lambda u: 1e-4 + (0.01 - 1e-4) / (1 + math.exp(6 - 12 * u)),
        ),
        (
            {"beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.3},
            lambda u: 0.01 + 0.29 * u,
        ),
    ],
)
def test_betas_of_every_schedule(config, beta):
    chain = chain_from_scheduler(config | {"num_train_timesteps": 40})
    torch.testing.assert_close(chain.betas.tolist(), [beta(k / 39) for k in range(40)])


def test_cosine_schedule():
    chain = chain_from_scheduler({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 20})
    expected = [min(1 - cosine((k + 1) / 20) / cosine(k / 20), 0.999) for k in range(20)]
    torch.testing.assert_close(chain.betas.tolist(), expected)


def test_trained_betas_come_before_the_schedule():
    config = {"trained_betas": [0.1, 0.2, 0.4], "beta_schedule": "linear"}
    assert chain_from_scheduler(config).betas.tolist() == [0.1, 0.2, 0.4]


def test_zero_terminal_snr():
    config = {"beta_schedule": "linear", "num_train_timesteps": 30, "rescale_betas_zero_snr": True}
    plain = alphas_bar(chain_from_scheduler(config | {"rescale_betas_zero_snr": False})).sqrt()
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(alphas_bar(chain_from_scheduler(config)).sqrt(), expected)
    assert chain_from_scheduler(config).betas[-1] == 1


def test_a_scheduler_with_another_schedule_is_read_by_its_betas():
    other = SimpleNamespace(config={"beta_schedule": "laplace"}, betas=torch.tensor([0.25, 0.5]))
    assert chain_from_scheduler(other).betas.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shift": 3.0, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "got FlowMatch"),
        ({"beta_schedule": "linear", "use_flow_sigmas": True}, "expected one with betas"),
        ({"beta_schedule": "laplace"}, "beta_schedule: expected one of linear"),
        ({"beta_schedule": "linear", "beta_start": -1.0}, "beta_start: expected"),
        ({"trained_betas": [0.5, 2.0]}, "betas: expected"),
    ],
)
def test_other_schedulers_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        chain_from_scheduler(config)


def test_files(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    with pytest.raises(FileNotFoundError, match="scheduler_config"):
        chain_from_scheduler(tmp_path)
    file.write_text(json.dumps({"beta_schedule": "linear", "num_train_timesteps": 7}))
    for place in (tmp_path, file.parent, file, str(file)):
        assert chain_from_scheduler(place).steps == 7
    for damaged in ("[1, 2]", "{", "\x00"):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match="expected a JSON"):
            chain_from_scheduler(tmp_path)
    with pytest.raises(FileNotFoundError, match="scheduler: expected a scheduler of diffusers"):
        chain_from_scheduler("ddpm")


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (EpsModel, "epsilon"),
        (X0Model, "sample"),
        (VModel, "v_prediction"),
        (EDMModel, "v_prediction"),
    ],
)
def test_a_configuration_has_the_models_own_chain(model, kind):
    chain = DDPMChain.cosine(30)
    config = scheduler_config(model(network, chain))
    assert config["prediction_type"] == kind
    assert not config["clip_sample"]
    assert json.loads(json.dumps(config)) == config
    assert torch.equal(chain_from_scheduler(config).betas, chain.betas)


def test_a_process_in_continuous_time_is_discretized():
    times = torch.arange(1, 101, dtype=torch.float64) / 100
    chain = chain_from_scheduler(scheduler_config(VPSDE(), 100))
    torch.testing.assert_close(alphas_bar(chain), VPSDE().marginal(times)[0].square())
    for sde in (EDMSDE(), VESDE()):
        bar = alphas_bar(chain_from_scheduler(scheduler_config(sde, 50)))
        logs = 0.5 * (torch.log1p(-bar) - torch.log(bar))  # of sigma / alpha
        ends = sde.marginal(torch.tensor([sde.t_stop, sde.T], dtype=torch.float64))[1].log()
        torch.testing.assert_close(logs, torch.linspace(*ends.tolist(), 50, dtype=torch.float64))


def test_variances_and_options_of_a_configuration():
    chain = DDPMChain.linear(20 + 5)
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        model = EpsModel(network, chain, variance=variance)
        assert scheduler_config(model)["variance_type"] == variance
    learned = EpsModel(network, chain, variance="learned")
    with pytest.raises(ValueError, match="variance_type: expected a value"):
        scheduler_config(learned)
    config = scheduler_config(learned, variance_type="fixed_large", timestep_spacing="trailing")
    assert (config["variance_type"], config["timestep_spacing"]) == ("fixed_large", "trailing")


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ({}, 5, [8, 6, 4, 2, 0]),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 4, [7, 5, 3, 1]),
        ({"timestep_spacing": "trailing"}, 5, [9, 7, 5, 3, 1]),
        ({"timestep_spacing": "trailing"}, 3, [9, 6, 2]),
        ({"timestep_spacing": "linspace"}, 4, [9, 6, 3, 0]),
    ],
)
def test_timesteps(spacing, steps, expected):
    assert timesteps({"num_train_timesteps": 10} | spacing, steps) == expected


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"timestep_spacing": "leading", "steps_offset": 1}, 10, "steps_offset: expected"),
        ({"timestep_spacing": "karras"}, 5, "timestep_spacing: expected"),
        ({}, 11, "steps: expected"),
    ],
)
def test_timesteps_outside_the_chain_are_refused(settings, steps, words):
    with pytest.raises(ValueError, match=words):
        timesteps({"num_train_timesteps": 10} | settings, steps)

"""Networks of score_sde from a configuration, a published name or a network."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.released import (
    SCORE_SDE,
    assert_released,
    score_sde_config,
    score_sde_content,
)
from support.released import (
    score_sde_score as score,
)
from torch import nn

from diffusionkit import VESDE, VPSDE, DDPMChain, EpsModel, RawScoreModel, SubVPSDE
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_score_sde
from diffusionkit.checkpoints._score_sde_config import PUBLISHED
from diffusionkit.networks import DDPMpp, DDPMUNet, NCSNpp


def as_object(config):
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in config.items()})


@pytest.mark.parametrize("case", ["ve_ncsnpp_deep", "vp_ddpm", "ncsnv2_128", "subvp_ddpmpp"])
def test_configuration_may_be_an_object(given, case) -> None:
    model = load_score_sde(given(score_sde_content(case)), as_object(score_sde_config(case)))
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


def test_missing_entries_have_released_defaults(given) -> None:
    """Older configurations lack entries that were added later."""
    config = score_sde_config("vp_ddpm")
    for name in ("fir", "fir_kernel", "progressive", "progressive_input", "progressive_combine"):
        del config["model"][name]
    for name in ("fourier_scale", "skip_rescale", "resblock_type", "embedding_type"):
        del config["model"][name]
    for name in ("beta_min", "beta_max", "nonlinearity", "resamp_with_conv", "dropout"):
        del config["model"][name]
    for name in ("conditional", "scale_by_sigma"):
        del config["model"][name]
    del config["data"]["num_channels"]
    model = load_score_sde(given(score_sde_content("vp_ddpm")), config)
    assert_released(score(model, "vp_ddpm"), SCORE_SDE["vp_ddpm"]["ema"])


def test_options_of_training_are_kept(given) -> None:
    config = score_sde_config("ve_ncsnpp")
    config["model"] |= {"dropout": 0.25, "fourier_scale": 8}
    network = load_score_sde(given(score_sde_content("ve_ncsnpp")), config).network
    assert network.config["dropout"] == 0.25
    assert network.config["fourier_scale"] == 8


def test_ncsnv2_names_its_channels_differently(given) -> None:
    case = "ncsnv2_64_size28_one_channel"
    config = score_sde_config(case)
    del config["data"]["num_channels"]
    model = load_score_sde(given(score_sde_content(case)), config)
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


@pytest.mark.parametrize("make", [dict, as_object], ids=["mapping", "object"])
@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_error_names_the_missing_section(given, make, section) -> None:
    config = score_sde_config("ve_ncsnpp")
    del config[section]
    with pytest.raises(ValueError, match=rf"network: expected config\.{section}, got none"):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), make(config))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(("model", name) for name in ("name", "nf", "num_res_blocks", "attn_resolutions")),
        *(("model", name) for name in ("sigma_min", "sigma_max", "num_scales", "skip_rescale")),
        *(("model", name) for name in ("resblock_type", "progressive", "progressive_input")),
        *(("data", name) for name in ("image_size", "centered")),
        *(("training", name) for name in ("sde", "continuous")),
    ],
)
def test_error_names_the_missing_entry(given, section, name) -> None:
    config = score_sde_config("ve_ncsnpp")
    del config[section][name]
    with pytest.raises(ValueError, match=rf"network: expected {section}\.{name}, got none"):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), config)


@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        ("model", {"name": "unet"}, r"expected model\.name ncsnpp, ddpm or ncsnv2_\*, got 'unet'"),
        ("model", {"name": "ncsnv2_512"}, r"expected model\.name ncsnv2_64,.*got 'ncsnv2_512'"),
        ("model", {"nonlinearity": "gelu"}, r"expected model\.nonlinearity swish,.*got 'gelu'"),
        ("model", {"resblock_type": "resnet"}, "resblock: expected one of.*got 'resnet'"),
        ("model", {"embedding_type": "learned"}, "embedding: expected one of.*got 'learned'"),
        ("model", {"progressive": "dense"}, "progressive: expected one of.*got 'dense'"),
        ("training", {"sde": "edm"}, r"expected training\.sde vesde, vpsde or subvpsde, got 'edm'"),
    ],
)
def test_error_names_the_unknown_value(given, section, change, match) -> None:
    config = score_sde_config("ve_ncsnpp")
    config[section] |= change
    with pytest.raises(ValueError, match=match):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), config)


# Numbers of trainable parameters of the released configurations, their processes and steps.
DDPM = DDPMChain.linear(1000)
RELEASED = {
    "subvp/cifar10_ddpm_continuous": (35218947, SubVPSDE(), None),
    "subvp/cifar10_ddpmpp_continuous": (61804419, SubVPSDE(), None),
    "subvp/cifar10_ddpmpp_deep_continuous": (106632579, SubVPSDE(), None),
    "subvp/cifar10_ncsnpp_continuous": (62693251, SubVPSDE(), None),
    "subvp/cifar10_ncsnpp_deep_continuous": (107521411, SubVPSDE(), None),
    "ve/bedroom_ncsnpp_continuous": (65574421, VESDE(0.01, 378.0), None),
    "ve/celeba_ncsnpp": (62693251, VESDE(0.01, 90.0), 1000),
    "ve/celebahq_256_ncsnpp_continuous": (65574421, VESDE(0.01, 348.0), None),
    "ve/celebahq_ncsnpp_continuous": (105785880, VESDE(0.01, 1348.0), None),
    "ve/church_ncsnpp_continuous": (65574421, VESDE(0.01, 380.0), None),
    "ve/cifar10_ddpm": (35218947, VESDE(0.01, 50.0), 1000),
    "ve/cifar10_ncsnpp": (62693251, VESDE(0.01, 50.0), 1000),
    "ve/cifar10_ncsnpp_continuous": (62758787, VESDE(0.01, 50.0), None),
    "ve/cifar10_ncsnpp_deep_continuous": (107586947, VESDE(0.01, 50.0), None),
    "ve/ffhq_256_ncsnpp_continuous": (65574421, VESDE(0.01, 348.0), None),
    "ve/ffhq_ncsnpp_continuous": (105785880, VESDE(0.01, 1348.0), None),
    "ve/ncsnv2/bedroom": (83445379, VESDE(0.01, 190.0), 1086),
    "ve/ncsnv2/celeba": (29694083, VESDE(0.01, 90.0), 500),
    "ve/ncsnv2/cifar10": (29694083, VESDE(0.01, 50.0), 232),
    "vp/cifar10_ddpmpp": (61804419, DDPM, 1000),
    "vp/cifar10_ddpmpp_continuous": (61804419, VPSDE(), None),
    "vp/cifar10_ddpmpp_deep_continuous": (106632579, VPSDE(), None),
    "vp/cifar10_ncsnpp": (62693251, DDPM, 1000),
    "vp/cifar10_ncsnpp_continuous": (62693251, VPSDE(), None),
    "vp/cifar10_ncsnpp_deep_continuous": (107521411, VPSDE(), None),
    "vp/ddpm/bedroom": (111569923, DDPM, 1000),
    "vp/ddpm/celebahq": (111569923, DDPM, 1000),
    "vp/ddpm/church": (111569923, DDPM, 1000),
    "vp/ddpm/cifar10": (35218947, DDPM, 1000),
    "vp/ddpm/cifar10_continuous": (35218947, VPSDE(), None),
}


def published(name):
    make, setting = PUBLISHED[name]
    with torch.device("cpu" if "ncsnv2" in name else "meta"):
        network = make()
    return network, setting.model(network)


def test_every_published_name_is_tested() -> None:
    # The released code cannot build the last one.
    assert set(PUBLISHED) == {*RELEASED, "vp/ddpm/cifar10_unconditional"}
    network, model = published("vp/ddpm/cifar10_unconditional")
    assert network.embedding is None
    assert repr(model.sde) == repr(DDPM)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "ve/ncsnv2/bedroom" else name
        for name in RELEASED
    ],
)
def test_published_names_give_the_released_networks(name) -> None:
    count, sde, steps = RELEASED[name]
    network, model = published(name)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
    assert repr(model.sde) == repr(sde)
    assert isinstance(model, RawScoreModel if name.startswith("ve") else EpsModel)
    assert model.data_range == ((0, 1) if name.startswith("ve") else (-1, 1))
    # The noise label is the number of the step, the noise level, or from 0 to 999.
    t = torch.tensor([1 / steps if isinstance(sde, DDPMChain) else 0.0, 1.0])
    first, last = model.label(model.sde, t).tolist()
    if steps is None:
        expected = (0.01, sde.sigma_max) if name.startswith("ve") else (0, 999)
    else:
        expected = (steps - 1, 0) if name.startswith("ve") else (0, steps - 1)
    assert (first, last) == pytest.approx(expected, rel=1e-5)
    if steps and name.startswith("ve"):  # these networks divide by the numbered level
        levels = network.config["sigmas"]
        assert len(levels) == steps
        assert (levels[0], levels[-1]) == pytest.approx((sde.sigma_max, 0.01))


def test_file_is_loaded_by_published_name(given, monkeypatch) -> None:
    case = "ve_ncsnpp"
    small = NCSNpp(3, width=8, multipliers=(1, 2), blocks=1, data_range=(0.0, 1.0))
    name = "ve/cifar10_ncsnpp_continuous"
    monkeypatch.setitem(PUBLISHED, name, (lambda: small, PUBLISHED[name][1]))
    model = load_score_sde(given(score_sde_content(case)), name)
    assert model.network is small
    assert_released(score(model, case), SCORE_SDE[case]["ema"])
    monkeypatch.setitem(
        PUBLISHED, "ve/ffhq_ncsnpp_continuous", (lambda: small, PUBLISHED["ve/celeba_ncsnpp"][1])
    )
    with pytest.raises(CheckpointError, match=r"sigmas: expected 90 \.\.\. 0\.01"):
        load_score_sde(given(score_sde_content(case)), "ve/ffhq_ncsnpp_continuous")


def test_unknown_names_are_rejected(given) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*ve/cifar10_ncsnpp.*got 've/mnist'"):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), "ve/mnist")


@pytest.mark.parametrize(
    ("case", "make", "sde"),
    [
        (
            "ve_ncsnpp",
            lambda: NCSNpp(3, width=8, multipliers=(1, 2), blocks=1, data_range=(0.0, 1.0)),
            VESDE(),
        ),
        (
            "ve_centered_noscale",
            lambda: NCSNpp(3, width=8, multipliers=(1, 2), blocks=1, scale_by_sigma=False),
            VESDE(),
        ),
        ("vp_ddpmpp", lambda: DDPMpp(3, width=8, multipliers=(1, 2), blocks=1), VPSDE()),
        (
            "vp_ddpm_continuous",
            lambda: DDPMUNet(3, width=32, multipliers=(1, 2), blocks=1),
            VPSDE(),
        ),
    ],
)
def test_weights_load_into_a_given_network(given, case, make, sde) -> None:
    network = make()
    model = load_score_sde(given(score_sde_content(case)), network)
    assert model.network is network
    assert not network.training
    assert model.sde == sde
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


@pytest.mark.parametrize("case", ["ve_discrete_positional_scaled", "ncsnv2_64"])
def test_weights_load_into_a_network_with_numbered_levels(given, case) -> None:
    content, config = score_sde_content(case), score_sde_config(case)
    network = load_score_sde(given(content), config).network
    model = load_score_sde(given(content), network)
    assert_released(score(model, case), SCORE_SDE[case]["ema"])
    other = copy.deepcopy(network)
    nn.init.zeros_(next(other.parameters()))
    other.config["sigmas"] = other.config["sigmas"][:-1]
    with pytest.raises(CheckpointError, match=r"sigmas: expected .* levels, got"):
        load_score_sde(given(content), other)

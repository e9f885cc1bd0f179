"""What score_sde's networks are: said by a configuration, by a name, or by the file itself."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from released import (
    SCORE_SDE,
    assert_released,
    inputs,
    score_sde_config,
    score_sde_content,
    unread,
)
from torch import nn

from diffusionkit import VESDE, VPSDE, DDPMChain, EpsModel, RawScoreModel, SubVPSDE
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_score_sde
from diffusionkit.checkpoints._score_sde_settings import PUBLISHED
from diffusionkit.networks import DDPMpp, DDPMUNet, NCSNpp, NCSNv2


@pytest.fixture
def given(monkeypatch):
    return lambda content: unread(monkeypatch, "score_sde", content)


def score(model, case):
    data = score_sde_config(case)["data"]
    x = inputs(2, data["num_channels"], data["image_size"], data["image_size"])
    with torch.no_grad():
        return model(x, torch.tensor(SCORE_SDE[case]["t"]))


def as_object(config):
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in config.items()})


@pytest.mark.parametrize("case", ["ve_ncsnpp_deep", "vp_ddpm", "ncsnv2_128", "subvp_ddpmpp"])
def test_a_configuration_object(given, case) -> None:
    model = load_score_sde(given(score_sde_content(case)), as_object(score_sde_config(case)))
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


def test_what_a_configuration_may_leave_out(given) -> None:
    """What the older configurations do not have is what their network does."""
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


def test_what_only_training_uses_is_kept(given) -> None:
    config = score_sde_config("ve_ncsnpp")
    config["model"] |= {"dropout": 0.25, "fourier_scale": 8}
    network = load_score_sde(given(score_sde_content("ve_ncsnpp")), config).network
    assert network.config["dropout"] == 0.25
    assert network.config["fourier_scale"] == 8


def test_ncsnv2_has_its_channels_under_another_name(given) -> None:
    case = "ncsnv2_64_size28_one_channel"
    config = score_sde_config(case)
    del config["data"]["num_channels"]
    model = load_score_sde(given(score_sde_content(case)), config)
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


@pytest.mark.parametrize("make", [dict, as_object], ids=["mapping", "object"])
@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_missing_section_is_named(given, make, section) -> None:
    config = score_sde_config("ve_ncsnpp")
    del config[section]
    with pytest.raises(ValueError, match=rf"config: expected config\.{section}, got a conf"):
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
def test_a_missing_entry_is_named(given, section, name) -> None:
    config = score_sde_config("ve_ncsnpp")
    del config[section][name]
    with pytest.raises(ValueError, match=rf"config: expected {section}\.{name}, got a conf"):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), config)


@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        ("model", {"name": "unet"}, r"expected model\.name ncsnpp, ddpm or ncsnv2_\*, got 'unet'"),
        ("model", {"name": "ncsnv2_512"}, r"expected model\.name ncsnv2_64,.*got 'ncsnv2_512'"),
        ("model", {"nonlinearity": "gelu"}, r"expected model\.nonlinearity swish,.*got 'gelu'"),
        ("model", {"resblock_type": "resnet"}, "resblock must be one of.*got 'resnet'"),
        ("model", {"embedding_type": "learned"}, "embedding must be one of.*got 'learned'"),
        ("model", {"progressive": "dense"}, "progressive must be one of.*got 'dense'"),
        ("training", {"sde": "edm"}, r"expected training\.sde vesde, vpsde or subvpsde, got 'edm'"),
    ],
)
def test_unknown_values_are_named(given, section, change, match) -> None:
    config = score_sde_config("ve_ncsnpp")
    config[section] |= change
    with pytest.raises(ValueError, match=match):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), config)


# Trainable parameters counted from the released configurations, and what they were trained for.
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
    return network, setting.model(network, network.config["data_range"])


def test_every_published_name_is_here() -> None:
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
def test_published_networks(name) -> None:
    count, sde, steps = RELEASED[name]
    network, model = published(name)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
    assert repr(model.sde) == repr(sde)
    assert isinstance(model, RawScoreModel if name.startswith("ve") else EpsModel)
    assert model.data_range == ((0, 1) if name.startswith("ve") else (-1, 1))
    # The label goes from the first to the last step, the noise level, or 0 to 999.
    t = torch.tensor([1 / steps if isinstance(sde, DDPMChain) else 0.0, 1.0])
    first, last = model.label(model.sde, t).tolist()
    if steps is None:
        expected = (0.01, sde.sigma_max) if name.startswith("ve") else (0, 999)
    else:
        expected = (steps - 1, 0) if name.startswith("ve") else (0, steps - 1)
    assert (first, last) == pytest.approx(expected, rel=1e-5)
    if steps and name.startswith("ve"):  # whose networks divide by the level of that number
        levels = network.config["sigmas"]
        assert len(levels) == steps
        assert (levels[0], levels[-1]) == pytest.approx((sde.sigma_max, 0.01))


def test_a_file_by_its_published_name(given, monkeypatch) -> None:
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


def test_unknown_names(given) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*ve/cifar10_ncsnpp.*got 've/mnist'"):
        load_score_sde(given(score_sde_content("ve_ncsnpp")), "ve/mnist")


# What leaves a trace in names and shapes, whatever the network.
VISIBLE = (
    "channels",
    "dims",
    "width",
    "multipliers",
    "blocks",
    "attention_levels",
    "embedding",
    "resblock",
    "progressive",
    "progressive_input",
)
# The published combinations: there the file alone gives the right scores too.
AS_PUBLISHED = [
    "ve_ncsnpp",
    "ve_ncsnpp_deep",
    "ve_sigma_max_1348",
    "ve_skip_cat",
    "ve_outskip_inres",
    "ve_none_inskip",
    "ve_none_none_fir",
    "ve_one_channel",
    "ve_one_level",
    "vp_ddpmpp",
    "vp_ncsnpp",
    "vp_ddpm_continuous",
    "ncsnv2_64",
    "ncsnv2_64_size28_one_channel",
    "ncsnv2_128",
]


@pytest.mark.parametrize("case", [case for case in SCORE_SDE if not case.startswith("ncsnv2")])
def test_the_network_is_inferred(given, case, caplog) -> None:
    content = score_sde_content(case)
    wanted = load_score_sde(given(content), score_sde_config(case)).network.config
    with caplog.at_level(logging.WARNING):
        model = load_score_sde(given(content))
    config = model.network.config
    visible = [
        *VISIBLE,
        *(["progressive_combine"] if wanted["progressive_input"] == "input_skip" else []),
        *(["resample_with_conv"] if wanted["resblock"] == "ddpm" else []),
    ]
    assert {key: config[key] for key in visible} == {key: wanted[key] for key in visible}
    fourier = wanted["embedding"] == "fourier"
    assert isinstance(model, RawScoreModel if fourier else EpsModel)
    assert isinstance(model.sde, VESDE if fourier else VPSDE)
    # The file leaves much open, and the user is told what was assumed.
    (told,) = [r.message for r in caplog.records if "checkpoints" in r.name]
    assert f"assumed {'VE' if fourier else 'VP'} at all times and" in told
    if case in AS_PUBLISHED:
        assert_released(score(model, case), SCORE_SDE[case]["ema"])
        assert model.data_range == wanted["data_range"]


@pytest.mark.parametrize("case", [case for case in SCORE_SDE if case.startswith("ncsnv2")])
def test_ncsnv2_is_inferred(given, case) -> None:
    model = load_score_sde(given(score_sde_content(case)))
    wanted = score_sde_config(case)["model"]
    assert isinstance(model.network, NCSNv2)
    assert isinstance(model, RawScoreModel)
    assert len(model.network.config["sigmas"]) == wanted["num_scales"]
    assert model.sde == VESDE(wanted["sigma_min"], wanted["sigma_max"])
    assert model.data_range == (0, 1)
    if case in AS_PUBLISHED:
        assert_released(score(model, case), SCORE_SDE[case]["ema"])


def test_the_levels_are_inferred_too(given) -> None:
    sde = load_score_sde(given(score_sde_content("ve_sigma_max_1348"))).sde
    assert sde == VESDE(0.01, 1348.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda names: [name for name in names if ".0." not in name],
        lambda names: names[:20],
        lambda names: names[:1],
        lambda names: [name.replace("all_modules", "modules") for name in names],
        lambda names: [name.replace("Conv_1", "Conv_9") for name in names],
        lambda names: [name for name in names if "NIN" not in name],
        lambda names: [name.replace("all_modules.3.", "all_modules.9999.") for name in names],
    ],
)
def test_files_whose_network_cannot_be_inferred(given, change) -> None:
    content = score_sde_content("ve_ncsnpp", prefix="")
    model = content["model"]
    names = [name for name in model if name != "sigmas"]
    changed = {name: model.get(name, torch.zeros(())) for name in change(names)}
    content["model"] = changed | {"sigmas": model["sigmas"]}
    with pytest.raises(CheckpointError, match=r"expected the tensors of an NCSN\+\+|does not fit"):
        load_score_sde(given(content), ema=False)


@pytest.mark.parametrize("shape", [(), (0,), (8,), (8, 0), (10**9, 0, 3, 3)], ids=str)
def test_files_of_shapes_that_belong_to_no_network(given, shape) -> None:
    content = score_sde_content("ve_ncsnpp")
    for name in set(content["model"]) - {"module.sigmas"}:
        content["model"][name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"expected the tensors of an NCSN\+\+"):
        load_score_sde(given(content), ema=False)


@pytest.mark.parametrize(
    ("case", "name", "shape"),
    [
        ("ncsnv2_64", "begin_conv.weight", (8,)),
        ("ncsnv2_64", "begin_conv.weight", (1, 3, 3, 3)),
        ("vp_ddpmpp", "all_modules.2.weight", (3, 3, 3, 3)),
    ],
)
def test_widths_that_no_network_has(given, case, name, shape) -> None:
    content = score_sde_content(case, prefix="")
    content["model"][name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: expected .* got"):
        load_score_sde(given(content), ema=False)


def test_ncsnv2_of_another_depth(given) -> None:
    content = score_sde_content("ncsnv2_64", prefix="")
    del content["model"]["res3.0.conv1.weight"]
    with pytest.raises(CheckpointError, match="expected an NCSNv2 of 4 to 6 levels, got 3"):
        load_score_sde(given(content), ema=False)


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
def test_into_a_network_of_ones_own(given, case, make, sde) -> None:
    network = make()
    model = load_score_sde(given(score_sde_content(case)), network)
    assert model.network is network
    assert not network.training
    assert model.sde == sde
    assert_released(score(model, case), SCORE_SDE[case]["ema"])


@pytest.mark.parametrize("case", ["ve_discrete_positional_scaled", "ncsnv2_64"])
def test_into_a_network_with_numbered_levels(given, case) -> None:
    content, config = score_sde_content(case), score_sde_config(case)
    network = load_score_sde(given(content), config).network
    model = load_score_sde(given(content), network)
    assert_released(score(model, case), SCORE_SDE[case]["ema"])
    other = copy.deepcopy(network)
    nn.init.zeros_(next(other.parameters()))
    other.config["sigmas"] = other.config["sigmas"][:-1]
    with pytest.raises(CheckpointError, match=r"sigmas: expected .* levels, got"):
        load_score_sde(given(content), other)

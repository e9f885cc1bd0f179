"""Networks of score_sde inferred from the names and shapes in a file."""

import logging

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

from diffusionkit import VESDE, VPSDE, EpsModel, RawScoreModel
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_score_sde
from diffusionkit.networks import NCSNv2

# Options that determine names and shapes in every network.
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
# The published combinations, for which the inferred network gives the released scores.
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
def test_ncsnpp_is_inferred(given, case, caplog) -> None:
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
    (warning,) = [r.message for r in caplog.records if "checkpoints" in r.name]
    assert f"assumed {'VE' if fourier else 'VP'} at all times and" in warning
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


def test_noise_levels_are_inferred(given) -> None:
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
def test_names_of_no_network_are_rejected(given, change) -> None:
    content = score_sde_content("ve_ncsnpp", prefix="")
    model = content["model"]
    names = [name for name in model if name != "sigmas"]
    changed = {name: model.get(name, torch.zeros(())) for name in change(names)}
    content["model"] = changed | {"sigmas": model["sigmas"]}
    with pytest.raises(CheckpointError, match=r"expected the tensors of an NCSN\+\+|does not fit"):
        load_score_sde(given(content), ema=False)


@pytest.mark.parametrize("shape", [(), (0,), (8,), (8, 0), (10**9, 0, 3, 3)], ids=str)
def test_shapes_of_no_network_are_rejected(given, shape) -> None:
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
def test_invalid_widths_are_rejected(given, case, name, shape) -> None:
    content = score_sde_content(case, prefix="")
    content["model"][name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: expected .* got"):
        load_score_sde(given(content), ema=False)


def test_ncsnv2_of_another_depth_is_rejected(given) -> None:
    content = score_sde_content("ncsnv2_64", prefix="")
    del content["model"]["res3.0.conv1.weight"]
    with pytest.raises(CheckpointError, match="expected an NCSNv2 of 4 to 6 levels, got 3"):
        load_score_sde(given(content), ema=False)

"""Files of score_sde: scores match released code, and errors name every problem in a file."""

import copy
import re

import numpy as np
import pytest
import torch
from support import seeded
from support.released import (
    SCORE_SDE,
    assert_released,
    score_sde_config,
    score_sde_content,
)
from support.released import (
    score_sde_score as score,
)
from support.released import (
    score_sde_state as state_of,
)

from diffusionkit import (
    VESDE,
    VPSDE,
    DDPMChain,
    EpsModel,
    IndexLabel,
    Langevin,
    PCSampler,
    RawScoreModel,
    ReverseDiffusion,
    SigmaLabel,
    StepLabel,
    SubVPSDE,
    TimeLabel,
)
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_score_sde
from diffusionkit.networks import DDPMUNet, NCSNpp, NCSNv2

# Upsampling by a filtered convolution fails in the released code: only the names are recorded.
WITH_OUTPUT = [case for case, data in SCORE_SDE.items() if "ema" in data]


@pytest.mark.parametrize("case", WITH_OUTPUT)
def test_scores_match_released_code(given, case) -> None:
    model = load_score_sde(given(score_sde_content(case)), score_sde_config(case))
    assert_released(score(model, case), SCORE_SDE[case]["ema"])
    kinds = {"ncsnpp": NCSNpp, "ddpm": DDPMUNet}
    name = score_sde_config(case)["model"]["name"]
    assert type(model.network) is kinds.get(name, NCSNv2)


@pytest.mark.parametrize(("prefix", "legacy"), [("module.", False), ("", True)])
@pytest.mark.parametrize("case", ["ve_skip_cat", "ncsnv2_64", "vp_ddpm"])
def test_real_files_hold_last_and_averaged_weights(tmp_path, case, prefix, legacy) -> None:
    path, config = tmp_path / "checkpoint_8.pth", score_sde_config(case)
    content = score_sde_content(case, prefix)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    averaged, last = load_score_sde(path, config), load_score_sde(str(path), config, ema=False)
    assert_released(score(averaged, case), SCORE_SDE[case]["ema"])
    assert_released(score(last, case), SCORE_SDE[case]["model"])
    assert not averaged.training
    assert not averaged.network.training


def test_last_weights_load_without_averages(given) -> None:
    content = score_sde_content("vp_ddpmpp")
    del content["ema"], content["optimizer"], content["step"]
    config = score_sde_config("vp_ddpmpp")
    model = load_score_sde(given(content), config, ema=False)
    assert_released(score(model, "vp_ddpmpp"), SCORE_SDE["vp_ddpmpp"]["model"])


@pytest.mark.parametrize(
    ("case", "layer"),
    [("ve_ddpmres_fir_conv", "ups.0.block"), ("ve_res_fir", "output_branch.1.up")],
)
def test_filtered_upsampling_convolutions_are_loaded(given, case, layer) -> None:
    content = score_sde_content(case)
    network = load_score_sde(given(content), score_sde_config(case), ema=False).network
    last = [n for n in content["model"] if n.endswith("Conv2d_0.weight")][-1]
    got = network.get_submodule(layer).conv.weight
    assert torch.equal(got, content["model"][last])


VE = RawScoreModel, VESDE(0.01, 50.0)
SIGMAS = [0.01 * 5000**0.3, 0.01 * 5000**0.85]


@pytest.mark.parametrize(
    ("case", "kind", "sde", "label", "noise_labels", "data_range"),
    [
        ("ve_ncsnpp", *VE, SigmaLabel, SIGMAS, (0, 1)),
        ("ve_centered_noscale", *VE, SigmaLabel, SIGMAS, (-1, 1)),
        ("ve_discrete_positional_scaled", *VE, IndexLabel, [25, 80], (0, 1)),
        ("ncsnv2_256_centered", *VE, IndexLabel, [58, 185], (-1, 1)),
        ("ncsnv2_64", *VE, IndexLabel, [58, 185], (0, 1)),
        ("vp_ddpmpp", EpsModel, VPSDE(0.1, 20.0), TimeLabel, [299.7, 849.15], (-1, 1)),
        ("vp_ddpmpp_deep", EpsModel, VPSDE(0.2, 10.0), TimeLabel, [299.7, 849.15], (-1, 1)),
        ("subvp_ddpmpp", EpsModel, SubVPSDE(0.1, 15.0), TimeLabel, [299.7, 849.15], (-1, 1)),
        ("vp_ddpmpp_discrete", EpsModel, DDPMChain.linear(), StepLabel, [250, 800], (-1, 1)),
        (
            "vp_ddpmpp_discrete_100",
            EpsModel,
            DDPMChain.linear(100, beta_max=15.0),
            StepLabel,
            [25, 80],
            (-1, 1),
        ),
        ("vp_ddpm_noconv_notcentered", EpsModel, DDPMChain.linear(), StepLabel, [250, 800], (0, 1)),
    ],
)
def test_models_of_every_process_sample(
    given, case, kind, sde, label, noise_labels, data_range
) -> None:
    model = load_score_sde(given(score_sde_content(case)), score_sde_config(case))
    assert type(model) is kind
    assert repr(model.sde) == repr(sde)
    assert type(model.label) is label
    got = model.label(model.sde, torch.tensor(SCORE_SDE[case]["t"]))
    torch.testing.assert_close(got, torch.tensor(noise_labels).float(), rtol=1e-5, atol=1e-4)
    assert model.data_range == model.network.config["data_range"] == data_range
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(snr=0.16), steps=3)
    samples = sampler(state_of(case).shape, generator=seeded())
    assert samples.shape == state_of(case).shape
    assert samples.isfinite().all()
    assert sampler.nfe == 7


def rejected(given, content, match, error=CheckpointError, config="ve_ncsnpp", **options) -> None:
    config = score_sde_config(config) if isinstance(config, str) else config
    with pytest.raises(error, match=match):
        load_score_sde(given(content), config, **options)


@pytest.fixture
def content():
    return score_sde_content("ve_ncsnpp")


FIRST = "all_modules.4.GroupNorm_0.weight"


@pytest.mark.parametrize("options", [{"ema": True}, {"ema": False}], ids=["ema", "model"])
def test_missing_and_extra_tensors_are_listed(given, content, options) -> None:
    del content["model"][f"module.{FIRST}"]
    content["model"]["module.another"] = content["model"]["module.all_modules.0.W"]
    if options["ema"]:  # the list holds no names, so only its length is checked
        content["ema"]["shadow_params"].append(torch.zeros(8))
        del content["ema"]["shadow_params"][6]
    rejected(given, content, rf"2 problems: missing {FIRST}; unexpected another", **options)


def test_misshapen_tensors_are_listed(given, content) -> None:
    model = content["model"]
    model[f"module.{FIRST}"] = torch.ones(9)
    model["module.all_modules.1.weight"] = torch.ones(32, 17)
    match = (
        r"2 problems: all_modules\.1\.weight: expected tensors for \(32, 16\), got \(32, 17\); "
        r"all_modules\.4\.GroupNorm_0\.weight: expected tensors for \(8,\), got \(9,\)"
    )
    rejected(given, content, match, ema=False)


def test_joined_tensors_are_checked_one_by_one(given, content) -> None:
    nin = next(name for name in content["model"] if name.endswith("NIN_1.W"))
    content["model"][nin] = torch.ones(16, 17)
    match = r"NIN_2\.W: expected tensors for \(48, 16\), got \(16, 16\), \(16, 17\), \(16, 16\)"
    rejected(given, content, match, ema=False)
    del content["model"][nin]
    rejected(given, content, rf"1 problems: missing {nin.removeprefix('module.')}$", ema=False)
    # The joined matrix would have the right shape.
    content["model"][nin] = torch.ones(16, 17)
    content["model"][nin.replace("NIN_1", "NIN_2")] = torch.ones(16, 15)
    rejected(given, content, r"expected tensors for \(48, 16\)", ema=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{"ema": True}, {"ema": False}], ids=["ema", "model"])
def test_non_finite_weights_are_rejected(given, content, value, options) -> None:
    content["model"]["module.all_modules.1.bias"][3] = value
    content["ema"]["shadow_params"][1][3] = value
    rejected(given, content, r"all_modules\.1\.bias: expected finite numbers", **options)


def test_averages_that_do_not_fit_are_rejected(given, content) -> None:
    shadows = content["ema"]["shadow_params"]
    n = len(shadows)
    for changed, match in [
        (shadows[:-1], f"expected {n} averaged tensors, one for each trained one, got {n - 1}"),
        ([*shadows, shadows[0]], f"expected {n} averaged tensors.*, got {n + 1}"),
        ([shadows[1], *shadows[1:]], r"average of all_modules\.1\.weight of shape \(32, 16\), got"),
        (tuple(shadows), "expected a list of tensors under 'ema', 'shadow_params'"),
        ([*shadows[:-1], 1.0], "expected a list of tensors under 'ema', 'shadow_params'"),
        ({}, "expected a list of tensors under 'ema', 'shadow_params'"),
    ]:
        content["ema"]["shadow_params"] = changed
        rejected(given, content, match)
    content["ema"] = [shadows]
    rejected(given, content, "expected a list of tensors under 'ema', 'shadow_params'")
    del content["ema"]
    rejected(given, content, r"expected a checkpoint of score_sde.*got \['optimizer', 'model', 'st")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: [c], "expected a checkpoint of score_sde.*got list"),
        (lambda c: {"ema": c["ema"]}, r"expected a checkpoint of score_sde.*got \['ema'\]"),
        (lambda c: c["model"], r"expected a checkpoint of score_sde.*got \['module\.sigmas'"),
        (lambda c: c | {"model": {}}, "expected tensors by name under 'model'"),
        (lambda c: c | {"model": list(c["model"].values())}, "tensors by name under 'model'"),
        (lambda c: c | {"model": c["model"] | {"a": 1.0}}, "tensors by name under 'model'"),
        (lambda c: c | {"model": c["model"] | {1: torch.ones(1)}}, "tensors by name under 'model'"),
    ],
)
def test_foreign_contents_are_rejected(given, content, change, match) -> None:
    rejected(given, change(content), match, ema="ema" in match)
    rejected(given, change(content), match, config=None, ema=False)


def test_duplicate_names_are_rejected(given, content) -> None:
    content["model"]["all_modules.1.bias"] = torch.zeros(32)
    rejected(given, content, "one network, with or without 'module.', got", ema=False)


@pytest.mark.parametrize(
    "sigmas",
    [
        torch.zeros(0),
        torch.tensor([50.0]),
        torch.tensor([50.0, torch.nan]),
        torch.tensor([torch.inf, 0.01]),
        torch.tensor([0.01, 50.0]),
        torch.tensor([50.0, 0.0]),
        torch.tensor([50.0, 0.01], dtype=torch.complex64),
        torch.ones(3, dtype=torch.bool),
    ],
    ids=["empty", "one", "nan", "inf", "rising", "zero", "complex", "bool"],
)
@pytest.mark.parametrize("config", [None, "ve_ncsnpp"])
def test_invalid_noise_levels_are_rejected(given, content, sigmas, config) -> None:
    content["model"]["module.sigmas"] = sigmas
    rejected(given, content, "expected sigmas, decreasing noise levels, got", config=config)
    del content["model"]["module.sigmas"]
    rejected(given, content, "expected sigmas, decreasing noise levels, got 0", config=config)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("ve_ncsnpp", {"sigma_max": 90.0}),
        ("ve_ncsnpp", {"sigma_min": 0.02}),
        ("ncsnv2_64", {"sigma_max": 90.0}),
    ],
)
def test_configurations_with_other_noise_levels_are_rejected(given, case, change) -> None:
    config = score_sde_config(case)
    config["model"] |= change
    rejected(given, score_sde_content(case), "sigmas: expected .* levels, got", config=config)


@pytest.mark.parametrize("case", ["ve_discrete_positional_scaled", "ncsnv2_64", "vp_ddpmpp"])
def test_configurations_with_other_numbers_of_noise_levels_are_rejected(given, case) -> None:
    config = score_sde_config(case)
    config["model"]["num_scales"] += 1
    match = r"network: expected model\.num_scales \d+ as in the file, got"
    rejected(given, score_sde_content(case), match, ValueError, config)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({"nf": 16}, "expected tensors for"),
        ({"num_res_blocks": 2}, "missing"),
        ({"attn_resolutions": []}, "missing|expected what"),
        ({"fir": False}, r"missing all_modules\.\d+\.Conv_0"),
        ({"resblock_type": "ddpm"}, "missing"),
        ({"progressive": "output_skip"}, "missing"),
        ({"progressive_input": "none"}, "missing|expected what"),
        ({"ch_mult": [1, 2, 2]}, "missing"),
        ({"conditional": False}, "unexpected|missing"),
        ({"embedding_type": "positional"}, "missing"),
    ],
)
def test_configurations_of_another_network_are_rejected(given, content, change, problems) -> None:
    config = copy.deepcopy(score_sde_config("ve_ncsnpp"))
    config["model"] |= change
    match = rf"checkpoint\.pth: the file does not fit the network, \d+ problems: .*(?:{problems})"
    rejected(given, content, match, config=config)


def test_at_most_twenty_problems_are_shown(given, content) -> None:
    config = score_sde_config("ve_ncsnpp_deep")
    with pytest.raises(CheckpointError) as caught:
        load_score_sde(given(content), config)
    count = int(re.search(r"(\d+) problems", str(caught.value))[1])
    assert count > 20
    assert str(caught.value).count(";") == 20
    assert str(caught.value).endswith("; ...")


def test_network_is_unchanged_by_a_file_that_does_not_fit(given, content) -> None:
    network = load_score_sde(given(content), score_sde_config("ve_ncsnpp")).network
    before = copy.deepcopy(network.state_dict())
    content["ema"]["shadow_params"][-1] = torch.full((3,), np.nan)
    rejected(given, content, "finite", config=network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_networks_of_other_classes_are_rejected(given, content) -> None:
    rejected(given, content, "expected an NCSNpp.*got Linear", TypeError, torch.nn.Linear(2, 2))


def test_missing_and_foreign_files_are_rejected(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_score_sde(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"checkpoint of score_sde.*HTML"):
        load_score_sde(tmp_path / "page.pth")

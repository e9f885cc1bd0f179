"""Files of score_sde: the scores of the released code, and every mistake in a file named."""

import copy
import re

import pytest
import torch
from released import DATA, assert_released, inputs, names, score_sde_config, score_sde_content

from diffusionkit import (
    VESDE,
    VPSDE,
    DDPMChain,
    EpsModel,
    IndexLabel,
    PCSampler,
    RawScoreModel,
    SigmaLabel,
    StepLabel,
    SubVPSDE,
    TimeLabel,
)
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_score_sde
from diffusionkit.networks import DDPMUNet, NCSNpp, NCSNv2

CASES = DATA["score_sde"]["cases"]
# The released code cannot run up-sampling by a filtered convolution, it has the names alone.
WITH_OUTPUT = [name for name in names("score_sde") if "model" in CASES[name]]


@pytest.fixture
def saved(tmp_path):
    """Save a content to a file."""

    def save(content) -> str:
        path = str(tmp_path / "checkpoint.pth")
        torch.save(content, path)
        return path

    return save


def state_of(case):
    config = score_sde_config(case)["data"]
    return inputs(2, config["num_channels"], config["image_size"], config["image_size"])


def score(model, case):
    with torch.no_grad():
        return model(state_of(case), torch.tensor(CASES[case]["t"]))


@pytest.mark.parametrize("prefix", ["module.", ""], ids=["parallel", "bare"])
@pytest.mark.parametrize("case", WITH_OUTPUT)
def test_scores_are_those_of_the_released_code(saved, case, prefix) -> None:
    path = saved(score_sde_content(case, prefix))
    averaged = load_score_sde(path, score_sde_config(case))
    assert not averaged.training
    assert_released(score(averaged, case), CASES[case]["ema"])
    if prefix:
        last = load_score_sde(path, score_sde_config(case), ema=False)
        assert_released(score(last, case), CASES[case]["model"])


@pytest.mark.parametrize("case", sorted(set(CASES) - set(WITH_OUTPUT)))
def test_filtered_convolutions_that_sample_up(saved, case) -> None:
    content = score_sde_content(case)
    network = load_score_sde(saved(content), score_sde_config(case)).network
    ups = [network.ups[0].block] if case == "ve_ddpmres_fir_conv" else [network.output_branch[1].up]
    named = {n: t for n, t in content["model"].items() if n.endswith("Conv2d_0.weight")}
    last = [tensor for tensor in named.values()][-1]
    shadow = list(content["model"]).index(list(named)[-1])
    assert ups[0].conv.weight.shape == last.shape
    # One behind the levels and, where there are any, behind the frequencies.
    assert torch.equal(ups[0].conv.weight, content["ema"]["shadow_params"][shadow - 2])


VE_LABELS = torch.tensor([0.01 * 5000**0.3, 0.01 * 5000**0.85])


@pytest.mark.parametrize(
    ("case", "kind", "sde", "label", "labels", "data_range"),
    [
        ("ve_ncsnpp", RawScoreModel, VESDE, SigmaLabel, VE_LABELS, (0, 1)),
        ("ve_centered_noscale", RawScoreModel, VESDE, SigmaLabel, VE_LABELS, (-1, 1)),
        ("ve_discrete_positional_scaled", RawScoreModel, VESDE, IndexLabel, [25, 80], (0, 1)),
        ("ncsnv2_256_centered", RawScoreModel, VESDE, IndexLabel, [58, 185], (-1, 1)),
        ("ncsnv2_64", RawScoreModel, VESDE, IndexLabel, [58, 185], (0, 1)),
        ("vp_ddpmpp", EpsModel, VPSDE, TimeLabel, [299.7, 849.15], (-1, 1)),
        ("subvp_ddpmpp", EpsModel, SubVPSDE, TimeLabel, [299.7, 849.15], (-1, 1)),
        ("vp_ddpmpp_discrete", EpsModel, DDPMChain, StepLabel, [250, 800], (-1, 1)),
        ("vp_ddpmpp_discrete_100", EpsModel, DDPMChain, StepLabel, [25, 80], (-1, 1)),
        ("vp_ddpm_noconv_notcentered", EpsModel, DDPMChain, StepLabel, [250, 800], (0, 1)),
    ],
)
def test_the_model_of_each_kind_samples(saved, case, kind, sde, label, labels, data_range) -> None:
    model = load_score_sde(saved(score_sde_content(case)), score_sde_config(case))
    assert type(model) is kind
    assert type(model.sde) is sde
    assert type(model.label) is label
    told = model.label(model.sde, torch.tensor(CASES[case]["t"]))
    torch.testing.assert_close(told, torch.as_tensor(labels).float(), rtol=1e-5, atol=1e-4)
    assert model.data_range == data_range
    result = PCSampler(steps=4).sample(
        model, state_of(case).shape, generator=torch.Generator().manual_seed(0)
    )
    assert result.x.shape == state_of(case).shape
    assert result.x.isfinite().all()


def test_the_constants_of_the_process() -> None:
    ...

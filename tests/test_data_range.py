"""Data in another range than the model's: refused with a line that scales them, and cheaply."""

import copy
import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded
from support.pretend_device import PretendDevice

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VLB,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    GaussianDecoder,
    PCSampler,
    ScoreMatching,
)
from diffusionkit.networks import MLP, DDPMpp

RANGES = {"[-1, 1]": (-1.0, 1.0), "[0, 1]": (0.0, 1.0), "[0, 255]": (0.0, 255.0)}


def model(data_range=None, sde=None):
    return EpsModel(lambda x, noise_label: 0 * x, sde or VPSDE(), data_range=data_range)


def images(data_range, *, seed=0, shape=(4, 3, 8, 8)):
    low, high = data_range
    return low + (high - low) * torch.rand(shape, generator=seeded(seed))


@pytest.mark.parametrize("given", RANGES)
@pytest.mark.parametrize("stated", RANGES)
def test_images_in_another_range_are_refused_with_the_line_that_scales_them(stated, given) -> None:
    one, x = model(RANGES[stated]), images(RANGES[given])
    if stated == given:
        assert ScoreMatching()(one, x).shape == (4,)
        return
    with pytest.raises(ValueError, match=r"^x0: expected data") as error:
        ScoreMatching()(one, x)
    line = re.search(r"first, to ([-+*. \dex]+)", str(error.value)).group(1)
    torch.testing.assert_close(eval(line), images(RANGES[stated]), atol=1e-3, rtol=1e-3)


@given(
    low=st.floats(-50, 50),
    width=st.floats(0.5, 100),
    shift=st.floats(0.01, 3).flatmap(lambda s: st.sampled_from([s, -s])),
)
def test_any_shift_out_of_the_range_is_refused(low, width, shift) -> None:
    x = torch.linspace(low, low + width, 8).view(2, 4)
    assert ScoreMatching()(model((low, low + width)), x).shape == (2,)
    with pytest.raises(ValueError, match=r"x0: expected data within the model's range"):
        ScoreMatching()(model((low, low + width)), x + shift * width)


def test_a_part_of_the_range_is_refused_in_the_first_calls_only() -> None:
    """Later a batch may be bright by chance."""
    one = model((-1.0, 1.0))
    bright = images((0.0, 1.0))
    with pytest.raises(ValueError, match=r"or pass the model data_range=\(0, 1\)"):
        ScoreMatching()(one, bright)
    ScoreMatching()(one, images((-1.0, 1.0)))
    ScoreMatching()(one, bright)
    with pytest.raises(ValueError, match="fill the model's range"):  # another model is asked anew
        ScoreMatching()(copy.deepcopy(one), bright)


def test_few_values_say_nothing_of_the_range() -> None:
    assert ScoreMatching()(model((-1.0, 1.0)), torch.full((2, 3), 0.5)).shape == (2,)
    grey = images((0.3, 0.9))  # no image in [0, 1] is without dark pixels
    assert ScoreMatching()(model((-1.0, 1.0)), grey).shape == (4,)


def test_masked_values_do_not_count() -> None:
    x, mask = images((-1.0, 1.0)), torch.ones(4, 1, 8, 8)
    x[..., 0], mask[..., 0] = 300.0, 0.0
    assert ScoreMatching()(model((-1.0, 1.0)), x, mask=mask).shape == (4,)
    with pytest.raises(ValueError, match="within the model's range"):
        ScoreMatching()(model((-1.0, 1.0)), x, mask=torch.ones(4, 1, 8, 8))


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), VESDE(sigma_max=50.0)], ids=repr)
def test_images_of_8_bits_are_refused_without_a_range(sde) -> None:
    with pytest.raises(
        ValueError, match=r"; scale 8-bit images to \[-1, 1\] by x / 127\.5 - 1, st"
    ):
        ScoreMatching()(model(sde=sde), images((0.0, 255.0)))


def test_images_of_8_bits_are_taken_where_process_or_model_say_so() -> None:
    x = images((0.0, 255.0))
    assert ScoreMatching()(model(sde=VESDE(sigma_max=400.0)), x).shape == (4,)
    assert ScoreMatching()(model((0.0, 255.0)), x).shape == (4,)
    network = model().network
    assert ScoreMatching()(EDMModel(network, EDMSDE(), sigma_data=70.0), x).shape == (4,)


def test_large_data_and_a_part_of_the_networks_range_are_warned_of_once(caplog) -> None:
    vectors, network = model(), DDPMpp(channels=3, width=8, multipliers=(1,), blocks=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ScoreMatching()(vectors, 1000 * torch.randn(8, 2, generator=seeded(0)))
    assert [r.getMessage() for r in caplog.records if "standardize" in r.getMessage()][1:] == []
    assert "are large for a process whose prior has standard deviation 1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ScoreMatching()(EpsModel(network, VPSDE()), images((0.0, 1.0)))
    assert "scale images in [0, 1] first, to -1 + x * 2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ScoreMatching()(EpsModel(network, VPSDE()), images((-1.0, 1.0)))
        ScoreMatching()(model(), torch.randn(8, 2))
    assert caplog.text == ""


def test_the_bound_of_a_chain_is_checked_too() -> None:
    x = GaussianDecoder().encode(torch.randint(256, (4, 3, 8, 8), generator=seeded(0)))
    VLB()(model((-1.0, 1.0), DDPMChain.linear(50)), x)
    with pytest.raises(ValueError, match="within the model's range"):
        VLB()(model((0.0, 1.0), DDPMChain.linear(50)), x)


@pytest.mark.parametrize("data_range", [None, (-1.0, 1.0)])
def test_a_device_is_read_in_the_first_call_alone(data_range) -> None:
    with PretendDevice("cuda") as device:
        one = EpsModel(MLP(3, width=4, depth=1), VPSDE(), data_range=data_range).to("cuda")
        x = 2 * torch.rand(40, 3, device="cuda") - 1
        counts = []
        for _ in range(3):
            with device.watched() as events:
                ScoreMatching()(one, x)
            counts.append(sum(events.values()))
        assert counts[1:] == [0, 0]
        assert 1 <= counts[0] <= 3


def test_a_device_is_refused_in_the_first_call() -> None:
    with PretendDevice("cuda"):
        one = EpsModel(MLP(3, width=4, depth=1), VPSDE(), data_range=(-1, 1)).to("cuda")
        with pytest.raises(ValueError, match="within the model's range"):
            ScoreMatching()(one, torch.rand(40, 3, device="cuda") * 255)


def test_compiled_code_is_not_stopped() -> None:
    one, objective = model((-1.0, 1.0)), ScoreMatching()
    compiled = torch.compile(lambda x: objective(one, x, t=torch.full((4,), 0.5)), backend="eager")
    assert compiled(images((0.0, 1.0))).shape == (4,)


def test_images_to_edit_are_checked() -> None:
    sampler = PCSampler(model((-1.0, 1.0)), DDIM(), steps=2)
    assert sampler.edit(images((-1.0, 1.0)), 0.6).shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="x0: expected data within the model's range"):
        sampler.edit(images((0.0, 255.0)), 0.6)

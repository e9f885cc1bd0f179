"""Network pickles of EDM2: denoisers match released code, and errors name every problem."""

import pytest
import torch
from support import seeded
from support.released import EDM2, assert_released, edm2_tensors, inputs

from diffusionkit import (
    Autoguidance,
    EDMModel,
    EDMWeighting,
    Heun,
    KarrasGrid,
    LearnedUncertainty,
    LogNormalTimes,
    PCSampler,
    ScoreMatching,
)
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_edm, load_edm2
from diffusionkit.checkpoints._edm_keys import EDMObject, read_edm_pickle
from diffusionkit.networks import EDM2UNet

RGB, LATENTS = "StandardRGBEncoder", "StabilityVAEEncoder"


@pytest.fixture
def load(written):
    def loader(case="plain", *, encoder=RGB, change=lambda tensors: None, half=False, **kwargs):
        tensors = edm2_tensors(case)
        if half:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        change(tensors)
        return load_edm2(written("Precond", EDM2[case]["kwargs"] | kwargs, tensors, encoder))

    return loader


def state(case):
    """Return the arguments at which the outputs were recorded."""
    kwargs, sigma = EDM2[case]["kwargs"], torch.tensor(EDM2[case]["sigma"])
    x = inputs(2, kwargs["img_channels"], 8, 8) * (1 + sigma.view(-1, 1, 1, 1))
    classes = kwargs["label_dim"]
    return x, sigma, {"class_labels": torch.tensor([1, classes - 1])} if classes else {}


@pytest.mark.parametrize("case", EDM2)
def test_denoisers_match_released_code(load, case) -> None:
    model = load(case)
    assert type(model) is EDMModel
    assert type(model.network) is EDM2UNet
    assert not model.training
    x, sigma, cond = state(case)
    with torch.no_grad():
        assert_released(model.predict(x, sigma, **cond).x0, EDM2[case]["D"], 1e-5)


@pytest.mark.parametrize("case", EDM2)
def test_losses_match_released_code(load, monkeypatch, case) -> None:
    kwargs, tensors = EDM2[case]["kwargs"], edm2_tensors(case)
    model, (_, sigma, cond) = load(case), state(case)
    weighting = EDMWeighting(model.sigma_data)
    objective = LearnedUncertainty(
        ScoreMatching(weighting, times=LogNormalTimes(-0.4, 1.0)),
        features=len(tensors["logvar_fourier.freqs"]),
    )
    objective.load_state_dict(
        {
            "frequencies": tensors["logvar_fourier.freqs"],
            "phases": tensors["logvar_fourier.phases"],
            "linear.weight": tensors["logvar_linear.weight"],
        }
    )
    shape = (2, kwargs["img_channels"], 8, 8)
    eps = inputs(*shape).flip(0, 3)
    monkeypatch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: eps)
    with torch.no_grad():
        u = objective.log_variance(model.sde, sigma)
        loss = objective(model, 0.4 * inputs(*shape), t=sigma, **cond)
    assert u.tolist() == pytest.approx(EDM2[case]["logvar"], abs=1e-6)
    assert loss.tolist() == pytest.approx(EDM2[case]["loss"], abs=1e-6)


def test_weights_in_half_precision_are_loaded_in_float32(load) -> None:
    exact, half = load(), load(half=True)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    x, sigma, cond = state("plain")
    with torch.no_grad():
        a, b = (m.predict(x, sigma, **cond).x0 for m in (exact, half))
    assert 0 < float((a - b).norm() / a.norm()) < 1e-2


@pytest.mark.parametrize(("encoder", "expected"), [(RGB, (-1.0, 1.0)), (LATENTS, None)])
def test_the_encoder_determines_the_range_of_the_data(load, encoder, expected) -> None:
    assert load(encoder=encoder).data_range == expected


def test_a_loaded_model_samples(load) -> None:
    model = load("other", encoder=LATENTS)
    assert model.sigma_data == 0.7
    sampler = PCSampler(model, Heun(), grid=KarrasGrid(to_zero=True), steps=3)
    x = sampler((2, 4, 8, 8), generator=seeded())
    assert x.shape == (2, 4, 8, 8)
    assert x.isfinite().all()


def test_files_guide_each_other(load) -> None:
    """Autoguidance of a network by one of another size."""
    model, weaker = load("plain"), load("no heads", encoder=RGB)
    x, sigma, cond = state("plain")
    for conditions in (None, ("class_labels",)):
        guided = Autoguidance(model, weaker, 2.0, conditions=conditions)
        labels = cond["class_labels"] % 3
        with torch.no_grad():
            got = guided.predict(x, sigma, class_labels=labels).x0
            a, b = (m.predict(x, sigma, class_labels=labels).x0 for m in (model, weaker))
        torch.testing.assert_close(got, 2 * a - b, rtol=1e-4, atol=1e-4)


def test_entries_of_a_pickle(written) -> None:
    """The encoder's arrays are read past, and its source code is not run."""
    path = written("Precond", EDM2["plain"]["kwargs"], edm2_tensors("plain"), LATENTS)
    content = read_edm_pickle(path)
    assert content["encoder"] == EDMObject(LATENTS, (), {}, {})
    assert content["ema"].state_dict.keys() == edm2_tensors("plain").keys()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"channel_mult_noise": 2}, "channel_mult_noise: expected None, got 2"),
        ({"channel_mult_emb": [4]}, r"channel_mult_emb: expected None, got \[4\]"),
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter: expected \(1, 1\), got"),
        ({"model_channels": 8}, r"problems: .*expected tensors for"),
        ({"num_blocks": 2}, "problems: .*missing"),
        ({"channel_mult": [1, 2, 2]}, "problems: .*missing"),
        ({"channel_mult": []}, "expected a known network of EDM2.*multipliers"),
        ({"attn_resolutions": []}, "problems: .*unexpected"),
        ({"channels_per_head": 3}, "heads: expected a divisor of 32 channels, got 10"),
        ({"label_dim": 0}, r"unexpected emb_label\.weight"),
        ({"label_dim": 4}, r"emb_label\.weight: expected tensors for \(32, 4\)"),
        ({"img_resolution": 1}, "img_resolution: expected 2 different halvings, got 1"),
        ({"img_resolution": 16}, "missing enc"),
        ({"logvar_channels": 64}, r"logvar_fourier\.freqs: expected a tensor of shape \(64,\)"),
        ({"sigma_data": "0.5"}, "expected a known network of EDM2, got sigma_data"),
        ({"sigma_data": 0.0}, "expected a known network of EDM2, got sigma_data"),
        ({"label_balance": 1.5}, r"label_balance: expected a number in \[0, 1\], got 1.5"),
        ({"clip_act": -1.0}, "expected a known network of EDM2, got clip_act"),
        ({"dropout": 1.0}, "expected a known network of EDM2, got dropout"),
        ({"flavor": "enc"}, "init_kwargs: expected arguments of EDM2, got 'flavor'"),
        ({"label_dim": None}, "expected a known network of EDM2, got label_dim"),
    ],
)
def test_arguments_of_another_network_are_rejected(load, kwargs, match) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(**kwargs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("unet.emb_noise.weight"), r"1 problems: missing emb_noise\.weight"),
        (lambda t: t.pop("logvar_linear.weight"), r"logvar_linear\.weight: .*got none"),
        (lambda t: t.update({"unet.x.weight": torch.ones(1)}), r"1 problems: unexpected x\.weight"),
        (
            lambda t: t.update({"unet.out_gain": torch.ones(1)}),
            r"out_gain: expected tensors for \(1,\), got \(1,\)",
        ),
        (
            lambda t: t.update({"unet.emb_fourier.phases": torch.ones(15)}),
            r"freqs, emb_fourier\.phases: expected tensors for \(2, 16\), got \(16,\), \(15,\)",
        ),
        (lambda t: t["unet.emb_noise.weight"].fill_(torch.nan), "expected finite"),
        (lambda t: t["logvar_linear.weight"].fill_(torch.nan), "expected finite"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(load, change, match) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(change=change)


@pytest.mark.parametrize(
    ("name", "encoder", "match"),
    [
        ("EDMPrecond", RGB, "class_name: expected 'Precond', got 'EDMPrecond'"),
        ("Precond", None, "encoder: expected one of .*, got None"),
        ("Precond", "MyEncoder", "encoder: expected one of .*, got 'MyEncoder'"),
    ],
)
def test_unknown_structures_are_rejected(written, name, encoder, match) -> None:
    path = written(name, EDM2["plain"]["kwargs"], edm2_tensors("plain"), encoder)
    with pytest.raises(CheckpointError, match=match):
        load_edm2(path)


def test_files_of_the_other_paper_name_the_loader(written) -> None:
    path = written("Precond", EDM2["plain"]["kwargs"], edm2_tensors("plain"), RGB)
    with pytest.raises(CheckpointError, match=r"got 'Precond' of EDM2; use load_edm2"):
        load_edm(path)
    with pytest.raises(CheckpointError, match=r"got 'EDMPrecond'; use load_edm$"):
        load_edm2(written("EDMPrecond", EDM2["plain"]["kwargs"], {}, RGB))

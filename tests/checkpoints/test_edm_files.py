"""Network pickles of EDM: denoisers match released code, and errors name every problem."""

import math

import pytest
import torch
from support import seeded
from support.released import EDM, assert_released, inputs, shapes, weights

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    Langevin,
    PCSampler,
    ReverseDiffusion,
    ScaledScoreModel,
)
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_edm
from diffusionkit.networks import ADMUNet, NCSNpp


def tensors_of(case):
    found = weights(shapes("edm", case))
    if EDM[case]["precond"] == "iDDPMPrecond":
        found["u"] = torch.zeros(EDM[case]["kwargs"].get("M", 1000) + 1)
    return found


@pytest.fixture
def load(written):
    def loader(case, **kwargs):
        return load_edm(
            written(EDM[case]["precond"], EDM[case]["kwargs"] | kwargs, tensors_of(case))
        )

    return loader


def conditions(case):
    kwargs, found = EDM[case]["kwargs"], {}
    if kwargs["label_dim"]:
        found["class_labels"] = torch.tensor([3, kwargs["label_dim"] - 1])
    if kwargs["augment_dim"]:
        found["condition"] = inputs(2, 9)
    return found


def denoised(model, case):
    """Return EDM's D(x; sigma), the prediction at the state alpha x."""
    t = torch.tensor(EDM[case]["t"], dtype=torch.float64)
    alpha, sigma = model.sde.marginal(t)
    expected = torch.tensor(EDM[case]["sigma"], dtype=torch.float64)
    torch.testing.assert_close(sigma / alpha, expected, rtol=2e-5, atol=0)
    x = inputs(2, 3, 8, 8) * (1 + expected.float().view(-1, 1, 1, 1))
    with torch.no_grad():
        state = alpha.float().view(-1, 1, 1, 1) * x
        return model.predict(state, t.float(), **conditions(case)).x0


@pytest.mark.parametrize("case", EDM)
def test_denoisers_match_released_code(load, case) -> None:
    model = load(case)
    assert not model.training
    assert_released(denoised(model, case), EDM[case]["D"], 1e-4)
    kind = NCSNpp if EDM[case]["kwargs"]["model_type"] == "SongUNet" else ADMUNet
    assert type(model.network) is kind
    assert model.data_range == (-1, 1)


@pytest.mark.parametrize(
    ("case", "kind", "sde"),
    [
        ("edm_ddpmpp", EDMModel, EDMSDE()),
        ("vp_ddpmpp", EpsModel, VPSDE(0.1, 20.0)),
        ("vp_other", EpsModel, VPSDE(0.2, 9.7)),
        ("ve_ncsnpp", ScaledScoreModel, VESDE(0.02, 100.0)),
        ("ve_other", ScaledScoreModel, VESDE(0.03, 60.0)),
        ("iddpm_dhariwal", EpsModel, DDPMChain.cosine(1000)),
        ("iddpm_other", EpsModel, DDPMChain.cosine(100, s=0.02, max_beta=0.99)),
    ],
)
def test_models_of_every_preconditioning_sample(load, case, kind, sde) -> None:
    model = load(case)
    assert type(model) is kind
    assert repr(model.sde) == repr(sde)
    assert model.variance == ("learned_range" if case.startswith("iddpm") else None)
    sampler = PCSampler(model, ReverseDiffusion(), Langevin(snr=0.16), steps=3)
    samples = sampler((2, 3, 8, 8), generator=seeded(), **conditions(case))
    assert samples.shape == (2, 3, 8, 8)
    assert samples.isfinite().all()


def test_last_beta_of_the_cosine_chain_is_clipped(load) -> None:
    sde = load("iddpm_other").sde
    betas = [1 - (cosine(i + 1, 100) / cosine(i, 100)) for i in range(100)]
    assert betas[-1] > 0.99
    expected = torch.tensor([min(beta, 0.99) for beta in betas], dtype=torch.float64)
    torch.testing.assert_close(sde.betas, expected, rtol=1e-9, atol=0)


def cosine(i, steps, s=0.02):
    return math.cos((i / steps + s) / (1 + s) * math.pi / 2) ** 2


@pytest.mark.parametrize(
    ("case", "noise_labels"),
    [
        ("vp_ddpmpp", (99.9, 699.3)),
        ("vp_other", (49.9, 349.3)),
        ("iddpm_dhariwal", (250, 800)),
        ("iddpm_other", (25, 80)),
    ],
)
def test_noise_labels_match_released_code(load, case, noise_labels) -> None:
    model = load(case)
    got = model.label(model.sde, torch.tensor(EDM[case]["t"]))
    assert got.tolist() == pytest.approx(noise_labels, rel=1e-6)


def test_zero_augmentation_condition_equals_none(load) -> None:
    model = load("vp_ddpmpp")
    x, t = inputs(2, 3, 8, 8), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        none = model.predict(x, t).x0
        zeros = model.predict(x, t, condition=torch.zeros(2, 9)).x0
    torch.testing.assert_close(none, zeros, rtol=1e-5, atol=1e-5)


def test_missing_arguments_have_released_defaults(written, load) -> None:
    """Arguments that a pickle omits have the released defaults."""
    model = load("vp_ddpmpp")
    assert model.network.config["dropout"] == 0.1
    case = "edm_ncsnpp"
    assert load(case).sigma_data == 0.5
    assert load("edm_skip").sigma_data == 0.7
    # The default network of each preconditioning.
    kwargs = EDM["iddpm_other"]["kwargs"] | {}
    del kwargs["model_type"]
    model = load_edm(written("iDDPMPrecond", kwargs, tensors_of("iddpm_other")))
    assert_released(denoised(model, "iddpm_other"), EDM["iddpm_other"]["D"], 1e-4)
    named = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    kwargs = {name: EDM["vp_other"]["kwargs"][name] for name in (*named, "beta_min", "beta_d", "M")}
    model = load_edm(written("VPPrecond", kwargs, tensors_of("vp_other")))
    assert_released(denoised(model, "vp_other"), EDM["vp_other"]["D"], 1e-4)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"model_type": "UNet"}, "model_type: expected one of 'SongUNet', .*, got 'UNet'"),
        ({"channel_mult_emb": 2}, "channel_mult_emb: expected 4, got 2"),
        ({"channel_mult_noise": 2}, "channel_mult_noise: expected 1 with a positional embedding"),
        ({"embedding_type": "learned"}, "embedding_type: expected one of .*, got 'learned'"),
        ({"encoder_type": "dense"}, "encoder_type: expected one of .*, got 'dense'"),
        ({"decoder_type": "residual"}, "decoder_type: expected one of .*, got 'residual'"),
        ({"model_channels": 16}, r"problems: .*expected tensors for \(64, 16\)"),
        ({"num_blocks": 2}, "problems: .*missing"),
        ({"channel_mult": [1, 2, 2]}, "problems: .*missing"),
        ({"channel_mult": []}, "network-snapshot.*expected a known network.*multipliers"),
        ({"attn_resolutions": []}, "problems: .*unexpected"),
        ({"label_dim": 10}, r"missing map_label\.weight"),
        ({"augment_dim": 9}, r"missing map_augment\.weight"),
        ({"img_channels": 4}, "expected tensors for"),
        ({"img_resolution": 16}, "missing enc"),
        ({"img_resolution": 1}, "img_resolution: expected 2 different halvings, got 1"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter: expected a symmetric filter of even"),
        ({"resample_filter": [1, 3, 2, 1]}, "resample_filter: expected a symmetric filter of"),
        (
            {"resample_filter": [1, 3, 3, 1]},
            r"resample_filter: expected a tensor of .*\(1, 1, 2, 2",
        ),
        (
            {"resample_filter": [1, -1, -1, 1]},
            "fir_kernel: expected at least two taps of nonzero sum",
        ),
        ({"num_heads": 2}, "init_kwargs: expected arguments of SongUNet, got 'num_heads'"),
        ({"C_1": 0.1}, "init_kwargs: expected arguments of SongUNet, got 'C_1'"),
        ({"img_resolution": "8"}, "expected a known network of EDM, got"),
        ({"beta_d": -20.0}, "expected a known network of EDM, got"),
        ({"beta_min": "0.1"}, "expected a known network of EDM, got"),
        ({"M": 1}, "expected a known network of EDM, got"),
    ],
)
def test_arguments_of_another_network_are_rejected(load, kwargs, match) -> None:
    with pytest.raises(CheckpointError, match=match):
        load("vp_other", **kwargs)


def test_classes_other_than_preconditionings_are_rejected(written) -> None:
    with pytest.raises(CheckpointError, match=r"class_name: expected one of .*, got 'MyPrecond'"):
        load_edm(written("MyPrecond", EDM["vp_other"]["kwargs"], tensors_of("vp_other")))
    with pytest.raises(CheckpointError, match="expected a known network of EDM"):
        load_edm(written("SongUNet", {"img_resolution": 8}, {"map_layer0.weight": torch.ones(1)}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.map_layer0.bias"), r"1 problems: missing map_layer0\.bias"),
        (
            lambda t: t.update({"model.map_layer9.bias": torch.ones(1)}),
            r"1 problems: unexpected map_layer9\.bias",
        ),
        (
            lambda t: t.update({"model.map_layer0.bias": torch.ones(33)}),
            r"map_layer0\.bias: expected tensors for \(32,\), got \(33,\)",
        ),
        (
            lambda t: t["model.map_layer1.weight"].fill_(math.inf),
            r"map_layer1\.weight: expected finite",
        ),
        (
            lambda t: t.update({"model.enc.8x8_block0.qkv.bias": torch.ones(23)}),
            r"qkv\.bias: expected tensors for \(24,\), got \(23,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(written, change, match) -> None:
    tensors = tensors_of("vp_other")
    change(tensors)
    with pytest.raises(CheckpointError, match=match):
        load_edm(written("VPPrecond", EDM["vp_other"]["kwargs"], tensors))


def test_wrong_number_of_classes_is_rejected(written) -> None:
    case = "ve_ncsnpp"
    tensors = tensors_of(case)
    tensors["model.map_label.weight"] = torch.ones(32, 11)
    with pytest.raises(
        CheckpointError, match=r"map_label\.weight, map_label\.bias: expected tensors"
    ):
        load_edm(written("VEPrecond", EDM[case]["kwargs"], tensors))


def test_missing_and_foreign_files_are_rejected(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_edm(tmp_path / "none.pkl")
    (tmp_path / "page.pkl").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"page\.pkl: expected a network pickle of EDM.*HTML"):
        load_edm(tmp_path / "page.pkl")

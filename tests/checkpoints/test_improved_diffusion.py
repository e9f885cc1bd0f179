"""Files of improved-diffusion and guided-diffusion: outputs, flags and errors."""

import math

import pytest
import torch
from support.released import OPENAI, assert_released, inputs, shapes, weights

from diffusionkit import DDPMChain, EpsModel, StepLabel, X0Model
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_improved_diffusion
from diffusionkit.networks import ADMUNet

CASES = [case for case in OPENAI if not case.startswith("golden")]


def content_of(case):
    return weights(shapes("openai", case))


def conditions(case):
    data, found = OPENAI[case], {}
    if data["classes"]:
        found["class_labels"] = torch.tensor([3, data["classes"] - 1])
    if data["low_res"]:
        found["low_res"] = inputs(2, data["channels"], 4, 4).flip(0)
    return found


def output(model, case, label=(250.0, 800.0)):
    x = inputs(2, OPENAI[case]["channels"], 8, 8)
    with torch.no_grad():
        return model.network(x, torch.tensor(label), **conditions(case))


# The flags that leave no trace: the order of q, k and v and the numbers of heads.
NEEDED = ("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order")


@pytest.mark.parametrize(
    ("case", "flags"),
    [*((case, "needed") for case in CASES), ("improved_classes", "all"), ("guided_no_conv", "all")],
)
def test_outputs_match_released_code(given, case, flags) -> None:
    given_flags = OPENAI[case]["flags"]
    if flags == "needed":
        given_flags = {name: value for name, value in given_flags.items() if name in NEEDED}
    # Equal numbers of input and output channels are ambiguous.
    if case == "improved_one_channel":
        given_flags = given_flags | {"learn_sigma": True}
    model = load_improved_diffusion(given(content_of(case)), **given_flags)
    assert not model.training
    assert isinstance(model.network, ADMUNet)
    assert_released(output(model, case), OPENAI[case]["out"], 2e-4)
    learned = OPENAI[case]["flags"]["learn_sigma"]
    assert model.variance == ("learned_range" if learned else "fixed_large")
    assert model.data_range == (-1, 1)


@pytest.mark.parametrize("case", ["improved_plain", "improved_superres", "guided_updown_new"])
def test_predictions_use_the_noise_half_of_the_output(given, case) -> None:
    """At time (i + 1) / N the noise label is i * 1000 / N; the first output half is the noise."""
    model = load_improved_diffusion(given(content_of(case)), **OPENAI[case]["flags"])
    channels = OPENAI[case]["channels"]
    x, t = inputs(2, channels, 8, 8), torch.tensor([0.251, 0.801])
    with torch.no_grad():
        eps = model.predict(x, t, **conditions(case)).eps
    # In float32 the label 800 has an error of 6e-5, and so do its features.
    torch.testing.assert_close(eps, output(model, case)[:, :channels], rtol=0, atol=2e-4)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_real_file_is_loaded(tmp_path, legacy) -> None:
    path = tmp_path / "ema_0.9999_500000.pt"
    torch.save(content_of("improved_classes"), path, _use_new_zipfile_serialization=not legacy)
    model = load_improved_diffusion(path, **OPENAI["improved_classes"]["flags"])
    assert_released(output(model, "improved_classes"), OPENAI["improved_classes"]["out"])


def test_outputs_match_an_independent_implementation(given) -> None:
    """UNetModel(3, 32, 6, 1, (2,), (1, 2), num_classes=10), in float64."""
    content = weights(shapes("openai", "golden"), amplitude=0.05, chirp=0.0)
    assert sum(tensor.numel() for tensor in content.values()) == 758310
    model = load_improved_diffusion(given(content))
    x = torch.sin(0.1 * torch.arange(2 * 3 * 16 * 16)).view(2, 3, 16, 16)
    with torch.no_grad():
        out = model.network(x, torch.tensor([0.25, 250.25]), class_labels=torch.tensor([3, 7]))
    assert out.shape == (2, 6, 16, 16)
    first = [-0.09294580401246479, -0.12295907570917347, -0.06312490946584916, 0.017615589388343417]
    last = [0.05908687530684292, 0.03999649702735104, 0.011381911459584466, -0.009613640859382867]
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-5)
    assert out.flatten()[-4:].tolist() == pytest.approx(last, abs=1e-5)
    assert float(out.mean()) == pytest.approx(0.026841981628071724, rel=1e-5)
    assert float(out.std()) == pytest.approx(0.1398466323632847, rel=1e-5)
    assert float(out.abs().sum()) == pytest.approx(301.1951120728647, rel=1e-5)


@pytest.mark.slow
def test_outputs_of_the_cifar10_network_match_an_independent_implementation(tmp_path) -> None:
    content = weights(shapes("openai", "golden_cifar10"), amplitude=0.05, chirp=0.0)
    assert sum(tensor.numel() for tensor in content.values()) == 52546438
    torch.save(content, tmp_path / "cifar10.pt")
    model = load_improved_diffusion(tmp_path / "cifar10.pt", num_heads=4, learn_sigma=True)
    x = torch.sin(0.1 * torch.arange(3 * 32 * 32)).view(1, 3, 32, 32)
    with torch.no_grad():
        out = model.network(x, torch.tensor([250.25]))
    first = [0.12245929599855225, 0.22242787145042434, 0.2930373626554352, 0.3049057035732528]
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-5)
    assert float(out.mean()) == pytest.approx(0.019566822628132398, rel=1e-4)
    assert float(out.std()) == pytest.approx(0.09995015139243905, rel=1e-4)
    assert float(out.abs().sum()) == pytest.approx(441.6312448872644, rel=1e-4)


def load(given, case="improved_plain", **flags):
    return load_improved_diffusion(given(content_of(case)), **OPENAI[case]["flags"] | flags)


@pytest.mark.parametrize(
    ("flags", "betas", "noise_labels"),
    [
        ({}, (1e-4, 0.02, 1000), (0, 999)),
        ({"diffusion_steps": 4000}, (2.5e-5, 0.005, 4000), (0, 999.75)),
        (
            {"diffusion_steps": 4000, "rescale_timesteps": False},
            (2.5e-5, 0.005, 4000),
            (0, 3999),
        ),
        ({"noise_schedule": "cosine"}, (4.128422482196914e-05, 0.999, 1000), (0, 999)),
        (
            {"noise_schedule": "cosine", "diffusion_steps": 4000},
            (9.865818813681315e-06, 0.999, 4000),
            (0, 999.75),
        ),
        ({"diffusion_steps": 100, "rescale_timesteps": True}, (1e-3, 0.2, 100), (0, 990)),
        ({"noise_schedule": "linear", "rescale_timesteps": False}, (1e-4, 0.02, 1000), (0, 999)),
    ],
)
def test_flags_set_the_chain_and_the_noise_label(given, flags, betas, noise_labels) -> None:
    model = load(given, **flags)
    assert isinstance(model.sde, DDPMChain)
    first, last, steps = betas
    assert model.sde.steps == steps
    assert float(model.sde.betas[0]) == pytest.approx(first, rel=1e-12)
    assert float(model.sde.betas[-1]) == pytest.approx(last, rel=1e-12)
    assert isinstance(model.label, StepLabel)
    got = model.label(model.sde, torch.tensor([1 / steps, 1.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx(noise_labels, abs=1e-9)


def test_predict_xstart_gives_an_x0_model(given) -> None:
    assert type(load(given)) is EpsModel
    model = load(given, predict_xstart=True)
    assert type(model) is X0Model
    x, t = inputs(2, 3, 8, 8), torch.tensor([0.251, 0.801])
    with torch.no_grad():
        x0 = model.predict(x, t).x0
    torch.testing.assert_close(x0, output(model, "improved_plain"), rtol=0, atol=2e-4)


def test_dropout_is_kept_for_further_training(given) -> None:
    assert load(given, dropout=0.25).network.config["dropout"] == 0.25
    assert load(given).network.config["dropout"] == 0.0


def test_six_channels_include_a_low_resolution_image_by_default(given) -> None:
    """The flag `learn_sigma` distinguishes 3 + 3 channels from 6."""
    content = content_of("improved_superres_plain")
    three = load_improved_diffusion(given(content)).network.config
    assert (three["channels"], three["low_res_channels"], three["learn_sigma"]) == (3, 3, False)
    six = content | weights({"out.2.weight": (6, 32, 3, 3), "out.2.bias": (6,)})
    both = load_improved_diffusion(given(six)).network.config
    assert (both["channels"], both["low_res_channels"], both["learn_sigma"]) == (3, 3, True)
    plain = load_improved_diffusion(given(six), learn_sigma=False).network.config
    assert (plain["channels"], plain["low_res_channels"], plain["learn_sigma"]) == (6, None, False)


@pytest.mark.parametrize(
    ("case", "flag", "value", "stored"),
    [
        ("improved_learn_sigma", "num_channels", 64, "32"),
        ("improved_learn_sigma", "num_res_blocks", 3, "2"),
        ("improved_plain", "learn_sigma", True, "False"),
        ("improved_learn_sigma", "learn_sigma", False, "True"),
        ("improved_plain", "class_cond", True, "False"),
        ("improved_classes", "class_cond", False, "True"),
        ("improved_plain", "use_scale_shift_norm", True, "False"),
        ("improved_learn_sigma", "use_scale_shift_norm", False, "True"),
        ("guided_updown_new", "resblock_updown", False, "True"),
        ("improved_plain", "resblock_updown", True, "False"),
    ],
)
def test_flags_that_contradict_the_file_are_rejected(given, case, flag, value, stored) -> None:
    with pytest.raises(
        ValueError, match=rf"^{flag}: expected {stored} as in the file, got {value}$"
    ):
        load(given, case, **{flag: value})


def test_unknown_flags_and_values_are_rejected(given) -> None:
    with pytest.raises(TypeError, match=r"flags: expected released ones.*num_heads.*'num_head'$"):
        load(given, num_head=3)
    with pytest.raises(ValueError, match="noise_schedule: expected linear or cosine, got 'sqrt'"):
        load(given, noise_schedule="sqrt")
    with pytest.raises(ValueError, match="heads"):
        load(given, num_heads=3)
    with pytest.raises(ValueError, match="steps"):
        load(given, diffusion_steps=0)


@pytest.mark.parametrize(
    "flag",
    ["image_size", "timestep_respacing", "use_kl", "use_fp16", "use_checkpoint"],
)
def test_flags_without_effect_are_accepted(given, flag) -> None:
    model = load(given, **{flag: "anything"})
    assert_released(output(model, "improved_plain"), OPENAI["improved_plain"]["out"])


def test_flags_without_trace_change_the_output(given) -> None:
    """Otherwise a wrong default would go unnoticed."""
    case = "guided_half_new"
    right = output(load(given, case), case)
    for flag, value in [("num_heads", 2), ("use_new_attention_order", False)]:
        wrong = output(load(given, case, **{flag: value}), case)
        assert float((wrong - right).abs().max() / right.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("middle_block.1.norm.weight"), r"1 problems: missing middle_block\.1\.no"),
        (lambda c: c.pop("time_embed.2.bias"), r"1 problems: missing time_embed\.2\.bias"),
        (lambda c: c.update(more=torch.ones(2)), "1 problems: unexpected more"),
        (
            lambda c: c.update({"out.0.weight": torch.ones(33)}),
            r"1 problems: out\.0\.weight: expected tensors for \(32,\), got \(33,\)",
        ),
        (
            lambda c: c.update({"middle_block.1.qkv.bias": torch.ones(191)}),
            r"1 problems: middle_block\.1\.qkv\.bias: expected tensors for \(192,\), got \(191,\)",
        ),
        (
            lambda c: c.update({"middle_block.1.qkv.weight": torch.ones(192, 64, 2)}),
            r"1 problems: middle_block\.1\.qkv\.weight: expected tensors for \(192, 64\), got",
        ),
        (
            lambda c: c.update({"middle_block.1.proj_out.weight": torch.ones(64, 64, 3)}),
            r"1 problems: middle_block\.1\.proj_out\.weight: expected tensors for \(64, 64\), got",
        ),
        (lambda c: c["out.2.bias"].fill_(math.nan), r"1 problems: out\.2\.bias: expected finite"),
        (lambda c: c.pop("label_emb.weight"), "released|problems|state dict"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(given, change, match) -> None:
    content = content_of("improved_classes")
    change(content)
    flags = {name: OPENAI["improved_classes"]["flags"][name] for name in NEEDED[:2]}
    if match == "released|problems|state dict":  # a valid file of a network without classes
        assert (
            load_improved_diffusion(given(content), **flags).network.config["num_classes"] is None
        )
        return
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pth: the file does not fit.*{match}"):
        load_improved_diffusion(given(content), **flags)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [c],
        lambda c: {"model": c},
        lambda c: {},
        lambda c: {1: torch.ones(1)},
        lambda c: c | {"step": 3},
        lambda c: {name: t for name, t in c.items() if not name.startswith("time_embed")},
        lambda c: {name: t for name, t in c.items() if not name.startswith("out.")},
        lambda c: {name: t for name, t in c.items() if not name.startswith("output_blocks")},
        lambda c: {name: t for name, t in c.items() if not name.startswith("input_blocks")},
        lambda c: {name: torch.zeros(()) for name in c},
        lambda c: {name: t[:0] for name, t in c.items()},
    ],
)
def test_foreign_contents_are_rejected(given, change) -> None:
    path = given(change(content_of("improved_plain")))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: .*expected a state dict of imp"):
        load_improved_diffusion(path)


def test_missing_file_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_improved_diffusion(tmp_path / "none.pt")

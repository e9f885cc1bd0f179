"""Checkpoints of DiT and SiT: outputs of the released networks, and files that are refused."""

import argparse
from collections import OrderedDict
from typing import Any

import pytest
import torch
from support.released import DIT, assert_released, dit_inputs, dit_weights

from diffusionkit import (
    DDIM,
    Ancestral,
    CheckpointError,
    ClassifierFreeGuidance,
    DDPMChain,
    EpsModel,
    FlowMatchingSDE,
    PCSampler,
    ReverseTimeLabel,
    StepLabel,
    VelocityModel,
)
from diffusionkit.checkpoints import load_dit, load_sit

CASES = list(DIT)
HEADS = {case: DIT[case]["kwargs"]["num_heads"] for case in CASES}


def loaded(given, content: Any, case: str = "dit_learned", **options: Any) -> Any:
    return load_dit(given(content), heads=HEADS[case], **options)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_released_network(case: str, tmp_path) -> None:
    torch.save(OrderedDict(dit_weights(case)), tmp_path / "DiT.pt")
    model = load_dit(tmp_path / "DiT.pt", heads=HEADS[case])
    assert not model.training
    x, label, classes = dit_inputs(case)
    with torch.no_grad():
        output = model.network(x, label, classes)
    assert_released(output, DIT[case]["output"], tolerance=1e-5)
    learned = DIT[case]["kwargs"]["learn_sigma"]
    assert output.shape == (3, x.shape[1] * (1 + learned), *x.shape[2:])
    assert model.network.config["mlp_ratio"] == DIT[case]["kwargs"].get("mlp_ratio", 4.0)


def test_the_model_is_the_chain_of_the_release(given) -> None:
    model = loaded(given, dit_weights("dit_learned"))
    assert type(model) is EpsModel
    assert isinstance(model.sde, DDPMChain)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(model.sde.betas, betas, rtol=1e-12, atol=0)
    assert model.label == StepLabel(1000)
    assert model.data_range is None
    assert model.variance == "learned_range"
    x, label, classes = dit_inputs("dit_learned")
    with torch.no_grad():
        prediction = model.predict(x, (label + 1) / 1000, class_labels=classes)
        output = model.network(x, label, classes)
    torch.testing.assert_close(prediction.eps, output[:, :4])
    torch.testing.assert_close(prediction.log_var_fraction, (output[:, 4:] + 1) / 2)
    fixed = loaded(given, dit_weights("dit_fixed"), "dit_fixed")
    assert fixed.variance == "fixed_large"


def test_guided_samples(given) -> None:
    model = loaded(given, dit_weights("dit_learned"))
    guided = ClassifierFreeGuidance(model, 4.0, null={"class_labels": 10})
    sampler = PCSampler(guided, Ancestral(variance="model"), steps=3)
    x = sampler((2, 4, 8, 12), class_labels=torch.tensor([3, 0]))
    assert x.shape == (2, 4, 8, 12)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_checkpoints_of_the_training_program(wrapper: str, tmp_path) -> None:
    """Its options are an argparse.Namespace, its optimizer's state is not read."""
    last, averages = (dit_weights("dit_learned", phase) for phase in (1.0, 2.0))
    content = {
        "model": {f"{wrapper}{name}": tensor for name, tensor in last.items()},
        "ema": {f"{wrapper}{name}": tensor for name, tensor in averages.items()},
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, vae="ema"),
    }
    torch.save(content, tmp_path / "0050000.pt")
    for ema, wanted in ((True, averages), (False, last)):
        model = load_dit(tmp_path / "0050000.pt", heads=4, ema=ema)
        got = model.network.state_dict()["blocks.1.feed_forward.linear_1.weight"]
        assert torch.equal(got, wanted["blocks.1.mlp.fc1.weight"])
    del content["ema"]
    torch.save(content, tmp_path / "0050000.pt")
    with pytest.raises(CheckpointError, match="expected a state dict under 'ema', got none"):
        load_dit(tmp_path / "0050000.pt", heads=4)
    load_dit(tmp_path / "0050000.pt", heads=4, ema=False)


def test_other_classes_in_a_checkpoint_are_refused(tmp_path) -> None:
    content = {"model": dit_weights("dit_learned"), "args": argparse.Action("-x", "x")}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"the global argparse\.Action"):
        load_dit(tmp_path / "x.pt", heads=4)


def test_heads_of_published_widths_are_known_and_others_asked_for(given) -> None:
    tensors = dit_weights("dit_learned")
    with pytest.raises(ValueError, match=r"heads: expected the number of heads of .* width 32"):
        load_dit(given(tensors))
    with pytest.raises(ValueError, match="heads: expected a divisor of the width, 32, got 5"):
        load_dit(given(tensors), heads=5)
    with pytest.raises(TypeError, match="heads: expected an integer"):
        load_dit(given(tensors), heads=4.0)
    with pytest.raises(TypeError, match="ema: expected True or False"):
        load_dit(given(tensors), ema=1)


def test_tables_of_positions_are_compared(given) -> None:
    tensors = dit_weights("dit_learned")
    drift = 1e-5 * torch.randn(tensors["pos_embed"].shape)  # as averaging leaves it
    assert loaded(given, tensors | {"pos_embed": tensors["pos_embed"] + drift})
    learned = tensors["pos_embed"].clone()
    learned[0, 3, 7] += 0.02
    transposed = tensors["pos_embed"].view(1, 4, 4, 32).transpose(1, 2).reshape(1, 16, 32)
    for table in (learned, transposed):
        with pytest.raises(CheckpointError, match="pos_embed: expected the sines and cosines"):
            loaded(given, tensors | {"pos_embed": table})
    with pytest.raises(CheckpointError, match=r"pos_embed: expected shape \(1, n\^2, 32\)"):
        loaded(given, tensors | {"pos_embed": tensors["pos_embed"][:, :15]})
    del tensors["pos_embed"]
    with pytest.raises(CheckpointError, match="missing pos_embed"):
        loaded(given, tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {n: v for n, v in t.items() if n != "final_layer.linear.weight"},
        lambda t: t | {"final_layer.linear.weight": torch.ones(17, 32)},
        lambda t: t | {"x_embedder.proj.weight": torch.ones(32, 4, 2)},
        lambda t: t | {"blocks.7.attn.qkv.bias": torch.ones(96)},
        lambda t: t | {"blocks.0.mlp.fc1.weight": torch.ones(0, 32)},
        lambda t: t | {"y_embedder.embedding_table.weight": torch.ones(11)},
        lambda t: t | {"epoch": 3},
        lambda t: {"state": 1},
        lambda t: list(t.values()),
    ],
)
def test_foreign_files_are_refused(given, change) -> None:
    with pytest.raises(CheckpointError, match=r"expected|missing|unexpected"):
        loaded(given, change(dit_weights("dit_learned")))


# What SiT returns at its times 0, .25 and 1: of noise, of a state between, and of data.
FLOW = DIT["dit_learned"]["flow"]


def test_sit_predicts_the_velocity_of_the_release_with_time_turned(given) -> None:
    model = load_sit(given(dit_weights("dit_learned")), heads=4)
    assert type(model) is VelocityModel
    assert (type(model.sde), model.label) == (FlowMatchingSDE, ReverseTimeLabel())
    assert not model.training
    x, _, classes = dit_inputs("dit_learned")
    t = torch.tensor([1.0, 0.75, 0.0])
    with torch.no_grad():
        prediction = model.predict(x, t, class_labels=classes)
    released = prediction.x0 - prediction.eps  # the release moves from the noise to the data
    assert_released(released, FLOW, tolerance=1e-5)
    assert model.network.config["learn_sigma"] is False


def test_a_step_of_sit_is_a_step_of_euler_in_the_release(given) -> None:
    """It goes from the noise, at its time 0, to .25: x + .25 u."""
    model = load_sit(given(dit_weights("dit_learned")), heads=4)
    x, _, classes = dit_inputs("dit_learned")
    one, label = x[:1], classes[:1]
    sampler = PCSampler(model, DDIM(), grid=torch.tensor([1.0, 0.75]), denoise=False)
    moved = sampler(one, class_labels=label)
    assert_released((moved - one) / 0.25, FLOW[:1], tolerance=1e-4)


def trained(**options: Any) -> dict[str, Any]:
    tensors = dit_weights("dit_learned")
    return {"model": tensors, "ema": tensors, "args": argparse.Namespace(**options)}


def test_checkpoints_of_sit_and_dit_are_told_apart(tmp_path) -> None:
    path = tmp_path / "x.pt"
    torch.save(trained(model="SiT-XL/2", path_type="Linear", prediction="velocity"), path)
    load_sit(path, heads=4)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of DiT, .* use load_sit"):
        load_dit(path, heads=4)
    torch.save(trained(model="DiT-XL/2"), path)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of SiT, .* use load_dit"):
        load_sit(path, heads=4)
    for path_type, prediction, match in [
        ("VP", "velocity", "path_type: expected 'Linear', got 'VP'"),
        ("Linear", "noise", "prediction: expected 'velocity', got 'noise'"),
        (torch.ones(2), "velocity", "path_type: expected 'Linear', got tensor"),
    ]:
        torch.save(trained(path_type=path_type, prediction=prediction), path)
        with pytest.raises(CheckpointError, match=match):
            load_sit(path, heads=4)


def test_sit_without_a_second_half(given) -> None:
    model = load_sit(given(dit_weights("dit_fixed")), heads=3)
    plain = load_dit(given(dit_weights("dit_fixed")), heads=3)
    inputs = dit_inputs("dit_fixed")
    with torch.no_grad():
        assert torch.equal(model.network(*inputs), -plain.network(*inputs))

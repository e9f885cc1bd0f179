"""Files of our own networks: the same network again, or an error that names the problem."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from diffusionkit import networks
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_network, save_network
from diffusionkit.networks import MLP, ADMUNet, DDPMpp, DDPMUNet, DiT, EDM2UNet, NCSNpp, NCSNv2

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1}
MAKES = {
    "MLP": lambda: MLP(6, width=8, depth=2, num_classes=3),
    "ADMUNet": lambda: ADMUNet(
        2, **SMALL, attention_levels=(1,), heads=2, num_classes=3, learn_sigma=False
    ),
    "DDPMUNet": lambda: DDPMUNet(2, **SMALL, num_classes=3, data_range=(0.0, 1.0)),
    "DDPMpp": lambda: DDPMpp(2, **SMALL, embedding=None),
    "DiT": lambda: DiT(
        2, width=16, depth=2, heads=2, num_classes=3, patch_size=(2, 4), positions="rotary"
    ),
    "EDM2UNet": lambda: EDM2UNet(2, **SMALL, attention_levels=(1,), head_channels=4, num_classes=3),
    "NCSNpp": lambda: NCSNpp(
        2, **SMALL, num_classes=3, progressive="output_skip", progressive_input="input_skip"
    ),
    "NCSNv2": lambda: NCSNv2(2, width=8, sigmas=(3.0, 2.0, 1.0), activation="relu"),
}


def outputs(network):
    dtype = next(network.parameters()).dtype
    x = torch.linspace(-1, 1, 2 * 6 if isinstance(network, MLP) else 2 * 2 * 64).to(dtype)
    x = x.view(2, 6) if isinstance(network, MLP) else x.view(2, 2, 8, 8)
    label = torch.tensor([0, 2]) if isinstance(network, NCSNv2) else torch.tensor([0.5, 2.0])
    classes = network.config.get("num_classes")
    cond = {"class_labels": torch.tensor([2, 0])} if classes else {}
    with torch.no_grad():
        return network.eval()(x, label, **cond)


def randomized(name, dtype=torch.float32):
    torch.manual_seed(0)
    network = MAKES[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.to(dtype)


def test_every_network_class_is_tested() -> None:
    wrappers = {"FourierFeatures", "PositionChannels"}
    assert set(MAKES) == set(networks.__all__) - wrappers


@pytest.mark.parametrize(
    ("ending", "dtype"), [("pt", torch.float32), ("safetensors", torch.float64)], ids=str
)
@pytest.mark.parametrize("name", MAKES)
def test_loaded_network_equals_the_saved_one(tmp_path, name, ending, dtype) -> None:
    network, path = randomized(name, dtype), tmp_path / f"network.{ending}"
    save_network(path, network)
    back = load_network(str(path))
    assert type(back) is type(network)
    assert back.training
    assert json.dumps(back.config) == json.dumps(network.config)
    assert list(back.state_dict()) == list(network.state_dict())
    for key, value in network.state_dict().items():
        assert back.state_dict()[key].dtype == value.dtype
    assert torch.equal(outputs(back), outputs(network))
    assert os.listdir(tmp_path) == [path.name]
    # The loaded network can be saved again.
    save_network(path, back)
    assert torch.equal(outputs(load_network(path)), outputs(network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_half_precision_is_kept(tmp_path, ending, dtype) -> None:
    network = randomized("NCSNpp", dtype)
    save_network(tmp_path / f"half.{ending}", network)
    back = load_network(tmp_path / f"half.{ending}")
    for key, value in network.state_dict().items():
        assert back.state_dict()[key].dtype == value.dtype
        assert torch.equal(back.state_dict()[key], value)
    assert back.input.weight.dtype == dtype
    assert back.embedding.noise_features.frequencies.dtype == torch.float32


def test_channels_last_weights_are_saved(tmp_path) -> None:
    network = randomized("NCSNpp").to(memory_format=torch.channels_last)
    for ending in ("pt", "safetensors"):
        save_network(tmp_path / f"last.{ending}", network)
        back = load_network(tmp_path / f"last.{ending}")
        torch.testing.assert_close(outputs(back), outputs(network), rtol=1e-4, atol=1e-4)


class Mine(MLP):
    """A subclass of the same name, which cannot be rebuilt."""


Mine.__name__ = "MLP"


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(MLP(2, width=4)), r"torch\.nn\.\S*Sequential"),
        (Mine(2, width=4), r"\S*test_own\.MLP"),
        ({"weight": torch.ones(1)}, r"builtins\.dict"),
    ],
    ids=["sequential", "subclass", "dict"],
)
def test_foreign_modules_are_not_saved(tmp_path, network, name) -> None:
    match = rf"network: expected one of MLP, ADMUNet.*, got {name}$"
    with pytest.raises(TypeError, match=match):
        save_network(tmp_path / "network.pt", network)
    assert not os.listdir(tmp_path)


def test_arguments_other_than_plain_values_are_rejected(tmp_path) -> None:
    network = NCSNpp(2, **SMALL, dropout=np.float32(0.25))
    with pytest.raises(ValueError, match="expected a configuration of plain values, got"):
        save_network(tmp_path / "network.pt", network)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, ending) -> None:
    path, old = tmp_path / f"network.{ending}", MLP(2, width=4)
    save_network(path, old)

    def full(*_) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_network(path, MLP(3, width=8))
    assert os.listdir(tmp_path) == [path.name]
    assert load_network(path).config["features"] == 2


@pytest.fixture
def content(tmp_path):
    save_network(tmp_path / "network.pt", MLP(2, width=4))
    return torch.load(tmp_path / "network.pt", weights_only=True)


def rejected(tmp_path, content, match) -> None:
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match=rf"(?s)changed\.pt: .*{match}"):
        load_network(tmp_path / "changed.pt")


def config_of(**changes):
    return json.dumps(MLP(2, width=4).config | changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "written by save_network, got another kind of file"),
        ({"version": "2"}, "expected version 1, got '2'"),
        ({"version": 1}, "expected version 1, got 1"),
        ({"network": "UNet"}, "expected one of MLP, ADMUNet, .*got 'UNet'"),
        ({"network": ["MLP"]}, "expected one of MLP, ADMUNet, .*got"),
        ({"network": "nn"}, "expected one of MLP, ADMUNet, .*got 'nn'"),
        ({"network": "NCSNpp"}, "expected a configuration of NCSNpp, got"),
        ({"config": "{"}, "expected a configuration of MLP, got"),
        ({"config": "[" * 100000}, "expected a configuration of MLP, got"),
        ({"config": None}, "expected a configuration of MLP, got"),
        ({"config": "[1, 2]"}, "expected a configuration of MLP, got"),
        ({"config": "{}"}, "expected a configuration of MLP, got.*features"),
        ({"config": config_of(more=1)}, "expected a configuration of MLP, got.*more"),
        ({"config": config_of(width="4")}, "expected a configuration of MLP, got.*width"),
        ({"config": config_of(width=-4)}, "expected a configuration of MLP, got.*width"),
        ({"config": config_of(width=6)}, r"the network does not fit.*expected shape \(6, 2\)"),
        ({"config": config_of(depth=1)}, "the network does not fit.*unexpected"),
        ({"config": config_of(width=10**5)}, "the network does not fit"),
        ({"config": config_of(width=10**30)}, "expected a configuration of MLP, got"),
        ({"state": {}}, "the network does not fit.*missing"),
        ({"state": {1: torch.ones(1)}}, "the network does not fit, 35 problems"),
        ({"state": [torch.ones(1)]}, "expected a network written by save_network"),
    ],
)
def test_error_names_the_problem_in_the_file(tmp_path, content, change, match) -> None:
    rejected(tmp_path, content | change, match)


def test_error_names_the_problem_in_the_weights(tmp_path, content) -> None:
    name = next(iter(content["state"]))
    for wrong, match in [
        (1.0, rf"{name}: expected shape \(4, 32\), got float"),
        (torch.ones(1), rf"{name}: expected shape \(4, 32\), got \(1,\)"),
    ]:
        state = content["state"] | {name: wrong}
        rejected(tmp_path, content | {"state": state}, match)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        state = {key: value.to(dtype) for key, value in content["state"].items()}
        rejected(tmp_path, content | {"state": state}, "expected floating-point numbers, got")


@pytest.mark.parametrize("missing", ["format", "version", "network", "config", "state"])
def test_missing_parts_are_rejected(tmp_path, content, missing) -> None:
    del content[missing]
    rejected(tmp_path, content, "expected")


@pytest.mark.parametrize("foreign", [{"model": {}}, [1], torch.ones(2), {}], ids=str)
def test_foreign_files_are_rejected(tmp_path, foreign) -> None:
    rejected(tmp_path, foreign, "written by save_network, got another kind of file")


def test_foreign_safetensors_are_rejected(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="written by save_network, got another kind of file"):
        load_network(path)
    # A file of torch with the ending of another format.
    save_network(tmp_path / "network.pt", MLP(2, width=4))
    os.replace(tmp_path / "network.pt", path)
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load_network(path)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "none.pt")


def test_error_without_safetensors_names_the_operation(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "network.safetensors"
    with pytest.raises(ImportError, match=r"writing safetensors files needs.*pip install"):
        save_network(path, MLP(2, width=4))
    assert not os.listdir(tmp_path)
    path.write_bytes(b"\0" * 8 + b"{}")
    with pytest.raises(ImportError, match=r"reading safetensors files needs.*pip install"):
        load_network(path)

"""Parts of users in files of models: registered by name, or refused with the line to write."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffusionkit import (
    VPSDE,
    EpsModel,
    ForwardSDE,
    NetworkModel,
    ScoreModel,
    _parts,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints import load_model, register_part, save_model
from diffusionkit.networks import MLP


@pytest.fixture(autouse=True)
def _no_names_are_left(monkeypatch):
    monkeypatch.setattr(_parts, "_REGISTERED", {})


@dataclass(frozen=True)
class Cosine(ForwardSDE):
    """A process."""

    speed: float = 1.0
    T = 0.9

    def marginal(self, t):
        angle = self.speed * t
        return torch.cos(angle), torch.sin(angle)


class Half(NetworkModel):
    """A parameterization."""

    def __init__(self, network, sde, share=0.5, **options):
        super().__init__(network, sde, **options)
        self.share = share

    def parameterization(self, alpha, sigma):
        return self.share, 1 - self.share


class Net(nn.Module):
    """A network with a buffer, an integer, tied weights and an infinite mask."""

    def __init__(self, features, sizes=(3, 4), activation=torch.tanh, options=None):
        super().__init__()
        self.features, self.sizes, self.activation = features, sizes, activation
        self.options = options
        self.first = nn.Linear(features + 1, sizes[0])
        self.second = nn.Linear(sizes[0], features)
        self.norm = nn.BatchNorm1d(sizes[0])
        self.twin = self.second
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x, noise_label):
        h = self.activation(self.first(torch.cat([x, noise_label[:, None]], 1)))
        return self.twin(self.norm(h))


class Wrapped(ScoreModel):
    """A model of a model, with weights of its own."""

    def __init__(self, model, gains):
        super().__init__()
        self.model, self.gains, self.sde = model, gains, model.sde
        self.weight = nn.Parameter(torch.ones(2))

    def predict(self, x, t, **cond):
        return self.model.predict(x * self.weight * self.gains[0]["a"], t, **cond)


def log_label(sde, t):
    return 0.25 * torch.log(sde.marginal(t)[1])


def registered() -> None:
    for part in (Cosine, Half, Wrapped, log_label):
        assert register_part(part) is part
    assert register_part(name="tests/Net.v1")(Net) is Net
    register_part(torch.tanh, name="tanh")


def complicated() -> Wrapped:
    torch.manual_seed(0)
    net = Net(2, [5, 1], options={"a": (1, [2.5, None]), "b": {"c": True}, "d": math.inf})
    half = Half(net, Cosine(1.25), 0.25, label=log_label)
    half.train()
    half.predict(torch.randn(8, 2), torch.rand(8) * 0.9)  # statistics of the normalization
    return Wrapped(half, [{"a": 0.5}]).eval()


def test_everything_of_a_user_comes_back(tmp_path) -> None:
    registered()
    model = complicated()
    save_model(tmp_path / "m", model)
    back = load_model(tmp_path / "m")
    net = back.model.network
    assert (net.sizes, net.options) == ([5, 1], model.model.network.options)
    assert net.twin is net.second
    assert net.activation is torch.tanh
    assert back.gains == [{"a": 0.5}]
    assert back.sde is back.model.sde
    assert back.sde == Cosine(1.25)
    assert back.model.label is log_label
    assert net.norm.num_batches_tracked == 1
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    x, t = torch.randn(3, 2), torch.rand(3) * 0.9
    assert torch.equal(back.predict(x, t).x0, model.predict(x, t).x0)
    text = (tmp_path / "m" / "model.json").read_text()
    assert '"class": "tests/Net.v1"' in text
    assert '"function": "log_label"' in text


def test_half_precision_and_ties_of_a_user_are_kept(tmp_path) -> None:
    registered()
    model = EpsModel(Net(2).half(), VPSDE(), label=log_label)
    model.network.norm.float()
    save_model(tmp_path / "m.safetensors", model)
    back = load_model(tmp_path / "m.safetensors")
    assert {n: x.dtype for n, x in back.state_dict().items()} == {
        n: x.dtype for n, x in model.state_dict().items()
    }
    assert back.network.twin.weight is back.network.second.weight


def test_random_states_are_left_alone(tmp_path) -> None:
    registered()
    model = EpsModel(Net(2), VPSDE())  # a constructor that draws weights
    state = torch.get_rng_state()
    save_model(tmp_path / "m", model)
    load_model(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: EpsModel(MLP(2, width=4), Cosine()), r"model\.sde"),
        (lambda: Half(MLP(2, width=4), VPSDE()), "model"),
        (lambda: EpsModel(Net(2), VPSDE()), r"model\.network"),
        (lambda: EpsModel(MLP(2, width=4), VPSDE(), label=log_label), r"model\.label"),
        (lambda: EpsModel(lambda x, noise_label: x, VPSDE()), r"model\.network"),
    ],
)
def test_what_is_not_registered_is_refused_with_the_line_to_write(tmp_path, make, place) -> None:
    text = (
        rf"{place}: expected a (class of diffusionkit or a registered one|registered function), "
        r"got .*test_register_part.*; if it is your own, decorate it with @register_part \(from "
        r"diffusionkit\.checkpoints import register_part\)"
    )
    with pytest.raises(TypeError, match=text):
        save_model(tmp_path / "m", make())
    assert not list(tmp_path.iterdir())


def test_a_class_that_is_not_registered_when_reading(tmp_path, monkeypatch) -> None:
    registered()
    save_model(tmp_path / "m", EpsModel(MLP(2, width=4), Cosine()))
    monkeypatch.setattr(_parts, "_REGISTERED", {})
    text = "sde: expected a class of diffusionkit or a registered one, got 'Cosine'; if it is your"
    with pytest.raises(CheckpointError, match=text):
        load_model(tmp_path / "m")


class Lossy(nn.Module):
    """A network that does not keep its argument."""

    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x, noise_label):
        return self.linear(x)


class Doubling(Lossy):
    """A network that keeps another value."""

    def __init__(self, features, scale=1.0):
        super().__init__(features)
        self.features, self.scale = features, 2 * scale


class Renaming(Wrapped):
    """A wrapper whose model is a submodule of another name."""

    def __init__(self, inner):
        super().__init__(inner, [{"a": 1.0}])

    @property
    def inner(self):
        return self.model


class Failing(Doubling):
    """A network that cannot be built from what it keeps."""

    def __init__(self, features, scale=1.0):
        if scale == 2.0:
            raise KeyError("nothing")
        super().__init__(features, scale)


@dataclass
class Holder:
    """A label that holds a module, whose weights no state dict has."""

    module: nn.Module

    def __call__(self, sde, t):
        return self.module(t[:, None])[:, 0]


def test_parts_that_would_not_come_back_are_refused(tmp_path) -> None:
    for part in (Lossy, Doubling, Renaming, Failing, Holder):
        register_part(part)
    register_part(nn.Linear)
    for make, text in {
        lambda: EpsModel(Lossy(2), VPSDE()): (
            "model.network: expected attributes named as the constructor's arguments, got Lossy "
            "without 'features'"
        ),
        lambda: EpsModel(Doubling(2), VPSDE()): (
            "model.network.scale: expected an attribute with the argument of the constructor, got "
            "another value"
        ),
        lambda: EpsModel(Failing(2), VPSDE()): (
            "model: expected parts that can be built again from their arguments, got .*network: "
            "expected arguments of Failing, got 'nothing'"
        ),
        lambda: Renaming(EpsModel(MLP(2, width=4), VPSDE())): (
            "model.inner: expected a module that is a submodule of that name"
        ),
        lambda: EpsModel(MLP(2, width=4), VPSDE(), label=Holder(nn.Linear(1, 1, bias=True))): (
            "model.label.module: expected "
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=re.sub(r"(?<!\.)\*", ".*", text)):
            save_model(tmp_path / "m", make())
        assert not list(tmp_path.iterdir())


def test_values_that_no_file_holds_are_refused(tmp_path) -> None:
    registered()
    for value in (object(), {1: 2}, {1, 2}, torch.float32, nn.Linear, lambda: None):
        model = EpsModel(Net(2, options=value), VPSDE())
        with pytest.raises(TypeError, match=r"model\.network\.options: expected a"):
            save_model(tmp_path / "m", model)


def test_names() -> None:
    register_part(Cosine)
    register_part(Cosine)  # again, as in a notebook
    again = type("Cosine", (ForwardSDE,), {"__module__": Cosine.__module__})
    assert register_part(again) is again
    with pytest.raises(ValueError, match=r"name: expected one that is not taken, got 'Cosine', th"):
        register_part(Half, name="Cosine")
    with pytest.raises(ValueError, match=r"name: expected a name such as my_label, got '<lambda>'"):
        register_part(lambda sde, t: t)
    for bad in (Cosine(), 3, "Cosine"):
        with pytest.raises(TypeError, match="part: expected a class or a function, got"):
            register_part(bad)
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        register_part(Cosine, name=3)


def test_a_name_of_the_library_is_not_taken_over(tmp_path) -> None:
    other = register_part(type("MLP", (Lossy,), {"features": 2}))
    with pytest.raises(TypeError, match=r"model\.network: .* with a name of its own, got .*'MLP'"):
        save_model(tmp_path / "m", EpsModel(other(2), VPSDE()))
    register_part(other, name="mine/MLP")
    assert _parts.name_of(other) in ("MLP", "mine/MLP")


def test_training_checkpoints_do_not_need_names(tmp_path) -> None:
    model = complicated()
    save_checkpoint(tmp_path / "run.pt", model)
    load_checkpoint(tmp_path / "run.pt", model)
    registered()
    save_checkpoint(tmp_path / "run.pt", model)
    back = load_model(tmp_path / "run.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name

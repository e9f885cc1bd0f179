"""A checkpoint of another process, parameterization, noise label or network is refused by name."""

import copy
import re
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import pytest
import torch
from support.older_checkpoints import as_version
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    CheckpointError,
    DDPMChain,
    EDMModel,
    EpsModel,
    ForwardSDE,
    IndexLabel,
    LearnedSDE,
    LogSigmaLabel,
    LogSNRSDE,
    RawScoreModel,
    ReverseTimeLabel,
    ScaledScoreModel,
    ScoreModel,
    SigmaLabel,
    StepLabel,
    SubVPSDE,
    TimeLabel,
    VModel,
    X0Model,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit.models.network import NetworkModel
from diffusionkit.networks import MLP, FourierFeatures, NCSNpp
from diffusionkit.training._model_description import described, difference
from diffusionkit.values import Prediction


class Cosine(ForwardSDE):
    """A process of a user, with a private setting."""

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed

    def marginal(self, t):
        return torch.cos(0.9 * self._speed * t), torch.sin(0.9 * self._speed * t)


class Mixed(NetworkModel):
    """A parameterization of a user."""

    def __init__(self, network, sde, share: float = 0.5) -> None:
        super().__init__(network, sde)
        self.share = share

    def parameterization(self, alpha, sigma):
        return self.share, 1 - self.share


class Own(ScoreModel):
    """A score model that is not made of a network with a parameterization."""

    def __init__(self, sde, gain: float = 1.0) -> None:
        super().__init__()
        self.sde, self.gain, self.calls = sde, gain, 0
        self.w = nn.Parameter(torch.ones(2))

    def predict(self, x, t, **cond):
        alpha, sigma = self.sde.marginal(t)
        return Prediction.from_eps(x, self.w * x, alpha, sigma)


def network() -> MLP:
    return MLP(2, width=4)


SDES = {
    "VPSDE": VPSDE(),
    "VPSDE with another beta": VPSDE(beta_max=12.0),
    "SubVPSDE": SubVPSDE(),
    "VESDE": VESDE(),
    "VESDE with another sigma": VESDE(sigma_max=20.0),
    "EDMSDE": EDMSDE(),
    "chain": DDPMChain.linear(1000),
    "cosine chain": DDPMChain.cosine(1000),
    "short chain": DDPMChain.linear(100),
    "zero-SNR chain": DDPMChain.linear(1000).zero_terminal_snr(),
    "LogSNRSDE": LogSNRSDE(),
    "LogSNRSDE with another end": LogSNRSDE(gamma_max=4.0),
    "Cosine": Cosine(),
    "Cosine with another speed": Cosine(0.9),
}
PARAMETERIZATIONS = {
    "EpsModel": lambda n, s: EpsModel(n, s, label=TimeLabel()),
    "X0Model": lambda n, s: X0Model(n, s, label=TimeLabel()),
    "VModel": lambda n, s: VModel(n, s, label=TimeLabel()),
    "RawScoreModel": lambda n, s: RawScoreModel(n, s, label=TimeLabel()),
    "ScaledScoreModel": lambda n, s: ScaledScoreModel(n, s, label=TimeLabel()),
    "EDMModel": lambda n, s: EDMModel(n, s, label=TimeLabel()),
    "EDMModel with another sd": lambda n, s: EDMModel(n, s, 0.7, label=TimeLabel()),
    "Mixed": Mixed,
    "Mixed with another share": lambda n, s: Mixed(n, s, 0.25),
}
LABELS = {
    "ReverseTimeLabel": ReverseTimeLabel(),
    "TimeLabel": TimeLabel(),
    "TimeLabel with another scale": TimeLabel(1000.0),
    "SigmaLabel": SigmaLabel(),
    "LogSigmaLabel": LogSigmaLabel(),
    "StepLabel": StepLabel(1000),
    "IndexLabel": IndexLabel([50.0, 1.0, 0.01]),
    "function": lambda sde, t: t,
    "another function": lambda sde, t: 2 * t,
}
NETWORKS = {
    "MLP": lambda: MLP(2, width=4),
    "MLP with another label scale": lambda: MLP(2, width=4, activation="relu"),
    "FourierFeatures": lambda: FourierFeatures(MLP(10, out_features=2, width=4)),
    "FourierFeatures with others": lambda: FourierFeatures(
        MLP(10, out_features=2, width=4), exponents=(4, 5)
    ),
}


def models(kind: str) -> dict[str, ScoreModel]:
    if kind == "sde":
        return {n: EpsModel(network(), s, label=TimeLabel()) for n, s in SDES.items()}
    if kind == "parameterization":
        return {n: make(network(), VPSDE()) for n, make in PARAMETERIZATIONS.items()}
    if kind == "label":
        return {n: EpsModel(network(), VPSDE(), label=label) for n, label in LABELS.items()}
    return {n: EpsModel(make(), VPSDE()) for n, make in NETWORKS.items()}


def loads(path, model) -> str:
    """Load a checkpoint, and return the text of the error, empty if there is none."""
    before = copy.deepcopy(model.state_dict())
    try:
        load_checkpoint(path, model, restore_random=False)
    except CheckpointError as error:
        text = str(error).removeprefix(f"{path}: ")
    else:
        return ""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return text


@pytest.mark.parametrize("kind", ["sde", "parameterization", "label"])
def test_every_pair_of_different_models_is_told_apart(kind) -> None:
    found = {name: described(model) for name, model in models(kind).items()}
    for name, model in models(kind).items():
        assert difference(described(model), found[name]) is None
    for name, other in permutations(found, 2):
        text = str(difference(found[other], found[name]))
        assert re.match(rf"{kind}: expected .+, got .+", text), (name, other, text)


def test_the_error_names_both(tmp_path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, EpsModel(network(), SubVPSDE()))
    assert loads(path, EpsModel(network(), VPSDE())) == f"sde: expected {VPSDE()}, got {SubVPSDE()}"
    save_checkpoint(path, EpsModel(network(), Cosine(0.5)))
    text = "sde: expected Cosine(), got Cosine() with other values"
    assert loads(path, EpsModel(network(), Cosine())) == text
    save_checkpoint(path, EDMModel(network(), EDMSDE(), 0.25))
    text = "parameterization: expected EDMModel(sigma_data=0.5), got EDMModel(sigma_data=0.25)"
    assert loads(path, EDMModel(network(), EDMSDE())) == text
    save_checkpoint(path, EpsModel(network(), VPSDE(), variance="fixed_large"))
    text = "variance: expected fixed_small, got fixed_large"
    assert loads(path, EpsModel(network(), VPSDE(), variance="fixed_small")) == text
    save_checkpoint(path, EpsModel(network(), VPSDE(), data_range=(0.0, 1.0)))
    text = "data_range: expected (-1.0, 1.0), got (0.0, 1.0)"
    assert loads(path, EpsModel(network(), VPSDE(), data_range=(-1.0, 1.0))) == text
    assert loads(path, EpsModel(network(), VPSDE())) == ""
    save_checkpoint(path, Own(VPSDE(), 2.0))
    text = "parameterization: expected Own(gain=1.0), got Own(gain=2.0)"
    assert loads(path, Own(VPSDE())) == text
    own = Own(VPSDE(), 2.0)
    own.calls = 7  # not a setting
    assert loads(path, own) == ""


def test_networks_are_compared_by_class_and_settings(tmp_path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, EpsModel(NETWORKS["FourierFeatures"](), VPSDE()))
    text = loads(path, EpsModel(NETWORKS["FourierFeatures with others"](), VPSDE()))
    assert re.match(r"network: expected FourierFeatures\(.*4, 5.*got FourierFeatures\(.*6, 7", text)

    class Linear(nn.Linear):
        """A network of a user."""

    save_checkpoint(path, EpsModel(nn.Linear(2, 2), VPSDE()))
    assert loads(path, EpsModel(nn.Linear(2, 2), VPSDE())) == ""
    assert loads(path, nn.Linear(2, 2)).startswith("the model does not fit")

    class Other(nn.Module):
        """Another one, whose tensors have the same names and shapes."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    assert loads(path, EpsModel(Other(), VPSDE())).startswith("network: expected Other(), got Lin")
    # Dropout and the like may change between runs.
    make = partial(NCSNpp, 1, width=4, multipliers=(1,), blocks=1, scale_by_sigma=False)
    save_checkpoint(path, EpsModel(make(dropout=0.1), VPSDE()))
    assert loads(path, EpsModel(make(activation_checkpointing=True), VPSDE())) == ""
    text = loads(path, EpsModel(make(data_range=(0.0, 1.0)), VPSDE()))
    assert text.startswith("network: expected NCSNpp(")


@dataclass
class Renamed(ForwardSDE):
    """VPSDE by another name: the same process."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def marginal(self, t):
        return VPSDE(self.beta_min, self.beta_max).marginal(t)


def test_equal_parts_of_other_names_are_accepted(tmp_path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, EpsModel(network(), VPSDE()))
    assert loads(path, EpsModel(network(), Renamed())) == ""
    assert loads(path, EpsModel(network(), VPSDE(), label=lambda sde, t: 999 * t)) == ""
    assert loads(path, Mixed(network(), VPSDE(), 0.0)) == ""
    text = loads(path, EpsModel(network(), Renamed(beta_max=19.0)))
    assert text.startswith("sde: expected Renamed(beta_min=0.1, beta_max=19.0), got VPSDE(")


@pytest.mark.parametrize("learn_ends", [False, True])
def test_a_learned_process_is_compared_with_the_weights_of_the_file(tmp_path, learn_ends) -> None:
    make = lambda **options: EpsModel(  # noqa: E731
        network(), LearnedSDE(hidden=4, learn_ends=learn_ends, **options), label=LogSigmaLabel()
    )
    model, path = make(), tmp_path / "run.pt"
    with torch.no_grad():
        for p in model.sde.parameters():
            p.add_(0.3 * torch.rand_like(p))
    save_checkpoint(path, model)
    fresh = make()
    assert loads(path, fresh) == ""
    assert torch.equal(fresh.sde.centers, model.sde.centers)
    text = loads(path, make(gamma_max=3.0))
    assert text == "" if learn_ends else text.startswith("sde: expected LearnedSDE(")


def test_parts_that_cannot_be_evaluated_are_compared_by_settings(tmp_path) -> None:
    class Failing(ForwardSDE):
        """A process that no other code can evaluate."""

        def __init__(self, speed: float) -> None:
            self.speed = speed

        def marginal(self, t):
            raise NotImplementedError

    path = tmp_path / "run.pt"
    save_checkpoint(path, EpsModel(network(), Failing(1.0)))
    assert loads(path, EpsModel(network(), Failing(1.0))) == ""
    text = "sde: expected Failing(speed=2.0), got Failing(speed=1.0)"
    assert loads(path, EpsModel(network(), Failing(2.0))) == text


def test_files_of_version_1_load_with_a_warning(tmp_path, caplog) -> None:
    path, model = tmp_path / "run.pt", EpsModel(network(), VPSDE())
    save_checkpoint(path, model, optimizer=torch.optim.Adam(model.parameters()))
    torch.save(as_version(1, torch.load(path, weights_only=True)), path)
    other = VModel(network(), VPSDE())
    load_checkpoint(path, other, optimizer=torch.optim.Adam(other.parameters()))
    assert "version 1 does not describe its process" in caplog.text
    assert torch.equal(next(other.parameters()), next(model.parameters()))


# The description of EpsModel(FourierFeatures(MLP(...)), DDPMChain) in a file of version 3.
EARLIER = {
    "sde": {
        "name": "DDPMChain(25 steps, betas 0.004 ... 0.8)",
        "class": "DDPMChain",
        "settings": {},
        "values": None,
    },
    "parameterization": {"name": "EpsModel()", "class": "EpsModel", "settings": {}, "values": None},
    "label": {
        "name": "TimeLabel(scale=999.0)",
        "class": "TimeLabel",
        "settings": {"scale": 999.0},
        "values": None,
    },
    "network": {
        "name": "FourierFeatures(exponents=[6, 7])",
        "class": "FourierFeatures",
        "settings": {"exponents": [6, 7]},
        "values": None,
    },
    "data_range": {"name": "(-1.0, 1.0)", "values": None},
}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda n: EpsModel(n(), DDPMChain.linear(25), data_range=(-1.0, 1.0)), ""),
        (lambda n: EpsModel(n(), VPSDE()), "sde: expected VPSDE(beta_min=0.1, beta_max=20.0, t_m"),
        (lambda n: VModel(n(), DDPMChain.linear(25)), "parameterization: expected VModel(), got E"),
        (
            lambda n: EpsModel(n(), DDPMChain.linear(25), label=TimeLabel(9.0)),
            "label: expected TimeLabel(scale=9.0), got TimeLabel(scale=999.0)",
        ),
        (
            lambda n: EpsModel(n((5, 6)), DDPMChain.linear(25)),
            "network: expected FourierFeatures(network=MLP(features=10, out_features=2, width=4,",
        ),
        (
            lambda n: EpsModel(n(), DDPMChain.linear(25), data_range=(0.0, 1.0)),
            "data_range: expected (0.0, 1.0), got (-1.0, 1.0)",
        ),
    ],
)
def test_files_of_version_3_are_compared_too(tmp_path, make, text) -> None:
    def features(exponents=(6, 7)):
        return FourierFeatures(MLP(10, out_features=2, width=4), exponents=exponents)

    path = tmp_path / "run.pt"
    save_checkpoint(path, EpsModel(features(), DDPMChain.linear(25), data_range=(-1.0, 1.0)))
    content = as_version(3, torch.load(path, weights_only=True))
    values = {n: part["values"] for n, part in content["about"].items() if n != "data_range"}
    about = {n: part | {"values": values.get(n)} for n, part in EARLIER.items()}
    torch.save(content | {"about": about}, path)
    assert loads(path, make(features)).startswith(text)
    assert (text == "") == (loads(path, make(features)) == "")


def test_networks_inside_networks_are_compared(tmp_path) -> None:
    path = tmp_path / "run.pt"
    make = lambda scale: FourierFeatures(  # noqa: E731
        NCSNpp(5, out_channels=1, width=4, multipliers=(1,), blocks=1, attention_levels=(),
               data_range=(0.0, scale)), exponents=(1, 2),
    )  # fmt: skip
    save_checkpoint(path, EpsModel(make(1.0), VPSDE()))
    assert loads(path, EpsModel(make(1.0), VPSDE())) == ""
    text = r"network: expected FourierFeatures\(network=NCSNpp\(.*got FourierFeatures\(network=NCSN"
    assert re.match(text, loads(path, EpsModel(make(2.0), VPSDE())))

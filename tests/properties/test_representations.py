"""`repr` of every public class names its parts, is short, and shows no addresses and no weights."""

import functools
import inspect
import re

import pytest
import torch
from support.bad_arguments import call, callables, names
from torch import nn

from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    VPSDE,
    ClassifierFreeGuidance,
    EDMModel,
    EpsModel,
    GaussianMixtureModel,
    HalfLife,
    KarrasGrid,
    Langevin,
    PCSampler,
    PowerEMA,
    ProbabilityFlow,
    ReverseDiffusion,
)
from diffusionkit._repr import shown
from diffusionkit.interfaces import Prediction, ScoreModel
from diffusionkit.networks import MLP, DDPMpp

LINES, WIDTH = 40, 200
# torch prints the layers of networks, which is what one prints them for.
NETWORKS = {
    *("ADMUNet", "DDPMUNet", "DDPMpp", "DiT", "EDM2UNet", "FourierFeatures", "MLP", "NCSNpp"),
    "NCSNv2",
}
CLASSES = sorted(name for name in set(names()) - NETWORKS if inspect.isclass(callables().get(name)))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_short_and_has_no_addresses(name) -> None:
    text = repr(call(name, {}))
    assert " at 0x" not in text
    assert " object" not in text
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_names_itself_and_what_it_was_made_with(name) -> None:
    part = call(name, {})
    text = repr(part)
    assert text.startswith(type(part).__name__ + "(")
    required = [
        p.name
        for p in inspect.signature(type(part)).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    for parameter in required:
        value = getattr(part, parameter, None)
        if isinstance(value, nn.Module):
            assert type(value).__name__ in text


def model(**options):
    network = DDPMpp(channels=1, width=8, multipliers=(1, 2), blocks=1)
    return EpsModel(network, VPSDE(), **options)


MODEL = """\
EpsModel(
    DDPMpp(channels=1, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,)),
    VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05),
    label=TimeLabel(scale=999.0),
    data_range=(-1.0, 1.0),
)"""


def indented(text):
    return text.replace("\n", "\n    ")


def test_a_model_shows_network_process_label_and_range() -> None:
    assert repr(model(data_range=(-1.0, 1.0))) == MODEL


def test_a_model_shows_its_other_settings() -> None:
    text = repr(EDMModel(MLP(2, width=4), EDMSDE(), 0.7, variance="fixed_large"))
    assert "MLP(features=2, width=4)" in text
    assert "sigma_data=0.7" in text
    assert "variance='fixed_large'" in text


def test_a_sampler_shows_its_parts() -> None:
    sampler = PCSampler(
        model(data_range=(-1.0, 1.0)), ReverseDiffusion(), Langevin(snr=0.2), grid=KarrasGrid()
    )
    assert repr(sampler) == (
        f"PCSampler(\n    {indented(MODEL)},\n    ReverseDiffusion(),\n"
        "    Langevin(snr=0.2, steps=1, norm='sample'),\n    steps=1000,\n"
        "    grid=KarrasGrid(t_end=None, to_zero=False, rho=7.0),\n)"
    )


def test_a_flow_shows_its_solver() -> None:
    assert "method='rk4',\n    rtol=0.1,\n" in repr(ProbabilityFlow(model(), "rk4", 0.1))


def test_a_wrapper_shows_the_model_inside() -> None:
    guided = ClassifierFreeGuidance(model(data_range=(-1.0, 1.0)), 3.0, null={"class_labels": 9})
    inner = indented(MODEL)
    wanted = (
        f"ClassifierFreeGuidance(\n    {inner},\n    scale=3.0,\n    null={{'class_labels': 9}},\n)"
    )
    assert repr(guided) == wanted


def test_averages_show_what_is_averaged_how_long_and_how_often() -> None:
    network = MLP(2, width=4)
    average = EMA(network, 0.99)
    average.update(network)
    average.update(network)
    assert repr(average) == "EMA(MLP(features=2, width=4), decay=0.99, updates=2)"
    assert "HalfLife(images=100, batch_size=4" in repr(EMA(network, HalfLife(100, 4)))
    several = PowerEMA(network, (0.05, 0.2))
    assert repr(several) == "PowerEMA(MLP(features=2, width=4), sigma_rels=(0.05, 0.2), updates=0)"


def test_exact_models_show_few_numbers_and_the_shape_of_many() -> None:
    few = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.5, 0.5])
    assert "means=[[-2], [2]],\n    stds=[0.5, 0.5],\n" in repr(few)
    many = GaussianMixtureModel(VPSDE(), means=torch.zeros(20, 3), stds=[0.5] * 20)
    assert "means=tensor(shape=(20, 3))" in repr(many)


def test_weights_and_functions_are_not_shown() -> None:
    assert shown(nn.Sequential(nn.Linear(2, 2))) == "Sequential(...)"
    assert shown(nn.Linear(2, 2)) == "Linear(in_features=2, out_features=2, bias=True)"
    assert shown(nn.Parameter(torch.ones(30, 30))) == "tensor(shape=(30, 30))"
    assert shown(lambda x: x) == "lambda"
    assert shown(functools.partial(indented, text="x")) == "partial(indented, ...)"
    assert shown(object()) == "object(...)"
    assert shown(torch.Generator()) == "Generator(...)"
    assert shown({"a": [1, (2.5,)]}) == "{'a': [1, (2.5,)]}"
    assert shown(list(range(100))) == "[0, 1, 2, 3, ...]"
    assert shown(nn.parallel.DataParallel(MLP(2, width=4))) == (
        "DataParallel(MLP(features=2, width=4))"
    )


class Own(ScoreModel):
    """A user's model, whose network is no argument."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.sde, self.scale = VPSDE(), scale
        self.inner = MLP(2, width=4)

    def extra_repr(self) -> str:
        return "note=1"

    def predict(self, x, t, **cond) -> Prediction:
        alpha, sigma = self.sde.perturbation_kernel(x, t)
        return Prediction.from_eps(x, self.inner(x, t), alpha, sigma)


def test_a_users_model_shows_arguments_modules_and_notes() -> None:
    assert repr(Own()) == "Own(scale=2.0, inner=MLP(features=2, width=4), note=1)"


def test_a_network_begins_with_what_it_was_made_with() -> None:
    assert re.match(r"MLP\(\n  features=2, width=4\n  \(embedding\)", repr(MLP(2, width=4)))


def test_the_state_of_a_sampler_shows_shapes() -> None:
    state = next(PCSampler(model(), DDIM(), steps=2).iterate((2, 1, 8, 8)))
    assert "x=tensor(shape=(2, 1, 8, 8))" in repr(state)

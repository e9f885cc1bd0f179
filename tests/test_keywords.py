"""Unknown and missing keywords: what is said, and that what is advised exists."""

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.bad_arguments import OWN, call, callables
from torch import nn

import diffusionkit
from diffusionkit import (
    DDIM,
    EMA,
    VPSDE,
    ClassifierFreeGuidance,
    EDMModel,
    EpsModel,
    GaussianMixtureModel,
    Heun,
    Langevin,
    PCSampler,
    PowerEMA,
    ProbabilityFlow,
    ScoreMatching,
    fit_grid,
)
from diffusionkit._keywords import _FOREIGN, _METHODS, advice, conditions_of, explains
from diffusionkit.networks import MLP, ADMUNet, DDPMpp, DiT, NCSNpp, NCSNv2

EXPLAINED = [PCSampler, ProbabilityFlow, EpsModel, EDMModel, ScoreMatching, EMA, PowerEMA, DDIM,
             Heun, Langevin, ClassifierFreeGuidance, MLP, DiT, NCSNv2]  # fmt: skip
WORDS = st.from_regex(r"[a-z]{3,12}(_[a-z]{2,8})?", fullmatch=True)


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("cls", EXPLAINED, ids=lambda cls: cls.__name__)
@given(word=WORDS)
def test_any_unknown_keyword_of_a_constructor_is_named_with_the_known_ones(cls, word) -> None:
    known = parameters(cls)
    if word in known:
        return
    with pytest.raises(TypeError) as error:
        cls(**{word: 1})
    text = str(error.value)
    assert text.startswith(f"{word}: expected an argument of {cls.__name__}(")
    assert f"({', '.join(known)})" in text


@given(word=WORDS)
def test_any_unknown_condition_is_named_with_those_of_the_network(word) -> None:
    if word in ("device", "dtype", "generator", "start", "class_labels"):
        return
    sampler = PCSampler(EpsModel(MLP(2, width=4, depth=1), VPSDE()), DDIM(), steps=1)
    with pytest.raises(TypeError) as error:
        sampler((2, 2), **{word: 1})
    text = str(error.value)
    assert text.startswith(f"{word}: expected a condition of the network MLP, one of class_labels")


@pytest.mark.parametrize("name", sorted({n for names in _FOREIGN for n in names}))
def test_every_foreign_name_as_a_condition_is_advised(name) -> None:
    model = EpsModel(lambda x, noise_label: x, VPSDE())
    with pytest.raises(TypeError, match=f"^{name}: expected a condition of the network lambda"):
        model.predict(torch.zeros(2, 2), torch.ones(2), **{name: 1})


def test_the_names_that_are_advised_exist() -> None:
    known = {p for value in callables().values() for p in _signature(value)}
    for ours, line in _FOREIGN.values():
        assert set(ours.split()) <= known
        for word in re.findall(r"\b[A-Z][A-Za-z0-9]+\b", line):
            assert word == "True" or hasattr(diffusionkit, word) or hasattr(torch, word), word


def _signature(value):
    try:
        return parameters(value)
    except (TypeError, ValueError):
        return []


def test_no_foreign_name_is_a_parameter_where_it_is_called_foreign() -> None:
    """A sampler that takes `steps` does not say that it is unknown: the table is asked last."""
    assert PCSampler(EpsModel(len, VPSDE()), DDIM(), steps=3).steps == 3
    assert advice("num_steps", ["steps"]) == "; use steps=..."
    assert advice("num_steps", ["model"]) == "; pass steps=50 where the sampler is made"
    assert advice("multiplier", ["width", "multipliers"]) == "; use multipliers=..."
    assert advice("qqq", ["width"]) == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCSampler(0, DDIM(), num_inference_steps=3), "got an unknown name; use steps=..."),
        (lambda: Heun(S_churn=3), "S_churn: expected an argument of Heun(alpha, churn"),
        (lambda: EpsModel(len), "sde: expected an argument of EpsModel(network, sde, "),
        (lambda: EDMModel(len, VPSDE(), sigma=1), "of EDMModel(network, sde, sigma_data, "),
        (lambda: ClassifierFreeGuidance(len, guidance_scale=2), "; use scale=..."),
        (lambda: EMA(len, beta=0.9), "; use decay=..."),
        (lambda: DDPMpp(chanels=3), "DDPMpp(...), got an unknown name; use channels=..."),
        (lambda: NCSNpp(dim_mults=(1,)), "; use multipliers=..."),
        (lambda: ADMUNet(num_res_blocks=2), "; use blocks=..."),
        (lambda: MLP(), "features: expected an argument of MLP(features, out_features, width"),
    ],
)
def test_constructors_explain(make, message) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_errors_inside_a_call_that_fits_are_not_explained() -> None:
    class Part:
        @explains
        def __call__(self, x):
            raise TypeError("inside")

    with pytest.raises(TypeError, match=r"^inside$"):
        Part()(1)


def test_signatures_stay_readable() -> None:
    assert parameters(PCSampler)[:3] == ["model", "predictor", "corrector"]
    assert parameters(PCSampler.__call__)[1] == "start"
    assert "shape" in PCSampler.__call__.__doc__


class Wrapped(nn.Module):
    def forward(self, x, noise_label, y, *, z=None):
        return x + y.unsqueeze(1)


def test_conditions_of_networks() -> None:
    assert conditions_of(Wrapped()) == ("y", "z")
    assert conditions_of(lambda x, t: x) == ()
    assert conditions_of(lambda x, t, **cond: x) is None
    assert conditions_of(lambda *args: args[0]) == ()
    assert conditions_of(torch.relu) is None  # no signature
    assert conditions_of(DDPMpp(width=8, blocks=1, multipliers=(1,))) == (
        "class_labels", "condition", "low_res",
    )  # fmt: skip


def test_wrapped_networks_are_asked_inside() -> None:
    model = EpsModel(nn.DataParallel(Wrapped()), VPSDE())
    x, t = torch.zeros(2, 2), torch.ones(2)
    assert model.predict(x, t, y=torch.ones(2)).eps.shape == x.shape
    with pytest.raises(TypeError, match=r"of the network Wrapped, one of y, z, got label=\.\.\."):
        model.predict(x, t, label=1)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda x: EpsModel(Wrapped(), VPSDE()).predict(x, x[:, 0], label=1), "; use y=..."),
        (lambda x: EpsModel(Wrapped(), VPSDE()).predict(x, x[:, 0], classes=1), "; use y=..."),
        (lambda x: EpsModel(len, VPSDE()).predict(x, x[:, 0], label=1), "of the network"),
        (lambda x: PowerEMA(len, batch_size=8), "an unknown name"),
        (lambda x: MLP(2, shape=8), "an unknown name"),
        (lambda x: PCSampler(0, DDIM(), batch_size=8), "; pass the shape of the samples first"),
    ],
)
def test_advice_is_only_what_the_call_would_take(call, hint) -> None:
    """A network with `y` is not told to take `class_labels`, nor an average a shape."""
    with pytest.raises(TypeError) as error:
        call(torch.ones(2, 2))
    text = str(error.value)
    assert hint in text
    assert ("; pass the shape" in text) == hint.startswith("; pass the shape")
    assert "; pass class_labels" not in text


def test_recipes_still_make_every_explained_class() -> None:
    for cls in EXPLAINED:
        if cls.__name__ in callables() and cls.__name__ in OWN:
            assert type(call(cls.__name__, {})).__name__ == cls.__name__


@pytest.mark.parametrize("names", _METHODS)
def test_methods_under_their_published_names(names) -> None:
    """An import says what they are here, and that exists."""
    for name in names:
        with pytest.raises(ImportError, match=f"cannot import name '{name}' from .*; here it is"):
            getattr(diffusionkit, name)
    line = _METHODS[names]
    parts = re.findall(r"\b[A-Z]\w+", line)
    assert parts
    assert all(part in diffusionkit.__all__ or part == "A" for part in parts)


def test_published_names_in_any_case() -> None:
    for name in ("DPS", "PiGDM", "RePaint", "SDEdit"):
        with pytest.raises(ImportError, match="here it is"):
            exec(f"from diffusionkit import {name}")
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from diffusionkit import Nothing")
    assert not hasattr(diffusionkit, "Nothing")


def test_a_function_is_called_by_its_own_name():
    """Not by the class of its first argument, as a method is."""
    model = GaussianMixtureModel(VPSDE(), [[0.0]], [1.0])
    with pytest.raises(TypeError, match=r"^steps: expected an argument of fit_grid\(model, .*none"):
        fit_grid(model, DDIM(), (4, 1))
    with pytest.raises(TypeError, match=r"^model: expected an argument of fit_grid\(model, .*none"):
        fit_grid()
    with pytest.raises(TypeError, match=r"^model: expected an argument of PCSampler\(.*none"):
        PCSampler()

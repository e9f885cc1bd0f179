"""Whole models in files: the same bits again, for every process, parameterization and network."""

import itertools
import json
import math
import os
import sys
import tempfile
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    VESDE,
    VPSDE,
    AdaptiveProjection,
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clip,
    DDPMChain,
    DenoisedModel,
    DynamicThreshold,
    EDMModel,
    EmpiricalModel,
    EpsModel,
    EulerMaruyama,
    FlowMatchingSDE,
    GaussianMixtureModel,
    GradientGuidance,
    IndexLabel,
    LearnedSDE,
    LinearGaussianGuidance,
    LinearizedGaussianGuidance,
    LogSigmaLabel,
    LogSNRSDE,
    NoiseClassifier,
    PatchedModel,
    PCSampler,
    PseudoinverseGuidance,
    RawScoreModel,
    ReverseTimeLabel,
    ScaledScoreModel,
    ScheduleTransformedModel,
    SigmaLabel,
    SMLDChain,
    StepLabel,
    SubVPSDE,
    TimeLabel,
    VelocityModel,
    VModel,
    X0Model,
)
from diffusionkit._parts import describe
from diffusionkit.checkpoints import load_model, register_part, save_model
from diffusionkit.checkpoints._model_builder import _own_classes
from diffusionkit.control import AveragePool, Blur, Gray, Mask, Matrix
from diffusionkit.networks import (
    MLP,
    ADMUNet,
    DDPMpp,
    DDPMUNet,
    DiT,
    EDM2UNet,
    FourierFeatures,
    NCSNpp,
    NCSNv2,
    PositionChannels,
)

SMALL = {"width": 4, "multipliers": (1,), "blocks": 1, "attention_levels": ()}
PROCESSES = {
    "VE": VESDE(sigma_max=20.0),
    "VP": VPSDE(beta_max=12.0, t_min=1e-4),
    "sub-VP": SubVPSDE(),
    "EDM": EDMSDE(sigma_max=40.0),
    "flow": FlowMatchingSDE(t_min=2e-3),
    "DDPM": DDPMChain.linear(25),
    "cosine": DDPMChain.cosine(30).zero_terminal_snr(),
    "SMLD": SMLDChain.geometric(20),
    "log-SNR": LogSNRSDE(gamma_max=4.0),
    "learned": LearnedSDE(hidden=5, learn_ends=True),
}
PARAMETERIZATIONS = {
    "eps": EpsModel,
    "x0": X0Model,
    "v": VModel,
    "velocity": VelocityModel,
    "score": RawScoreModel,
    "scaled score": ScaledScoreModel,
    "EDM": partial(EDMModel, sigma_data=0.7),
}
NETWORKS = {
    "MLP": lambda: MLP(2, width=4, depth=1),
    "FourierFeatures": lambda: FourierFeatures(MLP(10, out_features=2, width=4, depth=1)),
    "NCSNpp": lambda: NCSNpp(1, **SMALL, data_range=(0.0, 1.0), scale_by_sigma=False),
    "DDPMpp": lambda: DDPMpp(1, **SMALL),
    "DDPMUNet": lambda: DDPMUNet(1, **SMALL, group_channels=2),
    "ADMUNet": lambda: ADMUNet(1, **SMALL, learn_sigma=False),
    "DiT": lambda: DiT(1, width=8, depth=1, heads=2, patch_size=(2, 4)),
    "EDM2UNet": lambda: EDM2UNet(1, **SMALL, head_channels=4),
    "NCSNv2": lambda: NCSNv2(1, width=4, sigmas=(3.0, 2.0, 1.0), levels=((1, 1), (2, 1))),
}


def made(process, parameterization, network, **options):
    """A model with random weights."""
    torch.manual_seed(0)
    if network == "NCSNv2":
        options["label"] = IndexLabel([3.0, 2.0, 1.0])
    if network == "NCSNpp":  # which embeds the logarithm
        options["label"] = TimeLabel()
    model = PARAMETERIZATIONS[parameterization](NETWORKS[network](), PROCESSES[process], **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def bits(x):
    """Numbers as integers: NaN is compared too."""
    return x.detach().contiguous().view(torch.uint8)


def same(a, b, shape, **cond) -> None:
    """Two models have the same tensors, predictions and samples, to the bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype, name
        assert torch.equal(bits(theirs[name]), bits(value)), name
    x = torch.linspace(-1.0, 1.0, math.prod(shape)).view(shape)
    t = torch.linspace(0.3, 0.7, len(x)) * a.sde.T
    with torch.no_grad():
        predictions = [model.predict(x, t, **cond) for model in (a, b)]
        grid = torch.linspace(0.9, 0.3, 4) * a.sde.T
        samples = [
            PCSampler(model, EulerMaruyama(), grid=grid, denoise=False)(
                x, generator=torch.Generator().manual_seed(1), **cond
            )
            for model in (a, b)
        ]
    for name in ("x0", "eps"):
        assert torch.equal(*(bits(getattr(p, name)) for p in predictions)), name
    assert torch.equal(*map(bits, samples))


def returned(model, name="model"):
    """A model from the folder that another was saved in, and its description."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        save_model(path, model)
        back = load_model(path)
    assert type(back) is type(model)
    assert not any(module.training for module in back.modules())
    return back


def shape_of(network: str) -> tuple[int, ...]:
    return (2, 2) if network in ("MLP", "FourierFeatures") else (2, 1, 8, 8)


# Every pair of a process and a parameterization, and every network.
SOME = [(*pair, "MLP") for pair in itertools.product(PROCESSES, PARAMETERIZATIONS)]
SOME += [("VP", "eps", network) for network in NETWORKS if network != "MLP"]


@pytest.mark.parametrize(("process", "parameterization", "network"), SOME)
def test_the_same_bits_again(process, parameterization, network) -> None:
    model = made(process, parameterization, network, data_range=(-1.0, 1.0))
    back = returned(model, "m.safetensors" if process == "VP" else "m")
    assert back.data_range == (-1.0, 1.0)
    assert repr(back.label) == repr(model.label)
    same(model, back, shape_of(network))


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_whole_product(process, network) -> None:
    for parameterization in PARAMETERIZATIONS:
        model = made(process, parameterization, network)
        same(model, returned(model), shape_of(network))


def conditional(sde):
    torch.manual_seed(0)
    return EpsModel(MLP(2, width=4, num_classes=3), sde, label=LogSigmaLabel()).eval()


def guided_by_classifier():
    sde = LearnedSDE(hidden=3)
    classifier = NoiseClassifier(MLP(2, out_features=3, width=4), sde)
    return ClassifierGuidance(conditional(sde), classifier, 2.5, conditional=True)


def of_patches():
    torch.manual_seed(0)
    network = PositionChannels(DDPMpp(7, out_channels=1, **SMALL), [2], linear=True)
    nn.init.normal_(network.network.head.conv.weight)
    return PatchedModel(
        EpsModel(network, VPSDE()), (8, 6), [4, 3], margin=1, blend="uniform",
        periodic=(True, False), shift=True, positions=True, batch=5,
    ).eval()  # fmt: skip


@register_part
def first_coordinate(x):
    return x[:, :1]


@register_part(name="tests/likelihood")
def likelihood(x0):
    return -x0.square().sum(1)


OPERATORS = {
    "mask": Mask(torch.arange(64).view(8, 8) % 3 == 0),
    "pool": AveragePool(2),
    "gray": Gray(1),
    "blur": Blur(torch.tensor([[0.2, 0.6, 0.2]]), (8, 8), floor=0.3),
    "matrix": Matrix(torch.linspace(-1.0, 1.0, 128).view(2, 1, 8, 8)),
}


def measured(operator):
    y = operator(torch.linspace(0.0, 1.0, 64).view(1, 1, 8, 8))
    return PseudoinverseGuidance(made("VP", "x0", "DDPMpp"), operator, y, 0.1, [0.4])


WRAPPERS = {
    "transformed": lambda: ScheduleTransformedModel(made("VP", "eps", "MLP"), VESDE(0.01, 10.0)),
    "clipped": lambda: DenoisedModel(made("VE", "eps", "MLP"), Clip(-1.0, math.inf)),
    "threshold": lambda: DenoisedModel(made("learned", "v", "MLP"), DynamicThreshold(0.9)),
    "free": lambda: ClassifierFreeGuidance(
        conditional(VPSDE()), 2.0, (0.1, math.inf), 0.5, null={"class_labels": torch.tensor(0)}
    ),
    "projected": lambda: ClassifierFreeGuidance(
        conditional(VPSDE()),
        2.0,
        null={"class_labels": 0},
        projection=AdaptiveProjection(0.2, max_norm=1.5),
    ),
    "autoguidance": lambda: Autoguidance(
        made("VP", "eps", "MLP"), made("VP", "x0", "MLP"), 2.0, (0.1, 3.0), conditions=()
    ),
    "classifier": guided_by_classifier,
    "linear": lambda: LinearGaussianGuidance(
        made("VP", "x0", "MLP"), first_coordinate, torch.tensor([[0.3]]), 0.1
    ),
    "each noise": lambda: LinearizedGaussianGuidance(
        made("VP", "x0", "MLP"), first_coordinate, torch.tensor([[0.3]]), torch.tensor([0.2])
    ),
    "pseudoinverse": lambda: PseudoinverseGuidance(
        made("VP", "x0", "MLP"), first_coordinate, torch.tensor([[0.3]]), 0.1, 0.5
    ),
    "gradient": lambda: GradientGuidance(made("VP", "x0", "MLP"), likelihood, 0.5),
    **{name: partial(measured, operator) for name, operator in OPERATORS.items()},
    "patched": of_patches,
    "mixture": lambda: GaussianMixtureModel(
        VPSDE(), [[0.1, 1.0], [2.0, 0.3]], [0.1, 0.7], [0.1, 0.6]
    ),
    "data": lambda: EmpiricalModel(VESDE(), torch.tensor([[0.1, 0.2], [0.3, -1.0]]), block=1),
    "nested": lambda: ScheduleTransformedModel(
        DenoisedModel(GaussianMixtureModel(SubVPSDE(), [[0.1, 1.0]], [0.1]), Clip()), EDMSDE()
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_and_exact_models(name) -> None:
    model = WRAPPERS[name]()
    labels = (
        {"class_labels": torch.tensor([1, 2])}
        if name in ("free", "projected", "classifier")
        else {}
    )
    shape = (2, 1, 11, 13) if name == "patched" else (2, 2)
    shape = shape_of("DDPMpp") if name in OPERATORS else shape
    same(model, returned(model), shape, **labels)


def test_every_class_of_models_is_tested() -> None:
    """Every class that a file may name is in a model of this file."""
    models = [made(p, "eps", "MLP") for p in PROCESSES]
    models += [made("VP", p, "MLP") for p in PARAMETERIZATIONS]
    models += [made("VP", "eps", n) for n in NETWORKS]
    models += [wrapper() for wrapper in WRAPPERS.values()]
    models += [EpsModel(MLP(2), VPSDE(), label=label) for label in LABELS]
    found = {part for model in models for part in describe(model).found.values()}
    assert {part for part in found if isinstance(part, type)} == set(_own_classes().values())


LABELS = [
    TimeLabel(3.5),
    ReverseTimeLabel(2.0),
    SigmaLabel(),
    LogSigmaLabel(0.3, reference=2.0),
    StepLabel(25, 4.0),
    IndexLabel([5.0, 1.1, 0.3]),
]


VARIANCES = [None, "learned", "learned_range", "fixed_small", "fixed_large", None]


@pytest.mark.parametrize(("label", "variance"), [*zip(LABELS, VARIANCES, strict=True)], ids=str)
def test_labels_and_variances(label, variance) -> None:
    features = 4 if variance and "learned" in variance else 2
    torch.manual_seed(0)
    network = MLP(2, out_features=features, width=4)
    nn.init.normal_(network.output.weight)
    model = EpsModel(network, DDPMChain.linear(25), label=label, variance=variance).eval()
    back = returned(model)
    assert back.variance == variance
    same(model, back, (2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_kept(dtype) -> None:
    for network in ("MLP", "NCSNpp"):
        model = EpsModel(NETWORKS[network]().to(dtype), VPSDE()).eval()
        same(model, returned(model), shape_of(network))


FINITE = st.floats(1e-3, 1e3)
INNER = st.lists(st.floats(1e-6, 0.5), min_size=2, max_size=5)


@st.composite
def processes(draw):
    a, b = sorted((draw(FINITE), draw(FINITE)))
    kind = draw(st.sampled_from([VESDE, VPSDE, SubVPSDE, EDMSDE, LogSNRSDE, DDPMChain, SMLDChain]))
    if kind is DDPMChain:
        return DDPMChain(draw(INNER))
    if kind is SMLDChain:
        return SMLDChain(torch.tensor(draw(INNER), dtype=torch.float64).cumsum(0))
    timed = {"t_min": draw(st.floats(0.0, 0.5))} if kind in (VESDE, VPSDE, SubVPSDE) else {}
    return kind(a, b * 1.5, **timed)


@settings(max_examples=15, deadline=None)
@given(
    sde=processes(),
    sigma_data=FINITE,
    scale=FINITE,
    low=st.floats(-1e3, 0.0),
    variance=st.sampled_from([None, "fixed_small", "fixed_large"]),
)
def test_fields_come_back(sde, sigma_data, scale, low, variance) -> None:
    model = EDMModel(
        MLP(2, width=2, depth=1), sde, sigma_data, label=LogSigmaLabel(scale),
        data_range=(low, low + scale), variance=variance,
    )  # fmt: skip
    back = returned(model)
    assert (back.sigma_data, back.label) == (sigma_data, model.label)
    assert (back.data_range, back.variance) == (model.data_range, variance)
    t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64) * sde.T
    assert back.sde.T == sde.T
    assert back.sde.t_min == sde.t_min
    assert torch.equal(torch.stack(back.sde.marginal(t)), torch.stack(sde.marginal(t)))


def test_the_description_can_be_read(tmp_path) -> None:
    save_model(tmp_path / "m", made("VP", "EDM", "MLP", data_range=(0.0, 1.0)))
    assert sorted(os.listdir(tmp_path / "m")) == ["model.json", "model.safetensors"]
    about = json.loads((tmp_path / "m" / "model.json").read_text())
    assert (about["format"], about["version"]) == ("diffusionkit.model", 1)
    assert about["model"]["class"] == "EDMModel"
    arguments = about["model"]["arguments"]
    assert arguments["sde"] == {
        "class": "VPSDE", "arguments": {"beta_min": 0.1, "beta_max": 12.0, "t_min": 1e-4}
    }  # fmt: skip
    assert arguments["network"]["class"] == "MLP"
    assert arguments["network"]["arguments"]["width"] == 4
    assert arguments["data_range"] == [0.0, 1.0]
    assert arguments["sigma_data"] == 0.7


def test_one_object_is_one_object_again() -> None:
    back = returned(guided_by_classifier())
    assert back.classifier.sde is back.model.sde
    assert back.sde is back.model.sde


def test_wrappers_of_torch_are_left_out() -> None:
    model = EpsModel(MLP(2, width=4), VPSDE())
    compiled = EpsModel(torch.compile(model.network, backend="eager"), VPSDE())
    back = returned(compiled)
    assert list(back.state_dict()) == list(model.state_dict())
    same(model.eval(), back, (2, 2))


def test_averages_are_saved_as_their_model(tmp_path) -> None:
    model = EpsModel(MLP(2, width=4), VPSDE())
    ema = EMA(model)
    same(ema.model.eval(), returned(ema.model), (2, 2))
    with pytest.raises(TypeError, match="model: expected a ScoreModel, got EMA"):
        save_model(tmp_path / "m", ema)


def test_gradients_and_ties_of_the_saved_model_are_left_alone(tmp_path) -> None:
    model = EpsModel(FourierFeatures(MLP(10, out_features=2, width=4)), VPSDE())
    x, t = torch.ones(2, 2), torch.tensor([0.3, 0.6])
    loss = model.predict(x, t).eps.sum()
    parameters = [(id(p), p.data_ptr(), p.dtype) for p in model.parameters()]
    save_model(tmp_path / "m", model)
    loss.backward()
    assert [(id(p), p.data_ptr(), p.dtype) for p in model.parameters()] == parameters


def test_a_folder_is_written_over(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("kept")
    save_model(tmp_path / "m", made("VP", "eps", "MLP"))
    save_model(tmp_path / "m", made("VE", "v", "NCSNpp"))
    assert type(load_model(tmp_path / "m")) is VModel
    assert (tmp_path / "m" / "README.md").read_text() == "kept"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, made("VP", "eps", "MLP"))

    def full(*_) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_model(path, made("VE", "v", "MLP"))
    assert os.listdir(tmp_path) == [path.name]
    assert type(load_model(path)) is EpsModel


@pytest.mark.parametrize("name", ["run.pt", "run.PTH", "a.ckpt", "model.bin", "model.json"])
def test_names_of_other_formats_are_refused(tmp_path, name) -> None:
    text = rf"path: expected a name that ends in .safetensors, or that of a folder, got {name}"
    with pytest.raises(ValueError, match=text):
        save_model(tmp_path / name, made("VP", "eps", "MLP"))
    assert not os.listdir(tmp_path)


def test_without_the_package(tmp_path, monkeypatch) -> None:
    save_model(tmp_path / "m", made("VP", "eps", "MLP"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    install = r'needs the package safetensors: pip install "diffusionkit-torch\[safetensors\]"'
    with pytest.raises(ImportError, match=f"writing .* {install}"):
        save_model(tmp_path / "n", made("VP", "eps", "MLP"))
    with pytest.raises(ImportError, match=f"reading .* {install}"):
        load_model(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def test_weights_that_are_not_finite_are_refused(tmp_path) -> None:
    model = made("VP", "eps", "MLP")
    with torch.no_grad():
        model.network.output.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"network\.output\.bias: expected finite numbers, got"):
        save_model(tmp_path / "m", model)
    assert not os.listdir(tmp_path)


def test_a_sampler_on_a_loaded_model(tmp_path) -> None:
    model = made("EDM", "EDM", "MLP")
    save_model(tmp_path / "m", model)
    samples = [
        PCSampler(m, DDIM(), steps=3)((4, 2), generator=torch.Generator().manual_seed(0))
        for m in (model, load_model(tmp_path / "m"))
    ]
    assert torch.equal(*samples)
